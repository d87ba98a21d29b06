"""A rule's work on stacks: the matrices of one shape, of whichever parameters, in one call."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import accumulate
from math import prod

import mlx.core as mx

from zeta.core import Keeps, Orthogonalize
from zeta.routing.layout import BATCH_OPERATIONS, Route, batches, shapes
from zeta.stages import Shape
from zeta.storage import joined, piece_of, stack_shape

Arrays = dict[str, mx.array]
# At least so many entries go together, or a thirty-second of the model if that is more: beside its arrays a step holds
# up to ten times a batch (on a CPU, where MLX allocates up to a hundred operations ahead), a third of a large model.
# With 256 rows a product of so many takes an M1 a tenth of a millisecond, at 1e12 a second: longer than to start it.
BATCH_ENTRIES = 1 << 18
Batch = dict[tuple[str, int], tuple[int, ...]]  # {(name, i): (count, rows, cols)}, as `zeta.routing.layout.batches`


def in_batches(routes: dict[str, Route], kind: dict[str, Hashable], ranks: int = 1) -> list[Batch]:
    """The batches of a step, of which each of `ranks` takes an equal share."""
    total = sum(prod(route.matrices) for route in routes.values())
    most = ranks * max(BATCH_ENTRIES, total // 32)
    return list(batches({name: (r, kind[name]) for name, r in routes.items()}, most, ranks * BATCH_OPERATIONS))


def on_stacks(
    work: Callable[[Arrays, Orthogonalize], Arrays],
    kinds: Keeps,
    routes: dict[str, Route],
    full: dict[str, tuple[int, ...]],
    todo: Iterable[tuple[Batch, dict[str, Arrays], Orthogonalize]],
) -> Iterator[tuple[str, Arrays]]:
    """(name, {key: array}) of what `work` makes of {key: stack}, for each batch and {name: {key: array}} of `todo`.

    `full` has the parameters' shapes. One comes as soon as all its pieces are there, which batches finish in any order.
    """
    done: dict[str, dict[str, dict[int, mx.array]]] = {name: {} for name in routes}
    for batch, arrays, orthogonalize in todo:
        stacks = {key: _stack(batch, arrays, key, kind, routes) for key, kind in kinds.items()}
        ends = list(accumulate(count for count, *_ in batch.values()))[:-1]
        for key, stacked in work(stacks, orthogonalize).items():
            for (name, i), piece in zip(batch, mx.split(stacked, ends), strict=True):
                done[name].setdefault(key, {})[i] = piece
        for name in dict.fromkeys(name for name, _ in batch):
            route, kept = routes[name], done[name]
            if all(len(own) == len(shapes(route)) for own in kept.values()):
                pieces = {key: [own[i] for i in sorted(own)] for key, own in kept.items()}
                yield name, {key: joined(own, kinds[key], route, full[name]) for key, own in pieces.items()}


def _stack(batch: Batch, arrays: dict[str, Arrays], key: str, kind: Shape, routes: dict[str, Route]) -> mx.array:
    pieces = (piece_of(arrays[n][key], kind, routes[n], i).reshape(stack_shape(kind, v)) for (n, i), v in batch.items())
    return mx.concatenate(list(pieces))
