"""What torch's Zeta keeps for each parameter, and how it is rounded, saved and loaded.

`exp_avg` and `exp_avg_sq` are float32 or better; AdamW's parameters have a `step`. A parameter in half precision also
has a `remainder`, in its own dtype: what rounding took off the weight in the last step (compensated summation, Kahan
1965). The two together hold twice the digits for two bytes an entry. We chose that over stochastic rounding because it
is the same on every library, needs no random state to resume, and over float32 copies because it is half the memory
and notices when somebody else writes the weight.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zeta.core import Keeps
from zeta.routing.layout import Route
from zeta.storage import lacked, wanted, writers

from .placement import Place, check_placement, mine, placed, zeros

Places = Callable[[Tensor], Place | None]
VERSION = 1  # of the state's form


def prepare(state: dict[str, Tensor], p: Tensor, route: Route, keeps: Keeps, place: Place | None = None) -> None:
    """Zeros for whatever the parameter lacks; what it has follows it to another device or dtype."""
    wide = torch.promote_types(p.dtype, torch.float32)
    for name, value in state.items():
        dtype = value.dtype if name in ("step", "remainder") else wide
        if value.device != p.device or value.dtype != dtype:
            state[name] = value.to(p.device, dtype)
    if "remainder" in state and state["remainder"].dtype != p.dtype:  # of a parameter that was narrower before
        mine(p, place).add_(mine(state.pop("remainder"), place).to(p.dtype))
    for name, shape in wanted(keeps, route, tuple(p.shape)).items():
        if name in state:
            continue
        if name != "step" and shape == p.shape:
            state[name] = zeros(p, wide, place)
        else:
            state[name] = torch.zeros(shape, dtype=torch.float32 if name == "step" else wide, device=p.device)
    if p.dtype != wide and "remainder" not in state:
        state["remainder"] = zeros(p, p.dtype, place)


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


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any], keeps: Keeps, place: Places) -> None:
    """Raises ValueError where the state is another optimizer's, of another version, or of other parameters."""
    own = next((group.get("rule", "Zeta") for group in groups), "Zeta")
    for group in state_dict["param_groups"]:
        if "version" not in group or "routes" not in group:
            kept: dict[str, Any] = next(iter(state_dict["state"].values()), {})
            raise ValueError(
                f"the state was written by {writers(kept)}, not by this {own}: load it there or start anew"
            )
        if group["version"] != VERSION:
            version = f"{group['version']}, this zeta reads {VERSION}"
            raise ValueError(f"the state has version {version}: install the zeta that wrote it")
        if (rule := group.get("rule", "Zeta")) != own:
            raise ValueError(f"the state was written by {rule}, not by {own}: load it into {rule}, or start anew")
    for p, saved, route in _pairs(groups, state_dict):
        shapes = wanted(keeps, Route(*route), tuple(p.shape))
        shapes = {key: shape for key, shape in shapes.items() if key not in lacked(saved)}
        if shapes.keys() - saved.keys() or saved.keys() - shapes.keys() - {"remainder"}:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} needs {sorted(shapes)}, but the state has {sorted(saved)}: "
                "build the optimizer with the routes it was saved with"
            )
        for name, shape in (shapes | {"remainder": tuple(p.shape)} if "remainder" in saved else shapes).items():
            if tuple(saved[name].shape) != shape:
                raise ValueError(
                    f"the state's {name} has shape {tuple(saved[name].shape)}, but a parameter of shape "
                    f"{tuple(p.shape)} needs {shape}: it belongs to another model"
                )
            check_placement(saved[name], p, place(p))
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        if [_form(r) for r in saved["routes"]] != [_form(r) for r in group["routes"]]:
            raise ValueError("the state is of other matrices: build the optimizer with the routes it was saved with")


def _form(route: Any) -> Route:
    """A route without its texts."""
    return Route(*plain(route))._replace(reason="", doubt="")


def plain(value: Any) -> Any:
    """Nested tuples again of what torch.distributed.checkpoint, torch 2.13, makes lists and () None of."""
    return tuple(() if v is None else plain(v) for v in value) if isinstance(value, list | tuple) else value


def load_values(
    groups: list[dict[str, Any]], state_dict: dict[str, Any], place: Places
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """(parameter, copies of its saved values), moments float32 or better, and of whole ones each rank's own part."""
    for p, saved, _ in _pairs(groups, state_dict):
        wide, values = torch.promote_types(p.dtype, torch.float32), {}
        for name, value in saved.items():
            dtype = value.dtype if name in ("step", "remainder") else wide
            value = value.detach().to(device=p.device, dtype=dtype, copy=True)
            entire = name != "step" and value.shape == p.shape and not hasattr(value, "device_mesh")
            values[name] = placed(value, p, place(p)) if entire else value
        yield p, values
    known = {index for group in state_dict["param_groups"] for index in group["params"]}
    yield from ((key, value) for key, value in state_dict["state"].items() if key not in known)


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
                yield p, {key: as_tensor(value, key) for key, value in state_dict["state"][index].items()}, route


def as_tensor(value: Any, key: str) -> Tensor:
    """The saved value as this zeta keeps it: old torch and other tools count steps in Python's numbers."""
    x = torch.as_tensor(value)
    return x if key != "step" or x.is_floating_point() else x.to(torch.float32)
