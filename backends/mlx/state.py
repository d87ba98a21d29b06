"""What MLX's Zeta keeps for each parameter, how it is rounded and checked: as torch's state.py, whose keys it has.

`exp_avg` and `exp_avg_sq` are float32 or better; AdamW's parameters have a `step` of their own, because one may come
later than the others. A parameter in half precision has a `remainder`, what rounding took off it (compensated
summation, Kahan 1965): the two together hold twice the digits for two bytes an entry.
"""

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten as _tree_flatten

from zeta import storage
from zeta.core import Keeps
from zeta.routing.layout import Route
from zeta.storage import writers

VERSION = "zeta_version_1"  # a key, because its value could not be read while `mx.compile` traces
State = dict[str, mx.array]


def tree_flatten(tree: Any) -> list[tuple[str, Any]]:
    """[(dotted path, array)]: the form of MLX's own that type checkers cannot tell from its other one."""
    return _tree_flatten(tree)  # type: ignore[return-value]


def leaf(state: Any, name: str) -> State | None:
    """The state of the parameter with this dotted path, None where there is none; a key may hold dots itself."""
    if not name:
        return state  # type: ignore[no-any-return]
    if isinstance(state, list | tuple):
        i, _, rest = name.partition(".")
        return leaf(state[int(i)], rest) if i.isdigit() and int(i) < len(state) else None
    there = None
    for end in [i for i, sign in enumerate(f"{name}.") if sign == "."]:
        key = int(name[:end]) if name[:end] not in state and name[:end].isdigit() else name[:end]
        inner = leaf(state[key], name[end + 1 :]) if key in state else None
        if inner:  # a flat tree's state is nested once it has been saved: what is filled goes before what is empty
            return inner
        there = there if inner is None else inner
    return there


def keyed(state: Any, parameters: Any) -> Any:
    """The state with integer keys wherever the parameters have them: once saved, MLX makes a list of such a dict."""
    if isinstance(parameters, dict) and isinstance(state, list):
        state = {key: one for key, one in enumerate(state) if key in parameters}
    pairs = parameters.items() if isinstance(parameters, dict) else enumerate(parameters)
    for key, child in pairs if isinstance(parameters, dict | list) else ():
        if key in state if isinstance(state, dict) else key < len(state):
            state[key] = keyed(state[key], child)
    return state


def is_floating(p: mx.array) -> bool:
    """Whether it is a parameter to move: the packed weights of a quantised layer are none."""
    return mx.issubdtype(p.dtype, mx.floating)


def wanted(p: mx.array, route: Route, keeps: Keeps) -> dict[str, tuple[int, ...]]:
    """The arrays that this parameter needs, by their shapes; `keeps` is the rule's for the matrices."""
    shape = tuple(p.shape)
    return storage.wanted(keeps, route, shape) | ({"remainder": shape} if p.dtype in (mx.bfloat16, mx.float16) else {})


def prepare(state: State, p: mx.array, route: Route, keeps: Keeps, step: mx.array) -> None:
    """Zeros for what is missing. Where only `step` is, the state is of a form without it: the common one stands in.

    The state of another treatment, Adam's or the rule's, is begun anew.
    """
    needed, wide = wanted(p, route, keeps), wide_dtype(p.dtype)
    if state.keys() - needed.keys() - {"remainder"}:
        for key in state.keys() - {"remainder"}:
            del state[key]
    missing = needed.keys() - state.keys()
    for key in missing:
        state[key] = mx.zeros(needed[key], p.dtype if key == "remainder" else wide)
    if "step" in missing and missing <= {"step", "remainder"}:
        state["step"] = step.astype(wide)
    elif "step" in missing:  # of a rule whose one moment AdamW has, too
        state["exp_avg"] = mx.zeros(p.shape, wide)


def is_unlike(state: State, p: mx.array, route: Route, keeps: Keeps) -> bool:
    """Whether something is missing, or left of another treatment."""
    needed = wanted(p, route, keeps).keys()
    return not needed <= state.keys() <= needed | {"remainder"}


def wide_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """float32 or better."""
    return mx.float64 if dtype == mx.float64 else mx.float32


def widen(p: mx.array, state: State) -> mx.array:
    """w = p + r, in float32 or better."""
    w = p.astype(wide_dtype(p.dtype))
    return w + state["remainder"] if "remainder" in state else w


def of_width(state: State, w: mx.array) -> State:
    """The state in w's dtype, whatever it was saved in."""
    return {key: x if key == "remainder" else x.astype(w.dtype) for key, x in state.items()}


def round_back(w: mx.array, p: mx.array, after: State) -> tuple[mx.array, State]:
    """round(w) in p's dtype, and the state `after` with the remainder round(w - p), where w is wider."""
    new = w.astype(p.dtype)
    return new, after if p.dtype == w.dtype else after | {"remainder": (w - new).astype(p.dtype)}


def check_state(new: Any, old: Any, keeps: Keeps, version: str) -> None:
    """Raises ValueError where the state is another optimizer's, of another version, or shaped unlike what is there."""
    if not isinstance(new, dict) or "step" not in new:
        raise ValueError(f"an optimizer's state is a dict with a step, but this is {str(new)[:60]}")
    before, after = dict(tree_flatten(old)), dict(tree_flatten(new))
    for name in new:
        if name.startswith("zeta_version_") and name != version:
            raise ValueError(_other(name, version))
    for name, value in after.items():
        param, _, key = name.rpartition(".")
        if param and key not in {"exp_avg", "exp_avg_sq", "step", "remainder", *keeps}:
            writer = writers(other.removeprefix(f"{param}.") for other in after if other.startswith(f"{param}."))
            raise ValueError(
                f"the state of {param} was written by {writer}, not by this {_writer(version)}: start anew"
            )
        if name in before and not isinstance(value, mx.array):
            raise ValueError(f"the state's {name} is {type(value).__name__}, but must be an mx.array: convert it")
        if name in before and value.shape != before[name].shape:
            raise ValueError(
                f"the state's {name} has shape {value.shape}, but its parameter {before[name].shape}: "
                "it belongs to another model"
            )


def _writer(version: str) -> str:
    """The class that a version's key names."""
    return (*version.split("_", 3), "Zeta")[3]


def _other(version: str, own: str) -> str:
    """Why a state with the one key is not for an optimizer with the other."""
    if version.split("_")[2] != own.split("_")[2]:
        return f"the state is {version}, this zeta reads {own}: install the zeta that wrote it"
    writer = _writer(version)
    return f"the state was written by {writer}, not by {_writer(own)}: load it into {writer}, or start anew"


def check_rate(rate: Any, name: str) -> None:
    """Raises TypeError for what is no rate: parameters, above all, which torch's optimizers take first."""
    if isinstance(rate, dict | list) or getattr(rate, "size", 1) != 1:  # a model is a dict, too
        raise TypeError(
            f"learning_rate is {type(rate).__name__}, but must be one number or a schedule: "
            f"optimizer = {name}(learning_rate=1e-3), then optimizer.update(model, gradients)"
        )


def dtype_of(given: Any) -> mx.Dtype | None:
    """The dtype of Newton-Schulz's products, which a configuration file gives by its name. Raises ValueError."""
    found = getattr(mx, given, given) if isinstance(given, str) else given
    if found is not None and not (isinstance(found, mx.Dtype) and mx.issubdtype(found, mx.floating)):
        raise ValueError(f"ns_dtype is {given!r}, but must be None or one of float16, bfloat16, float32, float64")
    return found


NOT_TAKEN = {
    "lr": "call it learning_rate",
    "momentum": "it is the first of betas",
    "bias_correction": "AdamW's half always corrects, and the matrices' update has the same size without",
    "model": "give routes=zeta.routes(model), and the model to update",
}


def not_taken(name: str) -> str:
    """Why a keyword is none of an optimizer's, for its TypeError."""
    return f"takes no {name}: {NOT_TAKEN.get(name, 'leave it out')}"


def check_routes(routes: Any) -> None:
    """Raises TypeError for what is no result of `zeta.routes`: a model, above all."""
    if routes and not (isinstance(routes, Mapping) and all(isinstance(r, Route) for r in routes.values())):
        raise TypeError(f"routes is {type(routes).__name__}, but must be what zeta.routes(model) gives: call that")


def check_step(grads: dict[str, mx.array], params: dict[str, mx.array]) -> None:
    """Raises TypeError for parameters that no step can move, ValueError for gradients that are not theirs."""
    for name, grad in grads.items():
        if name not in params:
            known = ", ".join(sorted(params)[:3])
            raise ValueError(f"there is a gradient of {name}, but no such parameter: there are {known}, ...")
        p = params[name]
        if not is_floating(p):
            raise TypeError(f"{name} is {p.dtype}, but must be real floating-point numbers: freeze or convert it")
        if grad.shape != p.shape:
            raise ValueError(f"the gradient of {name} has shape {grad.shape}, but must have its parameter's, {p.shape}")


def check_known(state: Any, params: Collection[str]) -> None:
    """Raises ValueError where a state that was loaded knows parameters, but none of these."""
    if (held := _held(state)) and not held & set(params):
        some, others = ", ".join(sorted(held)[:3]), ", ".join(sorted(params)[:3])
        raise ValueError(f"the state is of {some}, the parameters are {others}: it belongs to another model")


def _held(state: Any) -> set[str]:
    """The parameters that a state knows."""
    return {name.rpartition(".")[0] for name, _ in tree_flatten(state)} - {"", "zeta_report"}


def check_names(state: Any, params: dict[str, mx.array], grads: dict[str, mx.array]) -> None:
    """Raises ValueError where the state knows parameters that are not there, and not those that are to move."""
    held = _held(state)
    strange = sorted(held - params.keys())
    if strange and grads.keys() - held:  # else the rest of the model is frozen
        raise ValueError(f"the state is of {', '.join(strange[:3])}, no parameters here: it belongs to another model")


def check_shapes(states: dict[str, State], params: dict[str, mx.array], routes: dict[str, Route], keeps: Keeps) -> None:
    for name, state in states.items():
        for key, shape in wanted(params[name], routes[name], keeps).items():
            if tuple(state[key].shape) != shape:
                raise ValueError(
                    f"{key} of {name} has shape {state[key].shape}, but the parameter {params[name].shape}, "
                    f"which needs {shape}: it belongs to another model"
                )
