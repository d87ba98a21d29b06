"""The optimizers beside Zeta that orthogonalise, or take signs: each is its paper's formula, between moments and scale.

In the two halves of `zeta.core.Rule`: w <- (1 - lr weight_decay) w - lr u; b1, b2 = hyper.betas. Where a docstring says
that u has an RMS of 0.2, AdamW's lr is a safe start, and the best is higher: how much it was on our three small tasks
(bench/README.md: a language model, one with experts, images of digits) stands there, too.
"""

from collections.abc import Callable
from inspect import cleandoc, signature
from math import ceil, inf
from typing import Any

from array_api_compat import array_namespace

from zeta import core
from zeta.core import Array, Hyper, Keeps, Orthogonalize, Rule, Stages, State, Step, Sums
from zeta.stages import Shape, entries, match_rms, nonzero_count, one, per_col, per_row

zeta = core.zeta
MOMENTUM: Keeps = {"exp_avg": entries}
MOMENTS = zeta.keeps


def rule(
    local: Callable[..., Step],
    keeps: Keeps,
    carries: Keeps | None = None,
    sums: Sums | None = None,
    orthogonalizes: bool = True,
    defaults: Hyper = zeta.defaults,
) -> Callable[[Callable[..., Step]], Rule]:
    """Makes a rule of its second half: a function (x, sums, state, hyper, orthogonalize, stages) -> (u, state).

    `keeps` is the state of `local`, `carries` that of the function.
    """
    carries = carries or {}
    return lambda whole: Rule(local, whole, keeps | carries, tuple(carries), sums or {}, orthogonalizes, defaults)


def uncut(orthogonalizes: bool = True, **keeps: Shape) -> Callable[[Callable[..., Step]], Rule]:
    """Makes a rule of one function (g, state, hyper, orthogonalize) -> (u, state), which is not cut into halves.

    It is exact everywhere, too, but over ranks the gradient and all of the state travel to a matrix's owner and back.
    """

    def make(update: Callable[..., Step]) -> Rule:
        def whole(g: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, _: Stages) -> Step:
            return update(g, state, hyper, orthogonalize)

        whole.__doc__ = update.__doc__
        return Rule(as_it_is, whole, keeps, tuple(keeps), {}, orthogonalizes)

    return make


def complete(kind: Any, rule: Rule | Callable[..., Rule] | None, lr: str) -> None:
    """Gives an optimizer class its rule, or what makes one from settings; and one that has a rule its docstring.

    `lr` is what its library calls the rate.
    """
    if isinstance(rule, Rule):
        kind.rule = rule
    elif rule:
        kind.make, kind.rule = staticmethod(rule), rule()
    if "rule" in vars(kind):
        kind.__doc__ = described(kind, lr)


def described(kind: type, lr: str) -> str:
    """The docstring of an optimizer class: its own if it has one, its rule's, and what it starts from."""
    rule, make = kind.__dict__["rule"], kind.__dict__.get("make")
    about = cleandoc((make.__func__ if make else rule.whole).__doc__ or "").replace("lr ", f"{lr} ")
    h = rule.defaults
    starts = {lr: h.lr, "betas": h.betas, "eps": h.eps, "weight_decay": h.weight_decay}
    starts |= {p.name: p.default for p in signature(make.__func__).parameters.values()} if make else {}
    call = f"{kind.__name__}({', '.join(f'{name}={value}' for name, value in starts.items())})"
    step = f"A step is w = (1 - {lr} weight_decay) w - {lr} u, for matrices. It starts from\n{call}."
    rest = f"{step}\nAdamW's half uses both betas and eps. All else is Zeta's: help(Zeta)."
    return "\n\n".join([*([cleandoc(kind.__doc__)] if kind.__doc__ else []), about, rest])


def as_it_is(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """x = g."""
    return g, {}


def averaged(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """x = m, the plain momentum."""
    m = stages.ema(state["exp_avg"], g, hyper.betas[0])
    return m, {"exp_avg": m}


def averaged_signs(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """x = sign m."""
    m = stages.ema(state["exp_avg"], g, hyper.betas[0])
    return stages.sign(m), {"exp_avg": m}


def ahead(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """x = b1 m + (1 - b1) g, Nesterov momentum."""
    b1, _ = hyper.betas
    m = stages.ema(state["exp_avg"], g, b1)
    return stages.nesterov(m, g, b1), {"exp_avg": m}


def lions_mixture(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """x = b1 m + (1 - b1) g, where b2 is m's own beta."""
    b1, b2 = hyper.betas
    m = stages.ema(state["exp_avg"], g, b2)
    return stages.nesterov(m, g, b1), {"exp_avg": m}


@rule(averaged_signs, MOMENTUM, orthogonalizes=False)
def signum(x: Array, sums: State, state: State, hyper: Hyper, _: Orthogonalize, stages: Stages) -> Step:
    """Signum (arXiv 1802.04434): u = 0.2 sign m, m the plain momentum of b1; b2 and eps do nothing.

    Every entry moves by 0.2 lr, so that the paper's lr is a fifth of ours. Our best lr was twice AdamW's.
    """
    return 0.2 * x, {}


@rule(ahead, MOMENTUM)
def muon(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """Muon (Keller Jordan, 2024): Newton-Schulz of the Nesterov momentum of b1; b2 and eps do nothing.

    u has an RMS of 0.2 (scaled as in arXiv 2502.16982). Our best lr was 8, 8 and 2 times AdamW's.
    """
    return stages.match_rms(orthogonalize(x)), {}


@rule(averaged_signs, MOMENTUM, {"update_sq": entries})
def adamuon(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """AdaMuon (arXiv 2507.11005): Newton-Schulz of sign m, divided by the root of a variance v of its entries.

    m is the plain momentum of b1, v of b2; the paper takes b1 = b2. u has an RMS of 0.2. Our best lr was 8, 8 and 4
    times AdamW's.
    """
    u = orthogonalize(x)
    v = stages.ema_sq(state["update_sq"], u, hyper.betas[1])
    return stages.to_rms(stages.whiten(u, v, hyper.eps)), {"update_sq": v}


@rule(averaged, MOMENTUM, {"row_sq": per_row})
def normuon(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """NorMuon (arXiv 2510.05491): Newton-Schulz of m, divided by the root of a variance of each of its rows.

    m is the plain momentum of b1, the variance of b2. u has an RMS of 0.2. Our best lr was 4, 8 and 4 times AdamW's.
    """
    u = orthogonalize(x)
    r = stages.ema(state["row_sq"], stages.mean_sq(u, -1), hyper.betas[1])
    return stages.to_rms(stages.whiten(u, r, hyper.eps)), {"row_sq": r}


# Zeta's two stages in the other order (arXiv 2510.25000): AdaMuon without the sign.
whiten_after = adamuon._replace(local=averaged)
# Variance on both sides of Newton-Schulz: Zeta's before, AdaMuon's after. No paper's.
whiten_both = adamuon._replace(local=core.local, keeps=MOMENTS | adamuon.keeps)

LINES: Keeps = {"row_sq": per_row, "col_sq": per_col}
SQUARES: Sums = {"row_sq": ("squares", per_row), "col_sq": ("squares", per_col)}  # of the gradient


@rule(averaged, MOMENTUM, LINES, SQUARES)
def rank1_before(
    x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages
) -> Step:
    """Muon^2-F (arXiv 2604.09967): Zeta with a rank-1 variance. Momentum and scale are Zeta's, its listing unread."""
    (rows, cols), (_, b2) = x.shape[-2:], hyper.betas
    r = stages.ema(state["row_sq"], sums["row_sq"] / cols, b2)
    c = stages.ema(state["col_sq"], sums["col_sq"] / rows, b2)
    u = orthogonalize(stages.whiten(x, stages.rank_one(r, c), hyper.eps))
    return stages.to_rms(u), {"row_sq": r, "col_sq": c}


@rule(averaged, MOMENTUM, LINES)
def rank1_after(
    x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages
) -> Step:
    """The whitening study's Muon with a rank-1 variance (arXiv 2510.25000)."""
    u, b2 = orthogonalize(x), hyper.betas[1]
    r = stages.ema(state["row_sq"], stages.mean_sq(u, -1), b2)
    c = stages.ema(state["col_sq"], stages.mean_sq(u, -2), b2)
    return stages.to_rms(stages.whiten(u, stages.rank_one(r, c), hyper.eps)), {"row_sq": r, "col_sq": c}


@rule(averaged, MOMENTUM, LINES | {"update_row_sq": per_row, "update_col_sq": per_col}, SQUARES)
def rank1_both(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """A rank-1 variance on both sides of Newton-Schulz. No paper's."""
    (rows, cols), (_, b2) = x.shape[-2:], hyper.betas
    r = stages.ema(state["row_sq"], sums["row_sq"] / cols, b2)
    c = stages.ema(state["col_sq"], sums["col_sq"] / rows, b2)
    u = orthogonalize(stages.whiten(x, stages.rank_one(r, c), hyper.eps))
    p = stages.ema(state["update_row_sq"], stages.mean_sq(u, -1), b2)
    q = stages.ema(state["update_col_sq"], stages.mean_sq(u, -2), b2)
    new = {"row_sq": r, "col_sq": c, "update_row_sq": p, "update_col_sq": q}
    return stages.to_rms(stages.whiten(u, stages.rank_one(p, q), hyper.eps)), new


@rule(
    ahead,
    MOMENTUM,
    sums={"rows": ("nonzero_count", per_row), "cols": ("nonzero_count", per_col)},
    defaults=Hyper(lr=1.2e-2, betas=(0.8, 0.99)),
)
def eta(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """Eta: Muon on a Nesterov momentum whose rows and columns are of one size, in place of Zeta's variance.

    Zeta's V makes an element-wise quotient, which changes the spectrum itself; this is a two-sided diagonal scaling, of
    the kind that MuonEq (arXiv 2603.28254) has. Ours are its order, and that lines without a gradient do not move. The
    scale is Muon's: brought to Zeta's, a matrix whose gradient has a low rank would move further in its few directions.
    b1 is the momentum's; b2 and eps do nothing. u has an RMS of 0.2. Our best lr was 8, 8 and 2 times AdamW's, with b1
    of 0.6 to 0.8 in runs of 300 steps; longer ones want more momentum at a lower rate.
    """
    return stages.match_rms(orthogonalize(stages.equilibrate(x, sums["rows"], sums["cols"]))), {}


@rule(lions_mixture, MOMENTUM)
def olion(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """OLion (arXiv 2602.01105): the signs of Newton-Schulz of b1 m + (1 - b1) g, where b2 is the momentum m's own beta.

    Every entry moves by 0.2 lr; eps does nothing. Our best lr was 8 times AdamW's on the language model.
    """
    return stages.to_rms(stages.sign(orthogonalize(x))), {}


def adago(gamma: float = 1.0, floor: float = 0.01) -> Rule:
    """AdaGO (arXiv 2509.02981): a matrix moves by max(floor, min(|g|, gamma) / v) of Muon's step.

    v^2 starts at 1 and adds min(|g|, gamma)^2 in each step. The paper's smallest step is a number by itself; ours is a
    share of lr (and 0.01 our choice), so that a schedule may reach zero. b1 is the plain momentum's; b2 and eps do
    nothing. Steps shrink as v grows: our best lr was 32 times AdamW's on the language model.
    """
    if not (gamma > 0 and floor >= 0):
        raise ValueError(f"gamma is {gamma!r} and floor {floor!r}, but must be > 0 and >= 0")

    @rule(averaged, MOMENTUM, {"norm_sq": one}, {"norm_sq": ("squares", one)})
    def adago(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
        xp, norm = array_namespace(x), sums["norm_sq"] ** 0.5
        norm = xp.minimum(norm, gamma * xp.ones_like(norm))
        v = state["norm_sq"] + norm * norm
        step = xp.maximum(norm / xp.sqrt(1 + v), floor * xp.ones_like(v))
        return step * stages.match_rms(orthogonalize(x)), {"norm_sq": v}

    return adago


def dion2(fraction: float = 0.25) -> Rule:
    """Dion2 (arXiv 2512.16928): only the `fraction` of rows (columns, if those are fewer) of the largest L1 norm moves.

    Their RMS is 0.2. The momentum sums gradients up; what has moved is multiplied by b1, the rest waits; b2 and eps do
    nothing. Our best lr was 8 times AdamW's on the language model.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}, but must be above 0 and at most 1")

    @uncut(exp_avg=entries)
    def dion2(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
        xp, tall = array_namespace(g), g.shape[-2] > g.shape[-1]
        m = state["exp_avg"] + g
        m = m.mT if tall else m
        size = xp.mean(xp.abs(m), axis=-1, keepdims=True)
        order = xp.argsort(-xp.where(size == size, size, inf * xp.ones_like(size)), axis=-2)  # NaN is shown, not hidden
        rank = xp.argsort(order, axis=-2)
        k = ceil(fraction * m.shape[-2])
        u = orthogonalize(xp.take_along_axis(m, order, axis=-2)[..., :k, :])
        u = xp.take_along_axis(xp.concat([u, xp.zeros_like(m[..., k:, :])], axis=-2), rank, axis=-2)
        moved = (rank < k) & (nonzero_count(g, (-2, -1)) > 0)
        m = xp.where(moved, hyper.betas[0] * m, m)
        return match_rms(u.mT if tall else u), {"exp_avg": m.mT if tall else m}

    return dion2


# What `zeta parity` takes ten steps of, by the name of its class: those whose u depends on the gradient without leaps,
# as signs and choices of rows do not.
COMPARED = {"Eta": eta, "Muon": muon, "NorMuon": normuon, "AdaMuon": adamuon, "Zeta": zeta}
