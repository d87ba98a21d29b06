"""Who orthogonalises which matrix where several ranks hold them, and what goes over the wire for it.

Plans only, made of shapes: the optimizers carry them out, `bench/communication.py` adds them up. A rule's first half
works entry by entry, so it runs where the entries are. Its second half needs whole matrices: each has one owner, to
whom the ranks send their parts of x, of its state, and sums; who sends back theirs of u and of the state.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import ceil, prod
from typing import NamedTuple

from zeta.core import Rule, zeta
from zeta.newton_schulz_forms import flops
from zeta.routing.layout import BATCH_ENTRIES, Route, shapes
from zeta.stages import Shape, entries
from zeta.storage import stored

SLACK = 1.05  # how far over its even share of the work a rank goes to spare an exchange
Box = tuple[slice, ...]  # one slice an axis


class Held(NamedTuple):
    """What one rank holds of an array."""

    box: Box
    copy: tuple[int, ...]  # which copy this is a part of: equal for ranks whose boxes make up the array together


class Unit(NamedTuple):
    """Matrices that have one owner: a parameter, or a range of a stack."""

    key: Hashable  # of the parameter
    start: int  # of the range along the parameter's first axis
    shape: tuple[int, ...]
    route: Route


def held(
    shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[int | None], order: Sequence[int] | None = None
) -> list[Held]:
    """What each rank of the mesh holds of an array of this shape, ranks in row-major order.

    `cuts[i]` is the array's axis that the i-th axis of the mesh shares out, in chunks like torch.chunk's; None where it
    holds copies. `order` is that of the mesh's axes when two shard the same one; None from the first to the last.
    """
    parts = []
    for place in product(*map(range, mesh)):
        box = list(whole_box(shape))
        for i in order or range(len(mesh)):
            axis = cuts[i]
            if axis is not None:
                start, stop = box[axis].start, box[axis].stop
                size = ceil((stop - start) / mesh[i])
                low, high = (min(start + size * k, stop) for k in (place[i], place[i] + 1))
                box[axis] = slice(low, high)
        parts.append(Held(tuple(box), tuple(k for k, axis in zip(place, cuts, strict=True) if axis is None)))
    return parts


def units(key: Hashable, shape: tuple[int, ...], route: Route, holders: list[Held]) -> Iterator[Unit]:
    """The parameter whole; a stack of matrices in ranges, as many as ranks, cut where the ranks' parts are."""
    count, rows, cols = route.matrices
    stacked = len(shape) > 2 and cols == shape[-1] and count % prod(shape[:-2]) == 0  # not a convolution
    n, ranks = shape[0], len(holders)
    even = {n * k // ranks for k in range(ranks)} | {h.box[0].start for h in holders} if stacked else {0}
    for start, stop in pairwise(sorted(even | {n})):
        size = stop - start
        yield Unit(key, start, (size, *shape[1:]), route._replace(matrices=(count * size // n, rows, cols)))


def overlap(box: Box, unit: Unit) -> Box | None:
    """Where the box, of the unit's parameter, lies in the unit; None where they have nothing in common."""
    low, high = max(box[0].start, unit.start), min(box[0].stop, unit.start + unit.shape[0])
    common = (slice(low - unit.start, high - unit.start), *box[1:])
    return common if all(s.start < s.stop for s in common) else None


def senders(unit: Unit, owner: int, holders: list[Held]) -> Iterator[tuple[int, Box]]:
    """The ranks that send their parts of the unit to its owner, of each part's copies the one nearest: (rank, part)."""
    for rank, h in enumerate(holders):
        where = overlap(h.box, unit)
        if where and h.copy == holders[owner].copy:
            yield rank, where


def receivers(unit: Unit, holders: list[Held]) -> Iterator[tuple[int, Box]]:
    """The ranks that hold a part of the unit, and so are sent its update: (rank, part)."""
    for rank, h in enumerate(holders):
        where = overlap(h.box, unit)
        if where:
            yield rank, where


def plan(arrays: dict[Hashable, tuple[tuple[int, ...], Route, Hashable, list[Held]]]) -> list[list[tuple[Unit, int]]]:
    """Batches of (unit, owner), from {key: (shape, route, kind, what each rank holds)}: units of one shape and kind.

    A batch holds as many entries a rank as one of `zeta.routing.layout.batches`, or a matrix a rank if that is more.
    """
    ranks = max(len(holders) for _, _, _, holders in arrays.values())
    tasks = [u for key, (shape, route, _, holders) in arrays.items() for u in units(key, shape, route, holders)]
    able = [[r for r, h in enumerate(arrays[u.key][3]) if overlap(h.box, u) == whole_box(u.shape)] for u in tasks]
    costs = [sum(n * flops(rows, cols) for n, rows, cols in shapes(u.route)) for u in tasks]
    cap = max(ranks * BATCH_ENTRIES, sum(prod(u.shape) for u in tasks) // 8)
    done: list[list[tuple[Unit, int]]] = []
    unfinished: dict[Hashable, list[tuple[Unit, int]]] = {}
    for unit, owner in zip(tasks, balance(costs, ranks, able), strict=True):
        alike = (unit.shape, arrays[unit.key][2])
        batch = unfinished.setdefault(alike, [])
        if (len(batch) + 1) * prod(unit.shape) > cap and len(batch) >= ranks:
            done.append(batch)
            batch = unfinished[alike] = []
        batch.append((unit, owner))
    return done + list(unfinished.values())


def balance(costs: Sequence[float], ranks: int, able: Sequence[Collection[int]] | None = None) -> list[int]:
    """The rank that does each piece of work: the costliest first, each to the rank with the least to do.

    `able[i]` are the ranks that have all the i-th needs; another gets it where it would take them over their share.
    """
    loads, owners = [0.0] * ranks, [0] * len(costs)
    share = SLACK * sum(costs) / ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = min((able and able[i]) or range(ranks), key=loads.__getitem__)
        if loads[rank] and loads[rank] + costs[i] > share:
            rank = min(range(ranks), key=loads.__getitem__)
        owners[i] = rank
        loads[rank] += costs[i]
    return owners


def sent(batches: list[list[tuple[Unit, int]]], holders: Mapping[Hashable, list[Held]], rule: Rule = zeta) -> list[int]:
    """The entries that each rank sends to others in a step of this rule."""
    ranks = max(map(len, holders.values()))
    like_x = 1 + sum(rule.keeps[key] is entries for key in rule.carried)  # what travels both ways, beside x and u
    result = [0] * ranks
    for unit, owner in (task for batch in batches for task in batch):
        for rank, at in senders(unit, owner, holders[unit.key]):
            sums = sum(prod(sum_size(shape, unit, at)) for _, shape in rule.summed.values())
            result[rank] += (rank != owner) * (like_x * prod(box_size(at)) + sums)
        for rank, at in receivers(unit, holders[unit.key]):
            result[owner] += (rank != owner) * like_x * prod(box_size(at))
        kept = stored({k: rule.keeps[k] for k in rule.carried if rule.keeps[k] is not entries}, unit.route, unit.shape)
        result[owner] += (ranks - 1) * sum(map(prod, kept.values()))
    return result


class Lines(NamedTuple):
    """The rows (or columns) of a unit's matrices, counted through all of them, that a box of the unit has parts of."""

    numbers: list[slice]  # one run after the other
    segments: dict[int, list[slice]]  # which of the box's own lines belong together: to one piece of one matrix

    def __len__(self) -> int:
        return sum(run.stop - run.start for run in self.numbers)


def lines(unit: Unit, at: Box) -> tuple[Lines, Lines]:
    """The rows and the columns of the box `at`, as which its entries lie in order."""
    _, rows, cols = unit.route.matrices
    split = next((k for k in range(1, len(unit.shape) + 1) if prod(unit.shape[k:]) == cols), 0)
    if not split:
        raise ValueError(
            f"a parameter of shape {unit.shape} holds matrices {unit.route.matrices}, whose columns are no axes of it: "
            "ranks that keep parts of it cannot tell them; give it a shape that ends with them"
        )
    turns = {unit.route.axis: unit.route.parts}
    sides = (slice(None, split), rows, turns.get(-2, ())), (slice(split, None), cols, turns.get(-1, ()))
    by_row, by_col = (_lines(unit.shape[axes], at[axes], length, parts) for axes, length, parts in sides)
    return by_row, by_col


def _lines(shape: tuple[int, ...], box: Box, length: int, parts: tuple[int, ...]) -> Lines:
    """Of an array of this shape, each of whose matrices has so many lines, `parts` of which take turns."""
    numbers: list[slice] = []
    last = box[-1] if box else slice(0, 1)
    for index in product(*(range(s.start, s.stop) for s in box[:-1])):
        start = last.start
        for k, i in enumerate(index):
            start += i * prod(shape[k + 1 :])
        stop = start + last.stop - last.start
        if numbers and numbers[-1].stop == start:
            numbers[-1] = slice(numbers[-1].start, stop)
        else:
            numbers.append(slice(start, stop))
    return Lines(numbers, _segments(numbers, length, parts or (length,)))


def _segments(numbers: list[slice], length: int, parts: tuple[int, ...]) -> dict[int, list[slice]]:
    """{segment: its runs in the box's own lines}; matrix by matrix, and in each part by part."""
    result: dict[int, list[slice]] = {}
    own, turn = 0, sum(parts)
    for run in numbers:
        at = run.start
        while at < run.stop:
            end, i = at - at % length % turn, -1
            while end <= at:
                i += 1
                end += parts[i]
            stop = min(end, run.stop)
            result.setdefault(at // length * len(parts) + i, []).append(slice(own, own + stop - at))
            own, at = own + stop - at, stop
    return result


def sum_size(shape: Shape, unit: Unit, at: Box) -> tuple[int, int]:
    """The size of a sum of this shape (`per_row`, `per_col`, `one`) over the box: a number a line, or a segment."""
    by_line = shape(2, 2)
    rows, cols = lines(unit, at)
    return tuple(len(side) if n > 1 else len(side.segments) for side, n in zip((rows, cols), by_line, strict=True))  # type: ignore[return-value]


def box_size(box: Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)


def whole_box(shape: Sequence[int]) -> Box:
    return tuple(slice(0, n) for n in shape)
