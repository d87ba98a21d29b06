"""Who orthogonalises which matrix where several ranks hold them, and what goes over the wire for it.

Plans only, made of shapes: the optimizers carry them out, `bench/communication.py` adds them up. Moments and coordinate
whitening work entry by entry, so they stay where the entries are. A matrix's spectrum needs the whole matrix: each has
one owner, to whom the ranks send their parts and who sends back theirs.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import ceil, prod
from typing import NamedTuple

from zeta.forms import flops
from zeta.layout import BATCH_ENTRIES, Route, shapes

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
    holds copies. `order` is that of the mesh's axes when two share out the same one; None from the first to the last.
    """
    found = []
    for place in product(*map(range, mesh)):
        box = list(whole(shape))
        for i in order or range(len(mesh)):
            axis = cuts[i]
            if axis is not None:
                start, stop = box[axis].start, box[axis].stop
                size = ceil((stop - start) / mesh[i])
                low, high = (min(start + size * k, stop) for k in (place[i], place[i] + 1))
                box[axis] = slice(low, high)
        found.append(Held(tuple(box), tuple(k for k, axis in zip(place, cuts, strict=True) if axis is None)))
    return found


def units(key: Hashable, shape: tuple[int, ...], route: Route, holders: list[Held]) -> Iterator[Unit]:
    """The parameter whole; a stack of matrices in ranges, as many as ranks, cut where the ranks' parts are."""
    count, rows, cols = route.matrices
    stacked = len(shape) > 2 and cols == shape[-1] and count % prod(shape[:-2]) == 0  # not a convolution
    n, ranks = shape[0], len(holders)
    even = {n * k // ranks for k in range(ranks)} | {h.box[0].start for h in holders} if stacked else {0}
    for start, stop in pairwise(sorted(even | {n})):
        size = stop - start
        yield Unit(key, start, (size, *shape[1:]), route._replace(matrices=(count * size // n, rows, cols)))


def part(box: Box, unit: Unit) -> Box | None:
    """Where the box, of the unit's parameter, lies in the unit; None where they have nothing in common."""
    low, high = max(box[0].start, unit.start), min(box[0].stop, unit.start + unit.shape[0])
    found = (slice(low - unit.start, high - unit.start), *box[1:])
    return found if all(s.start < s.stop for s in found) else None


def senders(unit: Unit, owner: int, holders: list[Held]) -> Iterator[tuple[int, Box]]:
    """The ranks that send their parts of the unit to its owner, of each part's copies the one nearest: (rank, part)."""
    for rank, h in enumerate(holders):
        where = part(h.box, unit)
        if where and h.copy == holders[owner].copy:
            yield rank, where


def receivers(unit: Unit, holders: list[Held]) -> Iterator[tuple[int, Box]]:
    """The ranks that hold a part of the unit, and so are sent its update: (rank, part)."""
    for rank, h in enumerate(holders):
        where = part(h.box, unit)
        if where:
            yield rank, where


def plan(arrays: dict[Hashable, tuple[tuple[int, ...], Route, Hashable, list[Held]]]) -> list[list[tuple[Unit, int]]]:
    """Batches of (unit, owner), from {key: (shape, route, kind, what each rank holds)}: units of one shape and kind.

    A batch holds as many entries a rank as one of `zeta.layout.batches`, or a matrix a rank if that is more.
    """
    ranks = max(len(holders) for _, _, _, holders in arrays.values())
    found = [u for key, (shape, route, _, holders) in arrays.items() for u in units(key, shape, route, holders)]
    able = [[r for r, h in enumerate(arrays[u.key][3]) if part(h.box, u) == whole(u.shape)] for u in found]
    costs = [sum(n * flops(rows, cols) for n, rows, cols in shapes(u.route)) for u in found]
    cap = max(ranks * BATCH_ENTRIES, sum(prod(u.shape) for u in found) // 8)
    done: list[list[tuple[Unit, int]]] = []
    unfinished: dict[Hashable, list[tuple[Unit, int]]] = {}
    for unit, owner in zip(found, balance(costs, ranks, able), strict=True):
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
    loads, found = [0.0] * ranks, [0] * len(costs)
    share = SLACK * sum(costs) / ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = min((able and able[i]) or range(ranks), key=loads.__getitem__)
        if loads[rank] and loads[rank] + costs[i] > share:
            rank = min(range(ranks), key=loads.__getitem__)
        found[i] = rank
        loads[rank] += costs[i]
    return found


def sent(batches: list[list[tuple[Unit, int]]], holders: Mapping[Hashable, list[Held]]) -> list[int]:
    """The entries that each rank sends to others in a step; one for each row tells whether its gradient is zero."""
    entries = [0] * max(map(len, holders.values()))
    for unit, owner in (task for batch in batches for task in batch):
        for rank, at in senders(unit, owner, holders[unit.key]):
            entries[rank] += (rank != owner) * (prod(size(at)) + prod(size(across(at, unit.route))))
        for rank, at in receivers(unit, holders[unit.key]):
            entries[owner] += (rank != owner) * prod(size(at))
    return entries


def across(box: Box, route: Route) -> Box:
    """The box with the axis that is not cut into parts taken as one entry."""
    axis = len(box) - 3 - route.axis
    return (*box[:axis], slice(0, 1), *box[axis + 1 :])


def size(box: Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)


def whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, n) for n in shape)
