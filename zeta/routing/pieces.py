"""Which rows of a layer's output an array holds, while the module's code reshapes, transposes and splits it."""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple


class Axis(NamedTuple):
    """One axis that rows are laid out in: how many, how many rows apart, and which axis of the array it is."""

    size: int
    stride: int
    place: int


class Shape(NamedTuple):
    """The shape of an array, or its leading part; only the last size is known."""

    last: int | None


@dataclass
class Cut:
    """One place in the code where an output is taken apart, at the same bounds in each period of rows."""

    period: int
    bounds: set[int]
    span: tuple[int, int]
    names: list[str] = field(default_factory=list)  # that the code gives to the pieces
    slices: list[tuple[int, int]] | None = None  # of single subscripts, which may leave gaps

    def is_complete(self) -> bool:
        reached, end = self.span
        for start, stop in sorted(self.slices or [self.span]):
            reached = max(reached, stop) if start <= reached else reached
        return reached >= end


@dataclass(frozen=True)
class Piece:
    """The rows that an array of `dims` axes holds; `period` is that of the first split, 0 before it."""

    axes: tuple[Axis, ...]
    offset: int = 0
    period: int = 0
    dims: int = 3
    cut: Cut | None = None  # the slice that it just came from

    def plain(self, **changes: Any) -> "Piece":
        return replace(self, cut=None, **changes)

    def reshaped(self, sizes: list[Any]) -> "Piece":
        """After view(*sizes); the leading ones may be unknown (None, or a Shape, taken for two), and one -1."""
        total, stride = prod(axis.size for axis in self.axes), min((axis.stride for axis in self.axes), default=1)
        trailing = _trailing(sizes, total)
        flat = max((axis.size * axis.stride for axis in self.axes), default=1) == total * stride
        in_order = [a.place for a in self.axes] == list(range(self.dims - len(self.axes), self.dims))
        if not trailing or not (flat and in_order):  # heads that were transposed, or merged: rows stay where they are
            return self.plain(axes=self.axes if len(self.axes) > 1 and not self.period else ())
        dims = len(trailing) + sum(1 + isinstance(size, Shape) for size in sizes[: -len(trailing)])
        axes = []
        for i, size in enumerate(trailing):
            axes.append(Axis(size, stride * prod(trailing[i + 1 :]), dims - len(trailing) + i))
        return self.plain(axes=tuple(axes), dims=dims)

    def moved(self, order: list[int]) -> "Piece":
        """After permute(*order)."""
        axes = tuple(axis._replace(place=order.index(axis.place)) for axis in self.axes)
        return self.plain(axes=axes)

    def reduced(self, place: int, keeps: bool) -> "Piece":
        """After sum(place): each row of what is left stands for all that were added up."""
        axes = [axis for axis in self.axes if axis.place != place]
        if keeps:
            return self.plain(axes=tuple(axes))
        axes = [axis._replace(place=axis.place - (axis.place > place)) for axis in axes]
        return self.plain(axes=tuple(axes), dims=self.dims - 1)

    def is_last(self, place: Any) -> bool:
        return isinstance(place, int) and place % self.dims == self.dims - 1

    def axis(self, total: int | None, count: int | None, place: Any) -> int:
        """The number of the axis that a split into pieces of this total size, or into so many, is along; -1 if none."""
        wanted = place % self.dims if isinstance(place, int) else None
        for i, axis in enumerate(self.axes):
            if axis.place == wanted and total in (None, axis.size):
                return i
        fits = [i for i, axis in enumerate(self.axes) if axis.size in (total, count) or len(self.axes) == 1]
        return fits[-1] if fits and place != 0 else -1

    def part(self, i: int, start: int, length: int, drop: bool = False, cut: Cut | None = None) -> "Piece":
        """What a slice of axis i holds; `drop` takes the axis away, as an index does."""
        at = self.axes[i]
        axes = [*self.axes[:i], *([] if drop else [at._replace(size=length)]), *self.axes[i + 1 :]]
        if drop:
            axes = [a._replace(place=a.place - (a.place > at.place)) for a in axes]
        period = self.period or at.size * at.stride
        return Piece(tuple(axes), self.offset + start * at.stride, period, self.dims - drop, cut)

    def cut_along(self, i: int, bounds: set[int]) -> Cut | None:
        """The cut at these places of axis i; None if it is inside a head, or otherwise finer than the first."""
        at = self.axes[i]
        inner = [axis for axis in self.axes if not self.period or axis.stride < self.period]
        if self.period and at != max(inner, key=lambda axis: axis.stride, default=None):
            return None
        base = self.offset % self.period if self.period else 0
        period = self.period or at.size * at.stride
        return Cut(period, {base + b * at.stride for b in bounds}, (base, base + at.size * at.stride))


def _trailing(sizes: list[Any], total: int) -> list[int]:
    """The sizes of the last axes, whose product is `total`, with -1 worked out; [] if they cannot be told."""
    chosen: list[int] = []
    for size in reversed(sizes):
        if (-1 not in chosen and prod(chosen) == total) or not isinstance(size, int) or (size < 0 and -1 in chosen):
            break
        chosen.insert(0, size)
    known = prod(n for n in chosen if n != -1)
    if known <= 0 or total % known or (-1 not in chosen and known != total):
        return []
    return [total // known if n == -1 else n for n in chosen]
