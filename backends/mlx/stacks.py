"""A rule's work on stacks: the matrices of one shape, of whichever parameters, in one call."""

from collections.abc import Callable, Iterable
from itertools import accumulate

import mlx.core as mx

from zeta.core import Keeps, Orthogonalize
from zeta.routing.layout import Route
from zeta.storage import part, viewed, whole

Arrays = dict[str, mx.array]
Batch = dict[tuple[str, int], tuple[int, ...]]  # {(name, i): (count, rows, cols)}, as `zeta.routing.layout.batches`


def on_stacks(
    work: Callable[[Arrays, Orthogonalize], Arrays],
    kinds: Keeps,
    routes: dict[str, Route],
    shapes: dict[str, tuple[int, ...]],
    todo: Iterable[tuple[Batch, dict[str, Arrays], Orthogonalize]],
) -> dict[str, Arrays]:
    """{name: {key: array}} of what `work` makes of {key: stack}, for each batch and {name: {key: array}} of `todo`."""
    done: dict[str, dict[str, dict[int, mx.array]]] = {name: {} for name in routes}
    for batch, arrays, orthogonalize in todo:
        stacks = {}
        for key, kind in kinds.items():
            pieces = (part(arrays[n][key], kind, routes[n], i).reshape(viewed(kind, v)) for (n, i), v in batch.items())
            stacks[key] = mx.concatenate(list(pieces))
        ends = list(accumulate(count for count, *_ in batch.values()))[:-1]
        for key, stacked in work(stacks, orthogonalize).items():
            for (name, i), piece in zip(batch, mx.split(stacked, ends), strict=True):
                done[name].setdefault(key, {})[i] = piece
    return {  # batches finish the pieces of one parameter in any order
        name: {k: whole([own[i] for i in sorted(own)], kinds[k], routes[name], shapes[name]) for k, own in keys.items()}
        for name, keys in done.items()
    }
