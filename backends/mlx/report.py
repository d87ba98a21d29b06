"""What an MLX optimizer's step did to its matrices: kept in its state, so that a compiled step, too, measures."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from zeta.routing.layout import Route, piece
from zeta.stages import squares
from zeta.step_report import Row, error, labels, rows, signs

from .stacks import Batch as Pieces

KEY = "zeta_report"  # in the optimizer's state: {batch: (4, N)}, squares of u, errors, rates, squares of the weights


class Batch(NamedTuple):
    """What of a batch (N, rows, cols) is no array: each parameter in it, and how many of its matrices."""

    counts: list[tuple[str, int]]
    shape: tuple[int, ...]


def of_batch(u: mx.array, lr: Any, exact: bool) -> mx.array:
    """(3, N): the squares of u (N, rows, cols), errors and rates, nothing of it computed yet."""
    probe = None if exact else mx.array(signs(min(u.shape[-2:]))).astype(u.dtype)
    size = squares(u, (-2, -1))
    figures = [size, error(u, size, probe), mx.broadcast_to(mx.array(lr), size.shape)]
    return mx.stack([figure.reshape(-1) for figure in figures])


def of_weights(batch: Pieces, params: dict[str, mx.array], routes: dict[str, Route]) -> mx.array:
    """(1, N): the squares of the batch's weights, likewise."""
    stacks = (piece(params[name], routes[name], i).reshape(shape) for (name, i), shape in batch.items())
    return mx.concatenate([squares(stack, (-2, -1)).reshape(1, -1) for stack in stacks], axis=1)


def read(batches: list[Batch], state: dict[str, mx.array]) -> Iterable[Row]:
    """The rows of all batches."""
    for i, (batch, called) in enumerate(zip(batches, labels(batch.counts for batch in batches), strict=True)):
        figures: Any = state[str(i)].tolist()
        yield from rows(called, batch.shape, figures[2][0], [figures[0], figures[3], figures[1]])
