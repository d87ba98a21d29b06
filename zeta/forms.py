"""Newton-Schulz in fewer operations, for the backends: the same numbers as `zeta.newton_schulz` but for rounding.

A backend brings one product, `symmetric(a, b, c, beta, alpha)` = alpha a b + beta c, of which it may compute half: all
matrices of the iteration are polynomials of X X^T, so they commute and their products are symmetric.
"""

from collections.abc import Callable, Iterator

from zeta.core import COEFFICIENTS, Array, Coefficients
from zeta.steps import Steps, polynomial, steps_for

Product = Callable[..., Array]
Narrow = Callable[[Array], Array]

GRAM_ASPECT = 1.5  # cols / rows from which the Gram form needs fewer operations
GRAM_ROWS = 128  # below, it saves no time worth its rounding: in half precision up to ten times the direct form's
# The Gram form starts again before the slope at zero of its steps, the product of their a, exceeds this. Rounding of
# the smallest singular values grows with its square: at rank 1 in bfloat16, 5 `jordan` steps without a restart lose all
# (error 2.7e4); with one after the third, the error is the direct form's.
RESTART_SLOPE = 50.0


def iterate(x: Array, coefficients: Steps, narrow: Narrow, symmetric: Product, multiply: Product) -> Array:
    """The steps on x (batch, rows, cols), rows <= cols, Frobenius norms 1 or 0; multiply(a, x, c, beta) = a x + beta c.

    Products run on narrow(x). One row needs none: its singular value is its norm, so it is scaled by p(1), unrounded.
    """
    rows, cols = x.shape[-2:]
    steps = steps_for(coefficients, rows, cols)
    if rows == 1:
        return polynomial(1.0, steps) * x
    form = gram if rows >= GRAM_ROWS and cols >= GRAM_ASPECT * rows else direct
    return form(narrow(x), steps, symmetric, multiply)


def direct(x: Array, coefficients: Coefficients, symmetric: Product, multiply: Product) -> Array:
    for a, b, c in coefficients:
        s = symmetric(x, x.mT)
        x = multiply(symmetric(s, s, s, b, c), x, x, a)  # (b s + c s s) x + a x
    return x


def gram(x: Array, coefficients: Coefficients, symmetric: Product, multiply: Product) -> Array:
    """All steps between two restarts on r = x x^T alone, collected in q, so that x's long side is touched twice.

    A step is x <- a w x with w = I + (b r + c r r) / a; that way a half-precision w rounds 1, not a, on its diagonal.
    """
    for steps in segments(coefficients):
        r, q, slope = symmetric(x, x.mT), None, 1.0
        for k, (a, b, c) in enumerate(steps):
            w = symmetric(r, r, r, b / a, c / a, 1.0)
            q, slope = (w if q is None else symmetric(q, w)), slope * a
            if k + 1 < len(steps):
                r = symmetric(symmetric(w, r), w, alpha=a * a)
        x = multiply(q, x, alpha=slope)
    return x


def segments(coefficients: Coefficients) -> Iterator[Coefficients]:
    """The coefficients in runs between restarts."""
    start, slope = 0, 1.0
    for k, (a, _, _) in enumerate(coefficients):
        slope *= a
        if k > start and slope > RESTART_SLOPE:
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
    if n < GRAM_ROWS or m < GRAM_ASPECT * n:
        return len(coefficients) * (2 * long + square)
    return sum(2 * long + (4 * len(steps) - 3) * square for steps in segments(coefficients))
