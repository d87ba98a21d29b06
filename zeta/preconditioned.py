"""The optimizers that decompose matrices: Shampoo and SOAP into eigenvectors, Schattor into singular values.

Rules as in `zeta.family`; Shampoo's and SOAP's are not cut in two. Unless every step decomposes, whether this one does
is read from the state: a GPU is waited for, and `mx.compile` refuses. Decompositions run in the state's own precision,
on MLX on its CPU alone. Beside a Mac's GPU those of large layers may run into Metal's timeout
(ml-explore/mlx issues 2827 and 3583; we have not tried it): make the CPU the default device, or take Muon.
"""

from collections.abc import Callable
from math import inf, nan, sqrt

from array_api_compat import array_namespace

from zeta.core import Array, Hyper, Orthogonalize, Rule, Stages, State, Step
from zeta.family import MOMENTUM, averaged, rule, uncut
from zeta.stages import ema, entries, frobenius, left, nonzero, nonzero_count, one, right, to_rms, whiten

FLOOR = 1e-6  # of the largest eigenvalue or singular value: what is smaller is rounding in float32


def shampoo(precondition_frequency: int = 10) -> Rule:
    """Shampoo (arXiv 1802.09568), with momentum, and averages over b2 in place of its sums.

    The factors' roots are new in every `precondition_frequency`-th step, the first among them. b1 is the plain
    momentum's; eps does nothing. u has an RMS of 0.2. Our best lr was twice AdamW's.
    """
    check_frequency(precondition_frequency)

    @uncut(False, exp_avg=entries, left=left, right=right, left_root=left, right_root=right, steps=one)
    def shampoo(g: Array, state: State, hyper: Hyper, _: Orthogonalize) -> Step:
        (b1, b2), n = hyper.betas, counted(state["steps"], g)
        m = ema(state["exp_avg"], g, b1)
        factors = ema(state["left"], g @ g.mT, b2), ema(state["right"], g.mT @ g, b2)
        kept = state["left_root"], state["right_root"]
        a, b = renewed(n, precondition_frequency, lambda x: power(x, -1 / 4), factors, kept)
        new = {"exp_avg": m, "left": factors[0], "right": factors[1], "left_root": a, "right_root": b}
        return to_rms(a @ m @ b), new | {"steps": n}

    return shampoo._replace(decomposes=True)


def soap(precondition_frequency: int = 10) -> Rule:
    """SOAP (arXiv 2409.11321): Adam between the eigenvectors of Shampoo's factors, which b2 averages; lr is Adam's.

    As published, the factors are those of the steps before, and the first step gathers only them. The eigenvectors are
    new in every `precondition_frequency`-th step, and exact; published code turns the last ones by a step of power
    iteration. Those of (nearly) equal eigenvalues are not unique: a wide or tall matrix, with a singular factor at
    first, takes different steps on another machine. b1 and b2 are Adam's, b2 the factors', too. On our language models
    old eigenvectors cost it its place beside Muon (bench/README.md). Our best lr was a quarter to 4 times AdamW's.
    """
    check_frequency(precondition_frequency)

    @uncut(
        False,
        exp_avg=entries,
        exp_avg_sq=entries,
        left=left,
        right=right,
        left_basis=left,
        right_basis=right,
        steps=one,
    )
    def soap(g: Array, state: State, hyper: Hyper, _: Orthogonalize) -> Step:
        (b1, b2), n = hyper.betas, state["steps"]
        kept = state["left_basis"], state["right_basis"]
        a, b = renewed(n, precondition_frequency, eigenvectors, (state["left"], state["right"]), kept)
        begun = array_namespace(g).astype(n > 0, g.dtype)
        m = ema(state["exp_avg"], begun * g, b1)
        v = ema(state["exp_avg_sq"], begun * (a.mT @ g @ b) ** 2, b2)
        t = nonzero(n)
        u = a @ whiten(a.mT @ m @ b / (1 - b1**t), v / (1 - b2**t), hyper.eps) @ b.mT
        factors = {"left": ema(state["left"], g @ g.mT, b2), "right": ema(state["right"], g.mT @ g, b2)}
        new = {"exp_avg": m, "exp_avg_sq": v, "left_basis": a, "right_basis": b, "steps": counted(n, g)}
        return u, new | factors

    return soap._replace(decomposes=True)


def check_frequency(every: int) -> None:
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"precondition_frequency is {every!r}, but must be a whole number of steps, at least 1")


def renewed(
    n: Array, every: int, decompose: Callable[[Array], Array], factors: tuple[Array, Array], kept: tuple[Array, Array]
) -> tuple[Array, Array]:
    """`decompose` of both factors in a matrix's first, and every `every`-th, of steps n (..., 1, 1); else what is kept.

    A state with zeros there is one that was saved when every step decomposed: it does so at once.
    """
    xp = array_namespace(n)
    due = ((n - 1) % every == 0) | (frobenius(kept[0]) == 0)
    if every > 1 and not bool(xp.any(due)):
        return kept
    left, right = (xp.where(due, decompose(factor), old) for factor, old in zip(factors, kept, strict=True))
    return left, right


def counted(steps: Array, g: Array) -> Array:
    """steps (..., 1, 1) and one more, from a matrix's first gradient on."""
    xp = array_namespace(g)
    return steps + xp.astype((steps > 0) | (nonzero_count(g, (-2, -1)) > 0), steps.dtype)


def eigenvectors(a: Array) -> Array:
    return eigh(a)[1]


def schattor(p: float = 4.0) -> Rule:
    """Schattor's ball form (arXiv 2606.15702): p = 2 is normalised SGD, p = inf is Muon with the exact polar factor.

    An update is the steepest in the ball of radius lr in the Schatten-p norm; our lr is scaled such that equal singular
    values give an RMS of 0.2. p from 1 to inf. b1 is the plain momentum's; b2 and eps do nothing. For p = 4 our best lr
    was twice AdamW's.
    """
    check_norm(p)

    @rule(averaged, MOMENTUM, orthogonalizes=False)
    def schattor(m: Array, sums: State, state: State, hyper: Hyper, _: Orthogonalize, stages: Stages) -> Step:
        (u, _size), (rows, cols) = dual(m, p), m.shape[-2:]
        return 0.2 * sqrt(rows * cols) / min(rows, cols) ** (1 / 2 - 1 / p) * u, {}

    return schattor._replace(decomposes=True)


def schattor_regularised(p: float = 4.0) -> Rule:
    """Schattor's regularised form (arXiv 2606.15702): p = 2 is SGD, and lr is SGD's for every p."""
    check_norm(p)

    @rule(averaged, MOMENTUM, orthogonalizes=False)
    def schattor_regularised(
        m: Array, sums: State, state: State, hyper: Hyper, _: Orthogonalize, stages: Stages
    ) -> Step:
        u, size = dual(m, p)
        return size * u, {}

    return schattor_regularised._replace(decomposes=True)


def check_norm(p: float) -> None:
    if not p >= 1:
        raise ValueError(f"p is {p!r}, but must be at least 1")


def dual(m: Array, p: float) -> tuple[Array, Array]:
    """(u, size): of all u (..., rows, cols) with Schatten-p norm 1 the one that maximises <m, u>, and that maximum,
    m's Schatten-q norm (..., 1, 1), where 1/p + 1/q = 1. With m = A diag(s) B^T, u = A diag(s^(q-1) / |s|_q^(q-1)) B^T.
    """
    xp, q = array_namespace(m), inf if p == 1 else 1 / (1 - 1 / p)
    a, s, b = svd(m)
    top = s[..., :1]
    s = s / nonzero(top)  # from 0 to 1: no power of it overflows
    there = xp.astype(s > FLOOR, s.dtype)  # for p = inf all of these count alike
    total = xp.sum(there * s**q, axis=-1, keepdims=True)  # (q - 1) / q = 1 / p
    u = (a * (there * s ** (q - 1) / nonzero(total) ** (1 / p))[..., None, :]) @ b
    return u, (top * total ** (1 / q))[..., None]


def power(a: Array, exponent: float) -> Array:
    """a ** exponent for a symmetric a (..., n, n) >= 0, its eigenvalues below FLOOR of the largest raised to that."""
    xp, (values, vectors) = array_namespace(a), eigh(a)
    values = xp.maximum(values, FLOOR * values[..., -1:])
    return (vectors * nonzero(values)[..., None, :] ** exponent) @ vectors.mT


def eigh(a: Array) -> tuple[Array, Array]:
    """Eigenvalues (..., n), rising, and eigenvectors (..., n, n) of a symmetric a (..., n, n); NaN as for `svd`."""
    xp, (a, mark) = array_namespace(a), finite(a)
    if xp.__name__ == "mlx.core":  # MLX 0.32 decomposes on its CPU alone
        values, vectors = xp.linalg.eigh(a, stream=xp.cpu)
    else:
        values, vectors = xp.linalg.eigh(a)
    return values + mark[..., 0], vectors + mark


def svd(x: Array) -> tuple[Array, Array, Array]:
    """(a, s, b): x (..., rows, cols) = a diag(s) b, s (..., min(rows, cols)) falling; NaN where x is not finite."""
    if x.shape[-2] < x.shape[-1]:
        a, s, b = svd(x.mT)
        return b.mT, s, a.mT
    xp, (x, mark) = array_namespace(x), finite(x)
    if xp.__name__ == "mlx.core":  # whose CPU makes all vectors, rows of them: QR leaves a small square
        q, r = xp.linalg.qr(x, stream=xp.cpu)
        a, s, b = xp.linalg.svd(r, stream=xp.cpu)
        a = q @ a
    else:
        a, s, b = xp.linalg.svd(x, full_matrices=False)
    return a + mark, s + mark[..., 0], b + mark


def finite(x: Array) -> tuple[Array, Array]:
    """x (..., rows, cols) with each matrix that is not finite made zero, and (..., 1, 1): NaN for those, else zero.

    NumPy and torch refuse the whole stack for one such matrix; the SVD of MLX 0.32 never ends.
    """
    xp = array_namespace(x)
    zero = xp.zeros_like(x[..., :1, :1])
    there = xp.all(xp.isfinite(x), axis=(-2, -1), keepdims=True)
    return xp.where(there, x, xp.zeros_like(x)), xp.where(there, zero, zero + nan)
