"""A model's parameters and optimizer state by name: what `zeta.checkpoint` and torch.distributed.checkpoint save."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .torch_places import placed


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

    Raises ValueError, before anything is changed, where names or shapes do not fit the model.
    """
    model, owner = named(params), owners(optimizers)
    check_names({name: array.shape for name, array in arrays.items()}, model)
    check_keys(arrays, model, owner)
    for full, array in arrays.items():
        p, value = model[parameter_of(full)], array if isinstance(array, Tensor) else torch.from_numpy(array)
        if full == parameter_of(full):
            p.copy_(value if hasattr(value, "device_mesh") else placed(value, p, None))
        elif p in owner:
            key = full.split(".", 2)[1]
            owner[p].state[p][key] = _state(value.clone(), key, p, owner[p])


def _state(value: Any, key: str, p: Tensor, optimizer: Any) -> Tensor:
    if key == "step" or value.shape != p.shape:  # torch's own optimizers count steps on the CPU
        return value  # type: ignore[no-any-return]
    value = value.to(p.dtype if key == "remainder" else torch.promote_types(p.dtype, torch.float32))
    if hasattr(value, "device_mesh"):
        return value  # type: ignore[no-any-return]
    return placed(value, p, optimizer.place(p) if hasattr(optimizer, "place") else None)


def whole(state: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The NumPy arrays of tensors of any placement: all ranks call it, and all get all."""
    found = {}
    for name, value in state.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = value.cpu().numpy()
    return found


def check_names(saved: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises ValueError where the saved arrays, {name: shape}, are not those of the model's parameters."""
    for full, shape in saved.items():
        name = parameter_of(full)
        if name not in model:
            raise ValueError(f"the checkpoint has {full}, but the model no {name}: it belongs to another model")
        if full == name and tuple(shape) != tuple(model[name].shape):
            shapes = f"{tuple(shape)}, but the model's {tuple(model[name].shape)}"
            raise ValueError(f"the checkpoint's {name} has shape {shapes}: it belongs to another model")
    missing = sorted(model.keys() - saved.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {missing}: it belongs to another model")


def check_keys(saved: Iterable[str], model: Mapping[str, Any], owner: Mapping[Any, Any]) -> None:
    """Raises ValueError where the state is not of the kind that Zeta, or one of its family, keeps."""
    keys: dict[str, set[str]] = {}
    for full in saved:
        if full.startswith("optimizer."):
            keys.setdefault(parameter_of(full), set()).add(full.split(".", 2)[1])
    needs = {p: needed for o in set(owner.values()) if hasattr(o, "needs") for p, needed in o.needs().items()}
    for name, found in keys.items():
        needed = needs.get(model[name], found)
        if found - {"remainder"} != needed - {"remainder"}:
            raise ValueError(
                f"the checkpoint's state of {name} is {sorted(found)}, but {type(owner[model[name]]).__name__} keeps "
                f"{sorted(needed)}: it belongs to another optimizer"
            )


def named(params: Any) -> dict[str, Any]:
    return dict(params.named_parameters() if hasattr(params, "named_parameters") else params)


def owners(optimizers: Any) -> dict[Tensor, Any]:
    """Which optimizer steps a parameter."""
    several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    return {p: o for o in several for group in o.param_groups for p in group["params"]}


def parameter_of(full: str) -> str:
    """The name of the parameter that a saved array belongs to."""
    return full.split(".", 2)[2] if full.startswith("optimizer.") else full
