"""What torch's Zeta keeps for each parameter, and how it is rounded, saved and loaded.

`exp_avg` and `exp_avg_sq` are float32 or better; AdamW's parameters have a `step`. A parameter in half precision also
has a `remainder`, in its own dtype: what rounding took off the weight in the last step (compensated summation, Kahan
1965). The two together hold twice the digits for two bytes an entry. We chose that over stochastic rounding because it
is the same on every library, needs no random state to resume, and over float32 copies because it is half the memory
and notices when somebody else writes the weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zeta.layout import Route

VERSION = 1  # of the state's form


def prepare(state: dict[str, Tensor], p: Tensor, route: Route) -> None:
    """Zeros for whatever the parameter lacks; what it has is moved to its device."""
    wide = torch.promote_types(p.dtype, torch.float32)
    if any(value.device != p.device for value in state.values()):
        state.update({name: value.to(p.device) for name, value in state.items()})
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros(p.shape, dtype=wide, device=p.device)
    if route.treatment == "adamw" and "step" not in state:
        state["step"] = torch.zeros((), device=p.device)
    if p.dtype == wide:
        state.pop("remainder", None)  # of a parameter that was narrower before
    elif "remainder" not in state or state["remainder"].dtype != p.dtype:
        state["remainder"] = torch.zeros_like(p)


def widen(params: list[Any], remainders: list[Tensor] | None = None) -> list[Tensor]:
    """float32 copies, with the remainders added: w = p + r."""
    wide = [torch.empty_like(p, dtype=torch.float32) for p in params]
    torch._foreach_copy_(wide, params)
    if remainders:
        torch._foreach_add_(wide, widen(remainders))
    return wide


def round_back(params: list[Tensor], remainders: list[Tensor], wide: list[Tensor]) -> None:
    """p = round(w), r = round(w - p)."""
    torch._foreach_copy_(params, wide)
    torch._foreach_sub_(wide, widen(params))
    torch._foreach_copy_(remainders, wide)


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raises ValueError where the state is not Zeta's, of another version, or of other parameters."""
    for group in state_dict["param_groups"]:
        if "version" not in group or "routes" not in group:
            raise ValueError(f"this is another optimizer's state, with groups of {sorted(group)}: start anew")
        if group["version"] != VERSION:
            raise ValueError(f"the state has version {group['version']}, this zeta reads {VERSION}: install that")
    for p, saved, route in _pairs(groups, state_dict):
        keys = {"exp_avg", "exp_avg_sq"} | ({"step"} if Route(*route).treatment == "adamw" else set())
        if keys - saved.keys() or saved.keys() - keys - {"remainder"}:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} needs {sorted(keys)}, but the state {sorted(saved)}"
            )
        for name in ("exp_avg", "exp_avg_sq"):
            if saved[name].shape != p.shape:
                shapes = f"{tuple(saved[name].shape)}, but its parameter {tuple(p.shape)}"
                raise ValueError(f"the state's {name} has shape {shapes}: it belongs to another model")
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        if list(map(tuple, saved["routes"])) != list(map(tuple, group["routes"])):
            raise ValueError("the state is of other matrices: build the optimizer with the routes it was saved with")


def load_values(state: dict[Any, Any], groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """The saved values in their own precision: torch 2.13 casts them to that of the parameter, and may share them."""
    for p, saved, _ in _pairs(groups, state_dict):
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, value in saved.items():
            dtype = wide if name in ("exp_avg", "exp_avg_sq") else value.dtype
            state[p][name] = value.to(device=p.device, dtype=dtype, copy=True)


def _pairs(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
    """(parameter, saved state, route) for all that have state."""
    saved = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
        raise ValueError(
            f"the state is of groups with {[len(g['params']) for g in saved]} parameters, but this optimizer has "
            f"{[len(g['params']) for g in groups]}: build it from the same model"
        )
    for group, other in zip(groups, saved, strict=True):
        for p, index, route in zip(group["params"], other["params"], group["routes"], strict=True):
            if index in state_dict["state"]:
                yield p, state_dict["state"][index], route
