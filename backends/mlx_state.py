"""What MLX's Zeta keeps for each parameter, and how it is rounded and checked: as `torch_state.py`, whose keys it has.

`exp_avg` and `exp_avg_sq` are float32; AdamW's parameters have a `step` of their own, because one may come later than
the others. A parameter in half precision has a `remainder`, what rounding took off it (compensated summation, Kahan
1965): the two together hold twice the digits for two bytes an entry.
"""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten as _tree_flatten

from zeta.layout import Route
from zeta.stages import Keeps
from zeta.storage import stored

VERSION = "zeta_version_1"  # a key, because its value could not be read while `mx.compile` traces
State = dict[str, mx.array]


def tree_flatten(tree: Any) -> list[tuple[str, Any]]:
    """[(dotted path, array)]: the form of MLX's own that type checkers cannot tell from its other one."""
    return _tree_flatten(tree)  # type: ignore[return-value]


def leaf(state: Any, name: str) -> State:
    """The state of the parameter with this dotted path; empty where there is none."""
    for part in name.split("."):
        if isinstance(state, list | tuple):
            state = state[int(part)] if int(part) < len(state) else {}
        else:
            state = state.get(part, {})
    return state  # type: ignore[no-any-return]


def wanted(p: mx.array, route: Route, keeps: Keeps) -> dict[str, tuple[int, ...]]:
    """The arrays that this parameter needs, by their shapes; `keeps` is the rule's for the matrices."""
    shape = tuple(p.shape)
    if not mx.issubdtype(p.dtype, mx.floating):
        return {}  # packed weights of a quantised layer
    adamw = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    moments = adamw if route.treatment == "adamw" else stored(keeps, route, shape)
    return moments | ({"remainder": shape} if p.dtype in (mx.bfloat16, mx.float16) else {})


def prepare(state: State, p: mx.array, route: Route, keeps: Keeps, step: mx.array) -> None:
    """Zeros for what is missing. Where only `step` is, the state is of a form without it: the common one stands in."""
    missing = {key: shape for key, shape in wanted(p, route, keeps).items() if key not in state}
    for key, shape in missing.items():
        wide = mx.float64 if p.dtype == mx.float64 else mx.float32
        state[key] = mx.zeros(shape, p.dtype if key == "remainder" else wide)
    if "step" in missing:
        state["step"] = mx.array(0.0) if "exp_avg" in missing else step.astype(mx.float32)


def widen(p: mx.array, state: State) -> mx.array:
    """w = p + r, in float32 or better."""
    w = p.astype(state["exp_avg"].dtype)
    return w + state["remainder"] if p.dtype != w.dtype and "remainder" in state else w


def round_back(w: mx.array, p: mx.array, state: State, after: State) -> mx.array:
    """round(w) in p's dtype; the state becomes `after` and r = round(w - p)."""
    state.update(after)
    new = w.astype(p.dtype)
    if "remainder" in state:
        state["remainder"] = (w - new).astype(p.dtype)
    return new


def check_state(new: Any, old: Any, keeps: Keeps, version: str) -> None:
    """Raises ValueError where the state is another optimizer's, of another version, or shaped unlike what is there."""
    if not isinstance(new, dict) or "step" not in new:
        raise ValueError(f"an optimizer's state is a dict with a step, but this is {str(new)[:60]}")
    before = dict(tree_flatten(old))
    for name, value in tree_flatten(new):
        key = name.rpartition(".")[2]
        if name.startswith("zeta_version_") and name != version:
            raise ValueError(f"the state is {name}, this optimizer reads {version}: use the one that wrote it")
        if "." in name and key not in {"exp_avg", "exp_avg_sq", "step", "remainder", *keeps}:
            raise ValueError(f"the state has {name}, which is not this optimizer's: it belongs to another optimizer")
        if name in before and value.shape != before[name].shape:
            raise ValueError(
                f"the state's {name} has shape {value.shape}, but its parameter {before[name].shape}: "
                "it belongs to another model"
            )


def check_shapes(states: dict[str, State], params: dict[str, mx.array], routes: dict[str, Route], keeps: Keeps) -> None:
    for name, state in states.items():
        for key, shape in wanted(params[name], routes[name], keeps).items():
            if tuple(state[key].shape) != shape:
                raise ValueError(
                    f"{key} of {name} has shape {state[key].shape}, but the parameter {params[name].shape}, "
                    f"which needs {shape}: it belongs to another model"
                )
