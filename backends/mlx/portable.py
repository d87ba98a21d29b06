"""A model's parameters and optimizer state by name, as torch has them: what `zeta.checkpoint` saves."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.convolution import Conv1d, Conv2d, Conv3d
from mlx.nn.layers.convolution_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from mlx.nn.layers.distributed import FullyShardedModule
from mlx.optimizers import SGD, Adam, Muon, Optimizer
from mlx.utils import tree_map_with_path

from zeta.portable import check_names, check_parameters, check_state, parameter_of
from zeta.stages import one, per_row

from .optimizer import Zeta
from .state import State, leaf, tree_flatten, wide_dtype

# What MLX's own optimizers keep, under the keys that torch's have.
KEYS = {Adam: {"m": "exp_avg", "v": "exp_avg_sq"}, Muon: {"v": "momentum_buffer"}, SGD: {"v": "momentum_buffer"}}


def named_state(params: Any, optimizers: Any) -> dict[str, mx.array]:
    """{NAME: parameter, "optimizer.KEY.NAME": state}, nothing copied.

    `params` is a model or a dict of its parameters, `optimizers` one of MLX's or several. Steps are counted for each
    parameter of AdamW, as in torch. A model's convolutions have their channels where torch's have them; those in a dict
    stay as they are, to be loaded into a dict. Raises ValueError for state of a convolution that lies by its columns,
    and for a model of `nn.fully_shard`, whose ranks hold some rows each.
    """
    model, axes = _named(params), _channels(params)
    arrays = {name: _as_torch(p, axes.get(name)) for name, p in model.items()}
    for name, (optimizer, state) in _owners(optimizers, model).items():
        keys, moved = _keys(optimizer), _state_as_torch(name, model[name], axes.get(name), optimizer, state)
        arrays |= {f"optimizer.{keys.get(key, key)}.{name}": value for key, value in moved.items()}
        if isinstance(optimizer, Adam) and state:
            arrays[f"optimizer.step.{name}"] = optimizer.step.astype(mx.float32)
    return arrays


def load_named_state(params: Any, optimizers: Any, arrays: Mapping[str, Any], step: int | None = None) -> None:
    """Continues from what `named_state` of either library gave, as NumPy arrays or MLX's.

    Schedules continue from `step`, without it from the largest among the arrays; where AdamW moves no parameter there
    is none, and a schedule's optimizer warns. Raises ValueError, before a parameter is changed, where names or shapes
    do not fit the model, or the state is not what its optimizer keeps. A list of optimizers must have been told their
    parameters, by `init`.
    """
    model, axes = _named(params), _channels(params)
    shapes = {full: tuple(a.shape) for full, a in arrays.items()}
    wholes = {name: tuple(_as_torch(p, axes.get(name)).shape) for name, p in model.items()}
    check_parameters(shapes, wholes)
    if not isinstance(optimizers, list | tuple):
        optimizers.init(params.trainable_parameters() if isinstance(params, Module) else params)  # type: ignore[no-untyped-call]
    owners = _owners(optimizers, model)
    needs = {}
    for name, (optimizer, state) in owners.items():
        moved = _state_as_torch(name, model[name], axes.get(name), optimizer, state)
        needs[name] = type(optimizer).__name__, _needs(optimizer, moved)
    check_state(shapes, model, needs)
    steps = [int(a) for full, a in arrays.items() if full not in model and full.startswith("optimizer.step.")]
    if step is None and not steps and len(arrays) > len(model) and any(o._schedulers for o in _several(optimizers)):
        warnings.warn("the state says no step, so that schedules begin anew: give load_named_state step=", stacklevel=2)

    for name, saved in _by_parameter(arrays, model).items():
        own = {key: _as_mlx(x, wholes[name], axes.get(name)) for key, x in saved.items()}
        model[name], state = _cast(own, model[name].dtype)
        if name in owners:
            _replace(*owners[name], state, model[name])
    params.update(tree_map_with_path(lambda name, _: model[name], _tree(params)))
    for optimizer in _several(optimizers):
        optimizer.state["step"] = mx.array(max(steps, default=0) if step is None else step, mx.uint64)


def to_numpy(state: Mapping[str, mx.array]) -> dict[str, np.ndarray[Any, Any]]:
    """{name: array}, bfloat16 as float32, else the memory that the arrays have.

    `zeta.checkpoint.save(file, to_numpy(named_state(model, optimizer)), settings)` writes a file for any library.
    """
    wide = {name: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for name, x in state.items()}
    return {name: np.array(mx.contiguous(x), copy=False) for name, x in wide.items()}  # not of x, which += would change


def _tree(params: Any) -> Any:
    return params.parameters() if isinstance(params, Module) else params  # type: ignore[no-untyped-call]


def _named(params: Any) -> dict[str, mx.array]:
    for path, module in _modules(params):
        if isinstance(module, FullyShardedModule):
            raise ValueError(
                f"{path or 'the model'} is sharded by nn.fully_shard, so that this rank has some rows alone: save and "
                "load each rank's own, model.parameters() and optimizer.state, with mx.save_safetensors"
            )
    model = dict(tree_flatten(_tree(params)))
    check_names(model)
    return model


def _modules(params: Any) -> list[tuple[str, Module]]:
    return params.named_modules() if isinstance(params, Module) else []  # type: ignore[no-untyped-call]


def _channels(params: Any) -> dict[str, int]:
    """{name: the axis where torch has the channels that MLX has last}, of a model's convolutions."""
    kinds = {(Conv1d, Conv2d, Conv3d): 1, (ConvTranspose1d, ConvTranspose2d, ConvTranspose3d): 0}
    found = ((path, axis) for path, m in _modules(params) for kind, axis in kinds.items() if isinstance(m, kind))
    return {f"{path}.weight".lstrip("."): axis for path, axis in found}


def _as_torch(x: mx.array, axis: int | None) -> mx.array:
    return x if axis is None else mx.moveaxis(x, -1, axis)


def _state_as_torch(name: str, p: mx.array, axis: int | None, optimizer: Any, state: State) -> State:
    """The state of the parameter p called `name`, as torch has it."""
    if axis is None:
        return state
    keeps = optimizer.rule.keeps if isinstance(optimizer, Zeta) else {}
    ordered = (one, per_row) if axis else (one,)  # which no order of the columns changes
    moved = {}
    for key, x in state.items():
        if x.shape != p.shape and x.ndim and keeps.get(key) not in ordered:
            raise ValueError(
                f"{key} of {name} lies by the convolution's columns, which are in another order in torch: save and "
                "load optimizer.state itself, with mx.save_safetensors"
            )
        moved[key] = _as_torch(x, axis) if x.shape == p.shape else x
    return moved


def _as_mlx(x: Any, whole: tuple[int, ...], axis: int | None) -> Any:
    """An array of a parameter that has the shape `whole` in torch."""
    if axis is None or tuple(x.shape) != whole:
        return x
    return mx.moveaxis(mx.array(x), axis, -1)


def _several(optimizers: Any) -> list[Optimizer]:
    several = getattr(optimizers, "optimizers", optimizers)  # of a MultiOptimizer
    return list(several) if isinstance(several, list | tuple) else [several]


def _owners(optimizers: Any, names: Iterable[str]) -> dict[str, tuple[Optimizer, State]]:
    """{name: (optimizer, state)} of the parameters that the optimizers have been told of."""
    states = ((name, o, leaf(o.state, name)) for o in _several(optimizers) for name in names)
    return {name: (o, state) for name, o, state in states if state is not None}


def _keys(optimizer: Optimizer) -> dict[str, str]:
    return next((keys for own, keys in KEYS.items() if isinstance(optimizer, own)), {})


def _needs(optimizer: Optimizer, state: State) -> dict[str, tuple[int, ...]]:
    """What it keeps of a parameter, under the keys of torch's, with the shapes."""
    keys = _keys(optimizer)
    needs = {keys.get(key, key): tuple(value.shape) for key, value in state.items() if key != "remainder"}
    return needs | ({"step": ()} if isinstance(optimizer, Adam) else {})


def _by_parameter(arrays: Mapping[str, Any], model: Collection[str]) -> dict[str, dict[str, Any]]:
    """{NAME: {KEY: state, "": the parameter itself}}"""
    saved: dict[str, dict[str, Any]] = {name: {} for name in model}
    for full, value in arrays.items():
        saved[parameter_of(full, model)]["" if full in model else full.split(".", 2)[1]] = value
    return saved


def _cast(saved: Mapping[str, Any], dtype: mx.Dtype) -> tuple[mx.array, State]:
    """(parameter, its state), the one in its dtype, the other in float32 or better."""
    wide = wide_dtype(dtype)
    own = {key: dtype if key in ("", "remainder") else wide for key in saved}
    state = {k: x.astype(own[k]) if isinstance(x, mx.array) else mx.array(x, own[k]) for k, x in saved.items()}
    p = state.pop("")
    if dtype == wide and "remainder" in state:  # of a parameter that was narrower when it was saved
        p += state.pop("remainder")
    return p, state


def _replace(optimizer: Any, state: State, saved: State, p: mx.array) -> None:
    """Puts what was saved of a parameter in place of its state; where nothing was, the optimizer begins anew."""
    own = {theirs: ours for ours, theirs in _keys(optimizer).items()}
    if not isinstance(optimizer, Zeta):
        saved = {own.get(key, key): value for key, value in saved.items() if key != "step"}  # one for all parameters
    state.clear()
    state.update(saved)
    if not state:
        optimizer.init_single(p, state)
