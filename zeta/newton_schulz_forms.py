"""Newton-Schulz in fewer operations, for the backends: the same numbers as `zeta.newton_schulz` but for rounding.

A backend brings one product, `symmetric(a, b, c, beta, alpha)` = alpha a b + beta c, of which it may compute half: all
matrices of the iteration are polynomials of X X^T, so they commute and their products are symmetric.
"""

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from math import copysign, log2, sqrt

from zeta.coefficients import Steps, polynomial, steps_for
from zeta.core import COEFFICIENTS, Array, Coefficients

Product = Callable[..., Array]
Narrow = Callable[[Array], Array]

GRAM_ASPECT = 1.5  # cols / rows from which the Gram form needs fewer operations
GRAM_ROWS = 128  # below, it saves no time worth its rounding: in half precision up to ten times the direct form's
# The Gram form starts again before the slope at zero of its steps, the product of their a, exceeds this. Rounding of
# the smallest singular values grows with its square: at rank 1 in bfloat16, 5 `jordan` steps without a restart lose all
# (error 2.7e4); with one after the third, the error is the direct form's.
RESTART_SLOPE = 50.0
# The same before a first restart in bfloat16, where a third `jordan` step costs up to 2.7 times Muon's error.
FIRST_SLOPE = 20.0
# Up to so many steps numbers are kept apart: the longer compositions of "auto" leave 1 % of room above one
# and are steep beyond it, where what `gram_apart` rounds at small singular values lets them diverge.
APART_STEPS = 5
# What multiplies a matrix that is added to a product is a power of two, so that rounding it costs nothing: MLX's Metal
# kernels keep alpha in float32, but round beta to half where they split a product's sums (0.32). For that, and lest
# what is small be lost, the iterates are scaled: of a 4096 x 4096 matrix an entry of x is 2e-4, of x x^T 4e-6, in
# float16 a subnormal number, which a GPU may take for zero. 8 is the largest scale with which s s, 4096-fold, stays
# within float16 wherever a library rounds it.
LIFT = 8.0


def iterate(
    x: Array, coefficients: Steps, narrow: Narrow, symmetric: Product, multiply: Product, apart: bool = False
) -> Array:
    """The steps on x (..., rows, cols), rows <= cols, Frobenius norms `size` or 0, with products of narrow(x).

    multiply(a, x, c, beta, alpha) = alpha a x + beta c. One row needs no product: of `size` it is the result. Where
    `apart`, the Gram form is `gram_apart`: it is for bfloat16.
    """
    rows, cols = x.shape[-2:]
    if rows == 1:
        return x
    steps = steps_for(coefficients, rows, cols)
    form = (gram_apart if apart and len(steps) <= APART_STEPS else gram) if is_long(rows, cols) else direct
    return form(narrow(x), steps, symmetric, multiply)


def size(coefficients: Steps, rows: int, cols: int, *, apart: bool = False) -> float:
    """The Frobenius norm that `iterate` wants a matrix to have; for one row p(1), as its singular value is its norm."""
    steps = steps_for(coefficients, rows, cols)
    if min(rows, cols) == 1:
        return float(polynomial(1.0, steps))
    if not is_long(rows, cols):
        return direct_steps(steps)[0]
    return 1.0 if apart and len(steps) <= APART_STEPS else gram_steps(steps)[0]


def is_long(rows: int, cols: int) -> bool:
    """Whether the Gram form serves matrices of this shape."""
    n, m = sorted((rows, cols))
    return n >= GRAM_ROWS and m >= GRAM_ASPECT * n


def direct(x: Array, coefficients: Coefficients, symmetric: Product, multiply: Product) -> Array:
    for power, alpha, beta, gamma in direct_steps(coefficients)[1]:
        s = symmetric(x, x.mT)
        x = multiply(symmetric(s, s, s, beta, gamma), x, x, power, alpha)
    return x


def direct_steps(coefficients: Coefficients) -> tuple[float, list[tuple[float, float, float, float]]]:
    """The first t, and the steps y <- power y + alpha (beta s + gamma s s) y with s = y y^T, on y = t x.

    Where t follows from the next step's so that a becomes a power of two; after the last it is 1.
    """
    steps, after = [], 1.0
    for a, b, c in reversed(coefficients):
        power = nearest(after * a / LIFT)
        t = after * a / power if power else LIFT
        lead = max(abs(b), abs(c)) or 1.0
        steps.append((power, LIFT * lead * after / t**3, b / lead / LIFT, c / lead / LIFT / t**2))
        after = t
    return after, steps[::-1]


def gram(x: Array, coefficients: Coefficients, symmetric: Product, multiply: Product) -> Array:
    """All steps between two restarts on r = x x^T alone, collected in q, so that x's long side is touched twice.

    There the half-precision I rounds 1, not a, on its diagonal.
    """
    steps = iter(gram_steps(coefficients)[1])
    for run in segments(coefficients):
        r, q, slope = symmetric(x, x.mT), None, 1 / LIFT
        for k, (alpha, beta, gamma) in enumerate(islice(steps, len(run))):
            w = symmetric(r, r, r, LIFT * beta, LIFT * gamma, LIFT)
            q, slope = (w if q is None else symmetric(q, w, alpha=1 / LIFT)), slope * alpha
            if k + 1 < len(run):
                r = symmetric(symmetric(w, r), w, alpha=(alpha / LIFT) ** 2)
        x = multiply(q, x, alpha=slope)
    return x


def gram_steps(coefficients: Coefficients) -> tuple[float, list[tuple[float, float, float]]]:
    """The first t, and the steps y <- alpha (I + beta s + gamma s s) y with s = y y^T, on y = t x.

    Where t makes of b / a a power of two, beta; after the last step it is 1.
    """
    ts = [LIFT * sqrt(abs(b / a) / nearest(b / a)) if b else LIFT for a, b, _ in coefficients] + [1.0]
    steps = [
        (a * after / t, copysign(nearest(b / a), b / a) / LIFT**2, c / a / t**4)
        for (a, b, c), (t, after) in zip(coefficients, pairwise(ts), strict=True)
    ]
    return ts[0], steps


def gram_apart(x: Array, coefficients: Coefficients, symmetric: Product, multiply: Product) -> Array:
    """`gram` with a number times I kept apart from each matrix: r + rho I, w + omega I, q + kappa I, on x of norm 1.

    In bfloat16 most of the error is the rounding of diagonals, which are near `typical` values: 1.2 to 2.5 times
    torch.optim.Muon's by `gram`, 0.4 to 1.0 times by this. symmetric(..., diagonal, d, delta) adds diagonal I + delta d
    before it rounds.
    """

    def times(u: Array, nu: float, v: Array, upsilon: float, less: float = 0.0) -> Array:
        """(u + nu I)(v + upsilon I) less a number times I: `less` is what is left of nu upsilon."""
        return symmetric(u, v, u, upsilon, 1.0, less, v, nu)

    for k, run in enumerate(segments(coefficients, FIRST_SLOPE)):
        typical = [0.0] * len(run) if k == 0 else [1 / 8] + [3 / 4] * (len(run) - 1)
        r, q, kappa = symmetric(x, x.mT, diagonal=-typical[0]), None, 1.0
        for (a, b, c), rho, following in zip(run, typical, [*typical[1:], None], strict=True):
            omega = a + b * rho + c * rho**2
            w = symmetric(r, r, r, b + 2 * c * rho, c)
            q, kappa = (w if q is None else times(q, kappa, w, omega)), kappa * omega
            if following is not None:
                r = times(times(w, omega, r, rho), omega * rho, w, omega, omega**2 * rho - following)
        x = multiply(q, x, x, kappa)
    return x


def nearest(x: float) -> float:
    """The power of two nearest to the size of x, by ratio; 0 for 0."""
    return 2.0 ** round(log2(abs(x))) if x else 0.0


def segments(coefficients: Coefficients, first: float | None = None) -> Iterator[Coefficients]:
    """The coefficients in runs between restarts, the first of a slope up to `first`, if given."""
    start, slope = 0, 1.0
    for k, (a, _, _) in enumerate(coefficients):
        slope *= a
        if k > start and slope > (RESTART_SLOPE if start or first is None else first):
            yield coefficients[start:k]
            start, slope = k, a
    yield coefficients[start:]


def flops(rows: int, cols: int, coefficients: Steps = COEFFICIENTS["jordan"]) -> int:
    """The operations that `iterate` takes for one matrix, each product counted whole: 2 n m k."""
    n, m = sorted((rows, cols))
    if n == 1:
        return m  # no product; not nothing, so that ranks share many of them evenly
    coefficients = steps_for(coefficients, n, m)
    square, long = 2 * n**3, 2 * n * n * m
    if not is_long(n, m):
        return len(coefficients) * (2 * long + square)
    return sum(2 * long + (4 * len(steps) - 3) * square for steps in segments(coefficients))
