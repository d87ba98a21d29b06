"""Newton-Schulz steps chosen from a matrix's shape, so that hardly a direction is left behind however large it is.

The singular values of a random n x m matrix (n <= m) over its Frobenius norm lie around 1 / sqrt(n), and where it is
nearly square reach down to about 1 / n^1.5. Five `jordan` steps bring s to 0.5 only from 1.07e-3 up, so they leave 2 %
of the directions of a square matrix of 1024 rows behind, and more of a larger one (arXiv 2505.04005).
"""

from math import pi, sqrt
from typing import Any, Literal

from zeta.core import COEFFICIENTS, Coefficients

Steps = Coefficients | Literal["auto"]

LEFT = 9e-4  # the share of singular values that may stay below 0.5: 0.1 %, less a margin
# The composition of Amsel et al. (arXiv 2505.16932), each step the minimax polynomial of the range that the last one
# leaves, with 1 % of room for rounding above it. Designed for [7.07e-6, 1], the first step for [3e-4, 1] so that it
# also begins the shorter ones: the first and the last k - 1. Six, seven, eight bring s to 0.5 from 8.7e-5, 2.1e-5,
# 4.9e-6 up and end within [0.67, 1.30], where five `jordan` steps end within [0.68, 1.20].
LONG: Coefficients = (
    (8.41703, -24.488, 17.8174),
    (4.21448, -3.06693, 0.55798),
    (4.21281, -3.0658, 0.557855),
    (4.20579, -3.06106, 0.557333),
    (4.17651, -3.04129, 0.555151),
    (4.05852, -2.96122, 0.546321),
    (3.64278, -2.67376, 0.514687),
    (2.70764, -1.98214, 0.439623),
)


def steps_for(coefficients: Steps, rows: int, cols: int) -> Coefficients:
    """The coefficients themselves; for "auto" `auto_coefficients`. Raises ValueError for any other word."""
    if not isinstance(coefficients, str):
        return coefficients
    check_coefficients(coefficients)
    return auto_coefficients(rows, cols)


def check_coefficients(coefficients: Any) -> None:
    """Raises ValueError for anything but "auto" and at least one step of three numbers."""
    try:
        steps = coefficients == "auto" or [(float(a), float(b), float(c)) for a, b, c in coefficients]
    except (TypeError, ValueError):
        steps = False
    if not steps:
        raise ValueError(
            f'coefficients is {coefficients!r}, but must be "auto" or ((a, b, c), ...), one for each step: '
            f"zeta.COEFFICIENTS holds {sorted(COEFFICIENTS)}"
        )


def chosen(coefficients: Steps, ns_steps: int | Literal["auto"] | None) -> Steps:
    """What an optimizer's options say: all of the coefficients, the first `ns_steps`, or by each matrix's shape.

    Raises ValueError for what is neither, for a number of steps that there are no coefficients for, and where the two
    contradict each other.
    """
    check_coefficients(coefficients)
    if ns_steps is None:
        return coefficients
    if ns_steps == "auto" and coefficients in ("auto", COEFFICIENTS["jordan"]):
        return "auto"
    if ns_steps == "auto" or isinstance(coefficients, str):
        raise ValueError(f"ns_steps is {ns_steps!r}, but coefficients are given, too: leave one of them out")
    if type(ns_steps) is not int or not 1 <= ns_steps <= len(coefficients):
        raise ValueError(f'ns_steps is {ns_steps!r}, but must be "auto", or from 1 to {len(coefficients)}')
    return coefficients[:ns_steps]


def auto_coefficients(rows: int, cols: int) -> Coefficients:
    """The paper's five `jordan` steps where they leave less than 0.1 % of a random matrix's singular values below 0.5,
    else as few of other steps as do: six to eight, for short sides up to 40000.

    Up to 8192 rows, 1.28 times as many columns are enough for the five. What is steep lifts rounding with the rest:
    relative to the result, eight steps on a matrix of rank 4 give an error of 6e-3 in float32, and in half precision
    fill the other directions with noise, where `jordan` errs by 3e-5 in float32 and by 0.6 in bfloat16.
    """
    s = smallest(rows, cols)
    if polynomial(s, COEFFICIENTS["jordan"]) >= 0.5:
        return COEFFICIENTS["jordan"]
    for k in (6, 7):
        if polynomial(s, steps := (LONG[0], *LONG[1 - k :])) >= 0.5:
            return steps
    return LONG


def smallest(rows: int, cols: int) -> float:
    """A value, over the Frobenius norm, that all but a share LEFT of a random matrix's singular values exceed.

    The largest of three lower bounds. Below the edge 1 - sqrt(n / m) of the Marchenko-Pastur law there is nothing, but
    for a spread that small matrices show. A square matrix has 2 / pi of its values below 1 / sqrt(n), about evenly
    spread, and a few more at zero: the expected number below t / n is at most t (Edelman 1988), about 0.2 + 2 t / pi.
    """
    n, m = sorted((rows, cols))
    return max(0.85 * (1 - sqrt(n / m)), LEFT, pi / 2 * (LEFT - 0.2 / n)) / sqrt(n)


def polynomial(s: Any, coefficients: Coefficients) -> Any:
    """p(s), what the steps make of a singular value, or of an array of them."""
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s
