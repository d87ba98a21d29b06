"""The optimizers beside Zeta that orthogonalise, or take signs: each is its paper's formula, between moments and scale.

`u, state = ...` as `zeta.stages.keeps` takes them: w <- (1 - lr weight_decay) w - lr u. Unless a docstring says
otherwise u has an RMS of 0.2, as Zeta's, so that AdamW's lr is a fair start for all; b1, b2 = hyper.betas.
"""

from math import ceil, inf

from array_api_compat import array_namespace

from zeta import core
from zeta.core import Array, Hyper, Orthogonalize, State, frobenius
from zeta.stages import (
    Rule,
    Step,
    ema,
    entries,
    equilibrate,
    keeps,
    match_rms,
    mean_cols,
    mean_rows,
    nesterov,
    one,
    per_col,
    per_row,
    rank_one,
    to_rms,
    whiten,
)

zeta = Rule({"exp_avg": entries, "exp_avg_sq": entries}, core.update)


@keeps(exp_avg=entries)
def signum(g: Array, state: State, hyper: Hyper, _: Orthogonalize) -> Step:
    """Signum (arXiv 1802.04434). Its paper's lr is a fifth of ours: every entry moves by 0.2 lr."""
    m = ema(state["exp_avg"], g, hyper.betas[0])
    return 0.2 * array_namespace(m).sign(m), {"exp_avg": m}


@keeps(exp_avg=entries)
def muon(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """Muon (Keller Jordan, 2024), scaled as in arXiv 2502.16982."""
    b1, _ = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(nesterov(m, g, b1))
    return match_rms(u), {"exp_avg": m}


@keeps(exp_avg=entries, update_sq=entries)
def adamuon(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """AdaMuon (arXiv 2507.11005), whose paper takes b1 = b2."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(array_namespace(m).sign(m))
    v = ema(state["update_sq"], u * u, b2)
    return to_rms(whiten(u, v, hyper.eps)), {"exp_avg": m, "update_sq": v}


@keeps(exp_avg=entries, row_sq=per_row)
def normuon(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """NorMuon (arXiv 2510.05491): a variance for every row, after Newton-Schulz."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(m)
    r = ema(state["row_sq"], mean_rows(u * u), b2)
    return to_rms(whiten(u, r, hyper.eps)), {"exp_avg": m, "row_sq": r}


@keeps(exp_avg=entries, update_sq=entries)
def whiten_after(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """Zeta's two stages in the other order (arXiv 2510.25000): AdaMuon without the sign."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(m)
    v = ema(state["update_sq"], u * u, b2)
    return to_rms(whiten(u, v, hyper.eps)), {"exp_avg": m, "update_sq": v}


@keeps(exp_avg=entries, exp_avg_sq=entries, update_sq=entries)
def whiten_both(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """Variance on both sides of Newton-Schulz: Zeta's before, AdaMuon's after. No paper's."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    v = ema(state["exp_avg_sq"], g * g, b2)
    u = orthogonalize(whiten(m, v, hyper.eps))
    s = ema(state["update_sq"], u * u, b2)
    return to_rms(whiten(u, s, hyper.eps)), {"exp_avg": m, "exp_avg_sq": v, "update_sq": s}


@keeps(exp_avg=entries, row_sq=per_row, col_sq=per_col)
def rank1_before(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """Muon^2-F (arXiv 2604.09967): Zeta with a rank-1 variance. Momentum and scale are Zeta's, its listing unread."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    r = ema(state["row_sq"], mean_rows(g * g), b2)
    c = ema(state["col_sq"], mean_cols(g * g), b2)
    u = orthogonalize(whiten(m, rank_one(r, c), hyper.eps))
    return to_rms(u), {"exp_avg": m, "row_sq": r, "col_sq": c}


muon2_f = rank1_before


@keeps(exp_avg=entries, row_sq=per_row, col_sq=per_col)
def rank1_after(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """The whitening study's Muon with a rank-1 variance (arXiv 2510.25000)."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(m)
    r = ema(state["row_sq"], mean_rows(u * u), b2)
    c = ema(state["col_sq"], mean_cols(u * u), b2)
    return to_rms(whiten(u, rank_one(r, c), hyper.eps)), {"exp_avg": m, "row_sq": r, "col_sq": c}


@keeps(exp_avg=entries, row_sq=per_row, col_sq=per_col, update_row_sq=per_row, update_col_sq=per_col)
def rank1_both(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """A rank-1 variance on both sides of Newton-Schulz. No paper's."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b1)
    r, c = ema(state["row_sq"], mean_rows(g * g), b2), ema(state["col_sq"], mean_cols(g * g), b2)
    u = orthogonalize(whiten(m, rank_one(r, c), hyper.eps))
    p, q = ema(state["update_row_sq"], mean_rows(u * u), b2), ema(state["update_col_sq"], mean_cols(u * u), b2)
    new = {"exp_avg": m, "row_sq": r, "col_sq": c, "update_row_sq": p, "update_col_sq": q}
    return to_rms(whiten(u, rank_one(p, q), hyper.eps)), new


@keeps(exp_avg=entries)
def eta(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """Eta: Muon on a Nesterov momentum whose rows and columns are of one size, in place of Zeta's variance.

    Zeta's V makes an element-wise quotient, which changes the spectrum itself; this is a two-sided diagonal scaling, of
    the kind that MuonEq (arXiv 2603.28254) has. Ours are its order, and that lines without a gradient do not move. The
    scale is Muon's: brought to Zeta's, a matrix whose gradient has a low rank would move further in its few directions.
    """
    b1 = hyper.betas[0]
    m = ema(state["exp_avg"], g, b1)
    u = orthogonalize(equilibrate(nesterov(m, g, b1), g))
    return match_rms(u), {"exp_avg": m}


@keeps(exp_avg=entries)
def olion(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
    """OLion (arXiv 2602.01105): Lion's two betas, b2 of the momentum and b1 of its mixture with the gradient."""
    b1, b2 = hyper.betas
    m = ema(state["exp_avg"], g, b2)
    u = orthogonalize(nesterov(m, g, b1))
    return to_rms(array_namespace(u).sign(u)), {"exp_avg": m}


def adago(gamma: float = 1.0, floor: float = 0.01) -> Rule:
    """AdaGO (arXiv 2509.02981): a matrix moves by max(floor, min(|g|, gamma) / v) of Muon's step, v^2 from 1 up.

    The paper's smallest step is a number by itself; ours is a share of lr (and 0.01 our choice), so that a schedule may
    reach zero.
    """
    if not (gamma > 0 and floor >= 0):
        raise ValueError(f"gamma is {gamma!r} and floor {floor!r}, but must be > 0 and >= 0")

    @keeps(exp_avg=entries, norm_sq=one)
    def rule(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
        xp = array_namespace(g)
        m = ema(state["exp_avg"], g, hyper.betas[0])
        norm = frobenius(g)
        norm = xp.minimum(norm, gamma * xp.ones_like(norm))
        v = state["norm_sq"] + norm * norm
        step = xp.maximum(norm / xp.sqrt(1 + v), floor * xp.ones_like(v))
        return step * match_rms(orthogonalize(m)), {"exp_avg": m, "norm_sq": v}

    return rule


def dion2(fraction: float = 0.25) -> Rule:
    """Dion2 (arXiv 2512.16928): only the `fraction` of rows (columns, if those are fewer) of the largest L1 norm moves.

    Their RMS is 0.2. The momentum sums gradients up; what has moved is multiplied by b1, the rest waits.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}, but must be above 0 and at most 1")

    @keeps(exp_avg=entries)
    def rule(g: Array, state: State, hyper: Hyper, orthogonalize: Orthogonalize) -> Step:
        xp, tall = array_namespace(g), g.shape[-2] > g.shape[-1]
        m = state["exp_avg"] + g
        m = m.mT if tall else m
        size = mean_rows(xp.abs(m))
        order = xp.argsort(-xp.where(size == size, size, inf * xp.ones_like(size)), axis=-2)  # NaN is shown, not hidden
        rank = xp.argsort(order, axis=-2)
        k = ceil(fraction * m.shape[-2])
        u = orthogonalize(xp.take_along_axis(m, order, axis=-2)[..., :k, :])
        u = xp.take_along_axis(xp.concat([u, xp.zeros_like(m[..., k:, :])], axis=-2), rank, axis=-2)
        moved = (rank < k) & xp.any(g != 0, axis=(-2, -1), keepdims=True)
        m = xp.where(moved, hyper.betas[0] * m, m)
        return match_rms(u.mT if tall else u), {"exp_avg": m.mT if tall else m}

    return rule
