"""A model's parameters and optimizer state by name: what `zeta.checkpoint` and torch.distributed.checkpoint save."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeta.portable import check_names, check_parameters, check_state, parameter_of

from .placement import placed
from .state import as_tensor

# Fewer than zeta.routing.by_name's: PEFT's base_layer distinguishes two parameters of one name.
WRAPPER = re.compile(r"(^(_orig_mod\.)*module|\b_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def named_state(params: Any, optimizers: Any) -> dict[str, Tensor]:
    """{NAME: parameter, "optimizer.KEY.NAME": state}, each placed over the ranks as it is, nothing copied.

    `params` is a model or {name: parameter}, `optimizers` one of torch's or several. Of a model's buffers the running
    statistics of its norms come along; others, such as masks, are what the model makes itself.
    """
    model, owner = named(params), owners(optimizers)
    arrays = dict(model)
    for name, p in model.items():
        state = owner[p].state.get(p, {}) if p in owner else {}
        arrays |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return {name: value.detach() for name, value in arrays.items()}


@torch.no_grad()
def load_named_state(params: Any, optimizers: Any, arrays: Mapping[str, Any]) -> None:
    """Continues from what `named_state` gave, as NumPy arrays or tensors: each rank takes its own part of a whole one.

    Raises ValueError, before anything is changed, where names or shapes do not fit the model, or the state is not what
    its optimizer keeps; of torch's own optimizers, which do not say what they keep, any state is taken.
    """
    model, owner = named(params), owners(optimizers)
    values = {full: torch.as_tensor(a) for full, a in arrays.items()}
    shapes = {full: tuple(value.shape) for full, value in values.items()}
    check_saved(shapes, model, owner)
    for name, p in model.items():
        p.copy_(values[name] if hasattr(values[name], "device_mesh") else placed(values[name], p, None))
        if p in owner:
            owner[p].state.pop(p, None)
    for full, value in values.items():
        p, key = model[parameter_of(full, model)], full.split(".", 2)[1] if full not in model else ""
        if key == "remainder" and not _narrow(p):  # of a parameter that was narrower when it was saved
            p.add_(value if hasattr(value, "device_mesh") else placed(value.to(p.dtype), p, None))
        elif key and p in owner:
            owner[p].state[p][key] = _state(value.clone(), key, p, owner[p])


def _narrow(p: Tensor) -> bool:
    return p.dtype != torch.promote_types(p.dtype, torch.float32)


def _state(value: Any, key: str, p: Tensor, optimizer: Any) -> Tensor:
    if key == "step" or value.shape != p.shape:  # torch's own optimizers count steps on the CPU
        return as_tensor(value, key)
    value = value.to(p.dtype if key == "remainder" else torch.promote_types(p.dtype, torch.float32))
    if hasattr(value, "device_mesh"):
        return value  # type: ignore[no-any-return]
    return placed(value, p, optimizer.place(p) if hasattr(optimizer, "place") else None)


def to_numpy(state: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """{name: array} of tensors of any placement, whole, bfloat16 as float32: all ranks call it, and all get all.

    `zeta.checkpoint.save(file, to_numpy(named_state(model, optimizer)), settings)` writes a file for any library.
    """
    wholes = ((name, x.full_tensor() if hasattr(x, "full_tensor") else x) for name, x in state.items())
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy() for name, x in wholes}


def check_saved(saved: Mapping[str, Any], model: Mapping[str, Tensor], owner: Mapping[Tensor, Any]) -> None:
    """Raises ValueError where saved arrays of these shapes are not the model's, or not what its optimizers keep."""
    check_parameters(saved, {name: tuple(p.shape) for name, p in model.items()})
    check_state(saved, model, needs(model, owner))


def needs(model: Mapping[str, Tensor], owner: Mapping[Tensor, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (class, {key: shape})} of the parameters whose optimizers say what they keep: Zeta's and its family's."""
    kept = {o: o.needs() for o in set(owner.values()) if hasattr(o, "needs")}
    return {name: (type(owner[p]).__name__, kept[owner[p]][p]) for name, p in model.items() if owner.get(p) in kept}


def named(params: Any) -> dict[str, Any]:
    """{name: parameter or buffer}, without what wrappers (DDP, torch.compile, activation checkpoints) put into a name.

    Raises ValueError for a name that would be read as another's, or as another parameter's state.
    """
    model: dict[str, Tensor] = {}
    for full, p in _arrays(params) if hasattr(params, "named_parameters") else dict(params).items():
        name = WRAPPER.sub("", full)
        if name in model:
            raise ValueError(f"{full} would be saved as {name}, and so would another of the model's: rename it")
        model[name] = p
    check_names(model)
    return model


def _arrays(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Its parameters, and what MLX has as parameters, too."""
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))


def owners(optimizers: Any) -> dict[Tensor, Any]:
    """Which optimizer steps a parameter."""
    several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    return {p: o for o in several for group in o.param_groups for p in group["params"]}
