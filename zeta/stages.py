"""The stages that matrix optimizers are made of, and `Rule`, what a finished one is.

Those of `zeta.family` and `zeta.preconditioned` read as their papers do: moments, variance, orthogonalisation or
another map of the spectrum, scale. What is the same for all, decoupled decay and the step itself, stands here once.
"""

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import NamedTuple

from array_api_compat import array_namespace

from zeta.core import Array, Hyper, Orthogonalize, State, check_matrix, check_shapes, frobenius, newton_schulz, wide

Shape = Callable[[int, int], tuple[int, int]]
Keeps = dict[str, Shape]  # the state's keys, each with its shape for a matrix (rows, cols)
Step = tuple[Array, State]
Direction = Callable[[Array, State, Hyper, Orthogonalize], Step]


class Rule(NamedTuple):
    """An optimizer of matrices in the form of `zeta.core`: `rule.init(param)`, then `rule.update(...)` a step."""

    keeps: Keeps
    update: Callable[..., Step]

    def init(self, param: Array) -> State:
        """Zeros for param (..., rows, cols): float64 where param is, else float32."""
        xp = array_namespace(param)
        zero = xp.zeros_like(param[..., :1, :1], dtype=wide(param))  # on param's device in every library
        return {key: xp.broadcast_to(zero, shape) + 0 for key, shape in _shapes(self.keeps, param).items()}


def keeps(**shapes: Shape) -> Callable[[Direction], Rule]:
    """Makes a rule of a function (gradient, state, hyper, orthogonalize) -> (u, state): w <- (1 - lr wd) w - lr u.

    As in `zeta.core`, a matrix whose gradient is exactly zero is decayed but not moved, whatever u is.
    """
    return lambda direction: Rule(shapes, partial(_update, shapes, direction))


def _update(
    shapes: Keeps,
    direction: Direction,
    grad: Array,
    state: State,
    param: Array,
    hyper: Hyper,
    orthogonalize: Orthogonalize | None = None,
) -> Step:
    check_matrix(param)
    check_shapes(param, _shapes(shapes, param), grad, state)
    xp = array_namespace(param)

    def same_dtype(x: Array) -> Array:
        return xp.astype((orthogonalize or newton_schulz)(x), x.dtype)

    g = xp.astype(grad, wide(param))
    u, state = direction(g, state, hyper, same_dtype)
    moved = xp.astype(xp.any(g != 0, axis=(-2, -1), keepdims=True), u.dtype)
    w = (1 - hyper.lr * hyper.weight_decay) * xp.astype(param, u.dtype) - hyper.lr * moved * u
    return xp.astype(w, param.dtype), state


def _shapes(shapes: Keeps, param: Array) -> dict[str, tuple[int, ...]]:
    *stack, rows, cols = param.shape
    return {key: (*stack, *shape(rows, cols)) for key, shape in shapes.items()}


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


def ema(old: Array, new: Array, beta: float) -> Array:
    """The running average: plain momentum, and every variance."""
    return beta * old + (1 - beta) * new


def nesterov(m: Array, g: Array, beta: float) -> Array:
    """Nesterov momentum, where m is the running average that holds g already."""
    return ema(m, g, beta)


def mean_rows(x: Array) -> Array:
    """The mean (..., rows, 1) of each row."""
    return array_namespace(x).mean(x, axis=-1, keepdims=True)


def mean_cols(x: Array) -> Array:
    """The mean (..., 1, cols) of each column."""
    return array_namespace(x).mean(x, axis=-2, keepdims=True)


def rank_one(r: Array, c: Array) -> Array:
    """The variance (..., rows, cols) with these row and column means; exact where rows and columns are independent."""
    return r / nonzero(mean_cols(r)) * c


def whiten(x: Array, v: Array, eps: float) -> Array:
    return x / (array_namespace(x).sqrt(v) + eps)


def equilibrate(x: Array, g: Array) -> Array:
    """x (..., rows, cols), its rows, then its columns at an RMS of one; zero where a whole row or column of g is.

    A dead unit's fading momentum would be brought to full size otherwise.
    """
    xp = array_namespace(x)
    rows, cols = (xp.astype(xp.any(g != 0, axis=axis, keepdims=True), x.dtype) for axis in (-1, -2))
    x = x * rows / nonzero(mean_rows(x * x)) ** 0.5
    return x * cols / nonzero(mean_cols(x * x)) ** 0.5


def to_rms(u: Array) -> Array:
    """u (..., rows, cols) at an RMS of 0.2 (arXiv 2502.16982): about that of AdamW's updates, so its lr fits."""
    rows, cols = u.shape[-2:]
    return 0.2 * sqrt(rows * cols) / nonzero(frobenius(u)) * u


def match_rms(u: Array) -> Array:
    """u, whose singular values are near one, at an RMS near 0.2 (arXiv 2502.16982), however many of them are zero."""
    return 0.2 * sqrt(max(u.shape[-2:])) * u


def nonzero(x: Array) -> Array:
    """x with one in place of zero, to divide by."""
    xp = array_namespace(x)
    return xp.where(x == 0, xp.ones_like(x), x)
