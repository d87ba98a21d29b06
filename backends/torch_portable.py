"""A model's parameters and optimizer state by name: what `zeta.checkpoint` and torch.distributed.checkpoint save."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeta.storage import writers

from .torch_places import placed
from .torch_state import as_tensor

# Fewer than zeta.routing's: PEFT's base_layer tells two parameters of one name apart.
WRAPPER = re.compile(r"(^module|\b_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def named_state(params: Any, optimizers: Any) -> dict[str, Tensor]:
    """{NAME: parameter, "optimizer.KEY.NAME": state}, each placed over the ranks as it is, nothing copied.

    `params` is a model or {name: parameter}, `optimizers` one of torch's or several.
    """
    found: dict[str, Tensor] = named(params)
    owner = owners(optimizers)
    for name, p in list(found.items()):
        state = owner[p].state.get(p, {}) if p in owner else {}
        found |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()
def load_named_state(params: Any, optimizers: Any, arrays: Mapping[str, Any]) -> None:
    """Continues from what `named_state` gave, as NumPy arrays or tensors: each rank takes its own part of a whole one.

    Raises ValueError, before anything is changed, where names or shapes do not fit the model, or the state is not what
    its optimizer keeps; of torch's own optimizers, which do not tell what they keep, any state is taken.
    """
    model, owner = named(params), owners(optimizers)
    values = {full: torch.as_tensor(a) for full, a in arrays.items()}
    shapes = {full: tuple(value.shape) for full, value in values.items()}
    check_names(shapes, model)
    check_state(shapes, model, owner)
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


def whole(state: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The NumPy arrays of tensors of any placement: all ranks call it, and all get all."""
    found = {}
    for name, value in state.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = numpy(value)
    return found


def numpy(value: Tensor) -> np.ndarray[Any, Any]:
    """The array; bfloat16, which NumPy lacks, as float32."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def check_names(saved: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises ValueError where the saved arrays, {name: shape}, are not those of the model's parameters."""
    for full, shape in saved.items():
        name = parameter_of(full, model)
        if name not in model:
            raise ValueError(f"the checkpoint has {full}, but the model no {name}: it belongs to another model")
        if full == name and tuple(shape) != tuple(model[name].shape):
            shapes = f"{tuple(shape)}, but the model's {tuple(model[name].shape)}"
            raise ValueError(f"the checkpoint's {name} has shape {shapes}: it belongs to another model")
    missing = sorted(model.keys() - saved.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {missing}: it belongs to another model")


def check_state(saved: Mapping[str, Any], model: Mapping[str, Any], owner: Mapping[Any, Any]) -> None:
    """Raises ValueError where the saved state, {name: shape}, is not what Zeta, or one of its family, keeps."""
    states: dict[str, dict[str, tuple[int, ...]]] = {}
    for full, shape in saved.items():
        if full not in model and not full.startswith("optimizer.remainder."):
            states.setdefault(parameter_of(full, model), {})[full.split(".", 2)[1]] = tuple(shape)
    needs = {p: needed for o in set(owner.values()) if hasattr(o, "needs") for p, needed in o.needs().items()}
    for name, found in states.items():
        needed = needs.get(model[name], found)
        if found == needed:
            continue
        here = f"the checkpoint's state of {name} is {found}, but {type(owner[model[name]]).__name__} keeps {needed}: "
        if found.keys() == needed.keys():
            raise ValueError(f"{here}it belongs to another model, or to other routes")
        raise ValueError(f"{here}load it into the optimizer that wrote it, {writers(found)}, with the same routes")


def named(params: Any) -> dict[str, Any]:
    """{name: parameter}, without what wrappers (DDP, torch.compile, activation checkpoints) put into a name.

    Raises ValueError for a name that would be read as another parameter's state.
    """
    pairs = params.named_parameters() if hasattr(params, "named_parameters") else dict(params).items()
    found = {WRAPPER.sub("", name): p for name, p in pairs}
    for name in found:
        if parameter_of(name, {}) != name and parameter_of(name, {}) in found:
            raise ValueError(f"the parameter {name} has the name of the state of {parameter_of(name, {})}: rename it")
    return found


def owners(optimizers: Any) -> dict[Tensor, Any]:
    """Which optimizer steps a parameter."""
    several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    return {p: o for o in several for group in o.param_groups for p in group["params"]}


def parameter_of(full: str, model: Collection[str]) -> str:
    """The name of the parameter that a saved array belongs to: its own, where the model has one of that name."""
    parts = full.split(".", 2)
    return parts[2] if full not in model and parts[0] == "optimizer" and len(parts) == 3 else full
