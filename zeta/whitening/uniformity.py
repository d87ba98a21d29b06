"""Is scale spread evenly over a matrix? A chi-square test of uniformity, with the size of the effect beside p.

The paper reports such a test without its statistic; this one is ours. Entries are counted that exceed the median of all
|x|: were scale even, every row, column or block would hold its share of them. That is Mood's median test on |x|.
"""

from math import erfc, exp, lgamma, log, sqrt
from typing import Any, NamedTuple

import numpy as np

Matrix = np.ndarray[Any, Any]
GRID = 8  # blocks: at most so many along each axis
TIE = 1e-5  # entries so close to the median are equal to it: the first step's X is a sign, but for rounding and eps


class Evenness(NamedTuple):
    """`p` assumes independent entries, which a momentum's are not, and saturates at a million of them: read `effect`.

    `effect` is Cramer's V less what chance gives, sqrt(max(0, chi2 - freedom) / entries): twice the spread of a group's
    share of large entries around the mean share. 0 is even, 1 means that groups are wholly large or wholly small.
    """

    chi2: float
    freedom: int
    p: float
    effect: float


def evenness(x: Matrix) -> dict[str, Evenness]:
    """{"rows", "cols", "blocks": Evenness} of x (rows, cols); blocks are those of a grid of at most 8 x 8."""
    (n, m), (i, j) = x.shape, np.indices(x.shape)
    down, across = min(GRID, n), min(GRID, m)
    large = above_median(np.abs(x))
    groups = {"rows": i, "cols": j, "blocks": i * down // n * across + j * across // m}
    return {name: median_test(large.ravel(), labels.ravel()) for name, labels in groups.items()}


def above_median(x: Matrix) -> Any:
    """Which entries exceed the median; with it, where many are equal to it and that comes closer to half of them."""
    middle = np.median(x)
    above, not_below = x > middle * (1 + TIE), x >= middle * (1 - TIE)
    return above if above.mean() + not_below.mean() >= 1 else not_below


def median_test(large: Matrix, labels: Matrix) -> Evenness:
    """Of large (entries,), booleans, in the groups that labels (entries,) number from 0: a table of groups by two."""
    sizes, counts = np.bincount(labels), np.bincount(labels, weights=large)
    share, freedom = float(large.mean()), len(sizes) - 1
    if share in (0, 1):  # all entries alike
        return Evenness(0.0, freedom, 1.0, 0.0)
    chi2 = float(np.sum((counts - sizes * share) ** 2 / (sizes * share * (1 - share))))
    return Evenness(chi2, freedom, chi_square_tail(chi2, freedom), sqrt(max(0.0, chi2 - freedom) / large.size))


def chi_square_tail(x: float, freedom: int) -> float:
    """The probability that chi-square exceeds x: Q(k / 2, x / 2), whose recursion ends at erfc or at exp."""
    if x <= 0 or freedom == 0:
        return 1.0
    half, odd = x / 2, freedom % 2
    terms = (exp(a * log(half) - half - lgamma(a + 1)) for a in (k + odd / 2 for k in range(freedom // 2)))
    return min(1.0, erfc(sqrt(half)) * odd + sum(terms))
