"""Sums over a gradient of which each rank has a part: of the part, put together, and as a stack has them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zeta.routing.layout import Route, piece
from zeta.sharding import Lines, Unit
from zeta.stages import Shape

from .stages import InPlace


def of_part(g: Tensor, sides: tuple[Lines, Lines], stage: str, shape: Shape) -> Tensor:
    """The stage's sums over a part of a unit: a number for each of its rows, columns, or pieces of matrices."""
    (by_row, by_col), (rows, cols) = _by_line(shape), sides
    t, add = g.reshape(len(rows), len(cols)), getattr(InPlace, stage)
    if not by_col:
        t, add = _add_up(t, -1, cols, add), _sum
    return t if by_row else _add_up(t, -2, rows, add)


def put_together(parts: list[tuple[tuple[Lines, Lines], Tensor]], unit: Unit, shape: Shape) -> Tensor:
    """The sums over a whole unit, of those over its parts."""
    (count, rows, cols), (by_row, by_col) = unit.route.matrices, _by_line(shape)
    turns = {unit.route.axis: max(1, len(unit.route.parts))}
    size = count * (rows if by_row else turns.get(-2, 1)), cols if by_col else turns.get(-1, 1)
    total = parts[0][1].new_zeros(size)
    for (of_rows, of_cols), t in parts:
        for own_rows, at_rows in _numbers(of_rows, by_row):
            for own_cols, at_cols in _numbers(of_cols, by_col):
                total[at_rows, at_cols] += t[own_rows, own_cols]
    return total


def of_piece(total: Tensor, shape: Shape, route: Route, i: int) -> Tensor:
    """The sums over the i-th piece of each matrix: (count, rows or 1, columns or 1)."""
    count, by_line = route.matrices[0], dict(zip((-2, -1), _by_line(shape), strict=True))
    t = total.view(count, -1, total.shape[-1])
    if not route.parts:
        return t
    if by_line[route.axis]:
        lines = route.repeats * route.parts[i]
        own: Tensor = piece(t, route, i)
        return own.reshape((count, lines, -1) if route.axis == -2 else (count, -1, lines))
    return t.narrow(route.axis, i, 1)


def _add_up(t: Tensor, axis: int, side: Lines, add: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """The sums along an axis, one for each segment of it."""
    runs = [run for runs in side.segments.values() for run in runs]
    length = runs[0].stop - runs[0].start
    if len(runs) == len(side.segments) == t.shape[axis] // length and all(r.stop - r.start == length for r in runs):
        shape = (len(runs), length, t.shape[1]) if axis == -2 else (t.shape[0], len(runs), length)
        return add(t.reshape(shape), (axis,)).flatten(*((0, 1) if axis == -2 else (1, 2)))
    sums = []
    for runs in side.segments.values():
        each = [add(t.narrow(axis, run.start, run.stop - run.start), (axis,)) for run in runs]
        sums.append(torch.stack(each).sum(0))
    return torch.cat(sums, axis)


def _sum(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.sum(t, axes, keepdim=True)


def _numbers(side: Lines, by_line: bool) -> Iterator[tuple[slice, slice]]:
    """(a run of a part's own sums, of the whole unit's)."""
    own = 0
    for run in side.numbers if by_line else (slice(s, s + 1) for s in side.segments):
        yield slice(own, own := own + run.stop - run.start), run


def _by_line(shape: Shape) -> tuple[bool, bool]:
    """Whether there is a number for each row, and for each column."""
    by_row, by_col = (n > 1 for n in shape(2, 2))
    return by_row, by_col
