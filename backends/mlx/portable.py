"""A model's parameters and optimizer state by name, under the names of torch's: what `zeta.checkpoint` saves."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.optimizers import SGD, Adam, Muon, Optimizer
from mlx.utils import tree_map_with_path

from zeta.portable import check_names, check_parameters, check_state, parameter_of

from .optimizer import Zeta
from .state import State, leaf, tree_flatten

# What MLX's own optimizers keep, under the keys that torch's have.
KEYS = {Adam: {"m": "exp_avg", "v": "exp_avg_sq"}, Muon: {"v": "momentum_buffer"}, SGD: {"v": "momentum_buffer"}}


def named_state(params: Any, optimizers: Any) -> dict[str, mx.array]:
    """{NAME: parameter, "optimizer.KEY.NAME": state}, nothing copied.

    `params` is a model or a dict of its parameters, `optimizers` one of MLX's or several. Steps are counted for each
    parameter of AdamW, as in torch.
    """
    model = _named(params)
    arrays = dict(model)
    for name, (optimizer, state) in _owners(optimizers, model).items():
        keys = _keys(optimizer)
        arrays |= {f"optimizer.{keys.get(key, key)}.{name}": value for key, value in state.items()}
        if isinstance(optimizer, Adam) and state:
            arrays[f"optimizer.step.{name}"] = optimizer.step.astype(mx.float32)
    return arrays


def load_named_state(params: Any, optimizers: Any, arrays: Mapping[str, Any]) -> None:
    """Continues from what `named_state` of either library gave, as NumPy arrays or MLX's.

    Schedules continue from the largest step among them; where AdamW moves no parameter none is kept, so set
    `optimizer.state["step"]`. Raises ValueError, before a parameter is changed, where names or shapes do not fit the
    model, or the state is not what its optimizer keeps. A list of optimizers must have been told their parameters, by
    `init`.
    """
    model = _named(params)
    shapes = {full: tuple(a.shape) for full, a in arrays.items()}
    check_parameters(shapes, {name: tuple(p.shape) for name, p in model.items()})
    if not isinstance(optimizers, list | tuple):
        optimizers.init(params.trainable_parameters() if isinstance(params, Module) else params)  # type: ignore[no-untyped-call]
    owners = _owners(optimizers, model)
    check_state(shapes, model, {name: (type(o).__name__, _needs(o, state)) for name, (o, state) in owners.items()})

    for name, saved in _by_parameter(arrays, model).items():
        model[name], state = _cast(saved, model[name].dtype)
        if name in owners:
            _replace(*owners[name], state, model[name])
    params.update(tree_map_with_path(lambda name, _: model[name], _tree(params)))
    steps = [int(a) for full, a in arrays.items() if full not in model and full.startswith("optimizer.step.")]
    for optimizer in _several(optimizers):
        optimizer.state["step"] = mx.array(max(steps, default=0), mx.uint64)


def to_numpy(state: Mapping[str, mx.array]) -> dict[str, np.ndarray[Any, Any]]:
    """{name: array}, bfloat16 as float32.

    `zeta.checkpoint.save(file, to_numpy(named_state(model, optimizer)), settings)` writes a file for any library.
    """
    return {name: np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for name, x in state.items()}


def _tree(params: Any) -> Any:
    return params.parameters() if isinstance(params, Module) else params  # type: ignore[no-untyped-call]


def _named(params: Any) -> dict[str, mx.array]:
    model = dict(tree_flatten(_tree(params)))
    check_names(model)
    return model


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
    wide = mx.result_type(mx.zeros((), dtype), mx.array(0.0))
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
