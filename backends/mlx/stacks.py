"""A rule's work on stacks: the matrices of one shape, of whichever parameters, in one call."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import mlx.core as mx

from zeta.core import Keeps, Orthogonalize
from zeta.routing.layout import Route, shapes
from zeta.stages import Shape
from zeta.storage import joined, piece_of, stack_shape

Arrays = dict[str, mx.array]
Batch = dict[tuple[str, int], tuple[int, ...]]  # {(name, i): (count, rows, cols)}, as `zeta.routing.layout.batches`


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
