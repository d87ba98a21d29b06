"""The stages that matrix optimizers are made of: moments, variance, scale, and the step itself, in array operations.

A rule (`zeta.core.Rule`) takes them as an argument: this module, or a backend's own under the same names, which may
write over what it is given. All take matrices as (..., rows, cols).
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

from array_api_compat import array_namespace

Array = Any  # an array of whichever library the caller uses
Shape = Callable[[int, int], tuple[int, int]]


def ema(old: Array, new: Array, beta: float) -> Array:
    """The running average: plain momentum, and every variance."""
    return beta * old + (1 - beta) * new


def ema_sq(old: Array, new: Array, beta: float) -> Array:
    """The running average of squares."""
    return beta * old + (1 - beta) * new * new


def nesterov(m: Array, g: Array, beta: float) -> Array:
    """Nesterov momentum, where m is the running average that holds g already."""
    return beta * m + (1 - beta) * g


def sign(x: Array) -> Array:
    return array_namespace(x).sign(x)


def whiten(x: Array, v: Array, eps: float) -> Array:
    """x / (sqrt(v) + eps); v may be of one size along an axis."""
    return x / (array_namespace(x).sqrt(v) + eps)


def equilibrate(x: Array, rows: Array, cols: Array) -> Array:
    """x, its rows, then its columns at an RMS of one; zero where `rows` (..., rows, 1) or `cols` (..., 1, cols) is.

    They count the gradient's entries: a dead unit's fading momentum would be brought to full size otherwise.
    """
    xp = array_namespace(x)
    x = x * xp.astype(rows > 0, x.dtype) / nonzero(mean_sq(x, -1)) ** 0.5
    return x * xp.astype(cols > 0, x.dtype) / nonzero(mean_sq(x, -2)) ** 0.5


def mean_sq(x: Array, axis: int) -> Array:
    """The mean square along an axis, kept: of each row (-1) or column (-2)."""
    return array_namespace(x).mean(x * x, axis=axis, keepdims=True)


def rank_one(r: Array, c: Array) -> Array:
    """The variance (..., rows, cols) with these row and column means; exact where rows and columns are independent."""
    return r / nonzero(array_namespace(r).mean(r, axis=-2, keepdims=True)) * c


def to_rms(u: Array, eps: float = 0.0) -> Array:
    """u at an RMS of 0.2 (arXiv 2502.16982): about that of AdamW's updates, so its lr fits. Zeta's paper has an eps."""
    rows, cols = u.shape[-2:]
    return 0.2 * sqrt(rows * cols) / nonzero(frobenius(u) + eps) * u


def match_rms(u: Array) -> Array:
    """u, whose singular values are near one, at an RMS near 0.2 (arXiv 2502.16982), however many of them are zero."""
    return 0.2 * sqrt(max(u.shape[-2:])) * u


def apply(w: Array, u: Array, lr: Any, weight_decay: Any, moved: Array = 1.0) -> Array:
    """The weights after the step, of every optimizer here: decoupled decay, and the move along -u.

    A matrix whose gradient is exactly zero (an expert that saw no token), for which `moved` (..., 1, 1) is zero, is
    decayed but not moved. That choice is ours: the published Zeta would move it at full size along its last direction.
    """
    return (1 - lr * weight_decay) * w - lr * moved * u


# The sums that a rule may ask for: of its gradient's parts, however the ranks hold them, they add up.


def nonzero_count(g: Array, axes: tuple[int, ...]) -> Array:
    """How many entries are not zero along the axes, kept."""
    return _sum(array_namespace(g).astype(g != 0, g.dtype), axes)


def squares(g: Array, axes: tuple[int, ...]) -> Array:
    """The sum of squares along the axes, kept."""
    return _sum(g * g, axes)


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    for axis in reversed(sorted(axes)):  # rows first: one float32 sum of 2048x8192 terms is 1 % off (MLX 0.32 on CPU)
        x = array_namespace(x).sum(x, axis=axis, keepdims=True)
    return x


def frobenius(x: Array) -> Array:
    """The Frobenius norm (..., 1, 1) of each matrix."""
    return array_namespace(x).sqrt(squares(x, (-2, -1)))


def nonzero(x: Array) -> Array:
    """x with one in place of zero, to divide by."""
    xp = array_namespace(x)
    return xp.where(x == 0, xp.ones_like(x), x)


# The shapes of state and sums, for a matrix (rows, cols).


def entries(rows: int, cols: int) -> tuple[int, int]:
    """A number for every entry: the parameter's own shape."""
    return rows, cols


def per_row(rows: int, cols: int) -> tuple[int, int]:
    return rows, 1


def per_col(rows: int, cols: int) -> tuple[int, int]:
    return 1, cols


def left(rows: int, cols: int) -> tuple[int, int]:
    return rows, rows


def right(rows: int, cols: int) -> tuple[int, int]:
    return cols, cols


def one(rows: int, cols: int) -> tuple[int, int]:
    return 1, 1
