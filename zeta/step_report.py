"""What a step did to each matrix: how far it moved, beside its own size, and how orthogonal its update was."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from zeta.core import Array
from zeta.stages import nonzero, squares


class Row(NamedTuple):
    """One matrix in one step. RMS is that of an entry."""

    name: str
    lr: float
    update_rms: float  # of what the step took off the weights, but for their decay: lr u
    weight_rms: float  # after the step
    orthogonality: float  # how far the squares of u's singular values, of mean one, are from one: their RMS deviation

    @property
    def ratio(self) -> float:
        return self.update_rms / self.weight_rms if self.weight_rms else nan

    @property
    def finite(self) -> bool:
        return isfinite(self.update_rms) and isfinite(self.weight_rms)


class Report:
    """The matrices of a step. Nothing is copied from a GPU, and nothing waits for one, until it is read."""

    def __init__(self, read: Callable[[], Iterable[Row]]) -> None:
        self._read, self._rows = read, list[Row]()

    @property
    def rows(self) -> list[Row]:
        self._rows = self._rows or list(self._read())
        return self._rows

    @property
    def not_finite(self) -> list[str]:
        """The names of the matrices in which a NaN or an infinity is."""
        return [row.name for row in self.rows if not row.finite]

    def warn_of_nan(self) -> None:
        """Warns of the matrices that are not finite, by name."""
        if self.not_finite:
            warnings.warn(f"not finite after a step: {', '.join(self.not_finite)}", stacklevel=2)

    def summary(self) -> dict[str, float]:
        """Numbers to log: the medians over all matrices, and the worst orthogonality."""
        if not self.rows:
            return {}
        keys = ("lr", "update_rms", "weight_rms", "ratio", "orthogonality")
        medians = {f"zeta/{key}": float(np.median([getattr(row, key) for row in self.rows])) for key in keys}
        worst = max(row.orthogonality for row in self.rows)
        return medians | {"zeta/orthogonality_max": worst, "zeta/not_finite": float(len(self.not_finite))}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=6)
        lines = [f"{'matrix':{width}}        lr    update    weight     ratio  orthogonality"]
        for row in self.rows:
            numbers = (row.lr, row.update_rms, row.weight_rms, row.ratio, row.orthogonality)
            marked = "" if row.finite else "  not finite"
            lines.append(f"{row.name:{width}} " + " ".join(f"{x:9.2e}" for x in numbers) + marked)
        return "\n".join(lines)


def rows(names: Iterable[str], shape: tuple[int, ...], lr: float, sums: Iterable[Iterable[float]]) -> Iterable[Row]:
    """A row for each name: `sums` are the squares of u, of the weights, and errors of matrices (..., rows, cols)."""
    entries = shape[-2] * shape[-1]
    for name, update, weight, off in zip(names, *sums, strict=True):
        yield Row(name, lr, lr * (update / entries) ** 0.5, (weight / entries) ** 0.5, off)


def labels(batches: Iterable[Iterable[tuple[Any, int]]], name: Callable[[Any], str] = str) -> Iterator[list[str]]:
    """What the matrices of each batch are called, which is [(parameter, how many of its matrices), ...]."""
    batches = [list(batch) for batch in batches]
    totals: Counter[Any] = Counter()
    for key, count in chain(*batches):
        totals[key] += count
    unused = {p: iter([name(p)] if n == 1 else [f"{name(p)}[{i}]" for i in range(n)]) for p, n in totals.items()}
    for batch in batches:
        yield [next(unused[key]) for key, count in batch for _ in range(count)]


def error(u: Array, size: Array, probe: Array | None) -> Array:
    """`Row.orthogonality` (..., 1, 1) of each u (..., rows, cols), whose sum of squares is `size` (..., 1, 1).

    With E = n / size u u^T - I, n the short side, it is estimated as |E z| / sqrt(n) for the `probe` z (n, 1) of signs;
    with None it is |E|_F / sqrt(n) itself.
    """
    xp = array_namespace(u)
    if u.shape[-2] > u.shape[-1]:
        u = u.mT
    n, scale = u.shape[-2], u.shape[-2] / nonzero(size)
    if probe is not None:
        return (squares(scale * (u @ (u.mT @ probe)) - probe, (-2, -1)) / n) ** 0.5
    diagonal = scale * xp.sum(u * u, axis=-1, keepdims=True)
    off = squares(scale * (u @ u.mT), (-2, -1)) - squares(diagonal, (-2, -1))
    return ((xp.maximum(off, xp.zeros_like(off)) + squares(diagonal - 1, (-2, -1))) / n) ** 0.5


@cache
def signs(n: int) -> np.ndarray[Any, Any]:
    """(n, 1) random signs: the same in every step, and from no generator that a program uses for itself."""
    return np.random.default_rng(n).choice(np.array([-1.0, 1.0], np.float32), (n, 1))
