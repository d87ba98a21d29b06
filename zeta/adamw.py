"""AdamW (arXiv 1711.05101) for all that is not a matrix, in the form of `zeta.core`: `init` and `update`."""

from array_api_compat import array_namespace

from zeta import core
from zeta.core import Array, Hyper, State, check_shapes


def init(param: Array) -> State:
    """Zero moments for param (any shape), float32 or better, and a 0-d step count."""
    state = core.init(param)
    xp = array_namespace(param)
    return state | {"step": xp.sum(xp.zeros_like(state["exp_avg"]))}  # a 0-d zero on param's device in every library


def update(grad: Array, state: State, param: Array, hyper: Hyper) -> tuple[Array, State]:
    """(param, state) after one step. The arguments are left as they were. Raises ValueError where shapes do not fit."""
    shape = tuple(param.shape)
    check_shapes(param, {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}, grad, state)
    xp = array_namespace(param)
    b1, b2 = hyper.betas

    t = state["step"] + 1
    g = xp.astype(grad, state["exp_avg"].dtype)
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    u = (m / (1 - b1**t)) / (xp.sqrt(v / (1 - b2**t)) + hyper.eps)
    w = (1 - hyper.lr * hyper.weight_decay) * xp.astype(param, u.dtype) - hyper.lr * u
    return xp.astype(w, param.dtype), {"exp_avg": m, "exp_avg_sq": v, "step": t}
