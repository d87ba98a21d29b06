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
    named = _named(params)
    found: dict[str, Tensor] = dict(named)
    for name, p in named.items():
        for optimizer in _several(optimizers):
            found |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()
def load_named_state(params: Any, optimizers: Any, arrays: Mapping[str, Any]) -> None:
    """Continues from what `named_state` gave, as tensors or NumPy arrays, whole: each rank takes its own part.

    Raises ValueError, before anything is changed, where names or shapes do not fit the model.
    """
    named = _named(params)
    owner = {p: o for o in _several(optimizers) for group in o.param_groups for p in group["params"]}
    for full, array in arrays.items():
        name = _name(full)
        if name not in named:
            raise ValueError(f"the checkpoint has {full}, but the model no {name}: it belongs to another model")
        if full == name and tuple(array.shape) != tuple(named[name].shape):
            shapes = f"{tuple(array.shape)}, but the model's {tuple(named[name].shape)}"
            raise ValueError(f"the checkpoint's {name} has shape {shapes}: it belongs to another model")
    missing = sorted(named.keys() - arrays.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {missing}: it belongs to another model")
    for full, array in arrays.items():
        p, value = named[_name(full)], torch.as_tensor(array)
        if full == _name(full):
            p.copy_(placed(value, p, None))
        elif p in owner:
            key = full.split(".", 2)[1]
            owner[p].state[p][key] = _state(value.clone(), key, p, owner[p])


def whole(named: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The NumPy arrays of tensors of any placement: all ranks call it, and all get all."""
    found = {}
    for name, value in named.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = value.cpu().numpy()
    return found


def _state(value: Tensor, key: str, p: Tensor, optimizer: Any) -> Tensor:
    if key == "step" or value.shape != p.shape:  # torch's own optimizers count steps on the CPU
        return value
    dtype = p.dtype if key == "remainder" else torch.promote_types(p.dtype, torch.float32)
    return placed(value.to(dtype), p, optimizer.place(p) if hasattr(optimizer, "place") else None)


def _named(params: Any) -> dict[str, Any]:
    return dict(params.named_parameters() if hasattr(params, "named_parameters") else params)


def _several(optimizers: Any) -> Iterable[Any]:
    return optimizers if isinstance(optimizers, list | tuple) else [optimizers]


def _name(full: str) -> str:
    """The parameter that a saved array belongs to."""
    return full.split(".", 2)[2] if full.startswith("optimizer.") else full
