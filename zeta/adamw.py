"""AdamW (arXiv 1711.05101) for all that is not a matrix, in the form of `zeta.core`: `init` and `update`."""

from array_api_compat import array_namespace

from zeta import core
from zeta import stages as plain
from zeta.core import Array, Hyper, Stages, State, Step, check_shapes


def local(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """(u, state): Adam's step, entry by entry, with both moments corrected for their start at zero."""
    b1, b2 = hyper.betas
    t = state["step"] + 1
    m = stages.ema(state["exp_avg"], g, b1)
    v = stages.ema_sq(state["exp_avg_sq"], g, b2)
    u = stages.whiten(m / (1 - b1**t), v / (1 - b2**t), hyper.eps)
    return u, {"exp_avg": m, "exp_avg_sq": v, "step": t}


def init(param: Array) -> State:
    """Zero moments for param (any shape), float32 or better, and a 0-d step count."""
    xp = array_namespace(param)
    m, v = (xp.zeros_like(param, dtype=core.wide(param)) for _ in range(2))
    return {"exp_avg": m, "exp_avg_sq": v, "step": xp.sum(xp.zeros_like(m))}  # 0-d, on param's device in every library


def update(grad: Array, state: State, param: Array, hyper: Hyper) -> tuple[Array, State]:
    """(param, state) after one step. The arguments are left as they were. Raises ValueError where shapes do not fit."""
    shape = tuple(param.shape)
    check_shapes(param, {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}, grad, state)
    xp = array_namespace(param)
    u, state = local(xp.astype(grad, state["exp_avg"].dtype), state, hyper, plain)
    w = plain.apply(xp.astype(param, u.dtype), u, hyper.lr, hyper.weight_decay)
    return xp.astype(w, param.dtype), state
