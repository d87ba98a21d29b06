"""What an MLX optimizer's step did to its matrices: kept in its state, so that a compiled step, too, measures."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from zeta.core import Array, Hyper, Orthogonalize, Rule, Stages, State, Step
from zeta.stages import squares
from zeta.step_report import Row, error, labels, rows, signs

KEY = "zeta_report"  # in the optimizer's state: {batch: (4, N)}, squares of u and of the weights, errors, rates


class Batch(NamedTuple):
    """What of a batch (N, rows, cols) is no array: each parameter in it, and how many of its matrices."""

    counts: list[tuple[str, int]]
    shape: tuple[int, ...]


def observed(rule: Rule, seen: list[mx.array]) -> Rule:
    """The rule, which adds the u that the weights take to `seen`."""

    def whole(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
        u, after = rule.whole(x, sums, state, hyper, orthogonalize, stages)
        seen.append(u * (sums["moved"] > 0))
        return u, after

    return rule._replace(whole=whole)


def of_batch(u: mx.array, weights: mx.array, lr: Any, exact: bool) -> mx.array:
    """(4, N), nothing of it computed yet."""
    probe = None if exact else mx.array(signs(min(u.shape[-2:]))).astype(u.dtype)
    size = squares(u, (-2, -1))
    figures = [size, squares(weights, (-2, -1)), error(u, size, probe), mx.broadcast_to(mx.array(lr), size.shape)]
    return mx.stack([figure.reshape(-1) for figure in figures])


def read(batches: list[Batch], state: dict[str, mx.array]) -> Iterable[Row]:
    """The rows of all batches."""
    for i, (batch, called) in enumerate(zip(batches, labels(batch.counts for batch in batches), strict=True)):
        figures: Any = state[str(i)].tolist()
        yield from rows(called, batch.shape, figures[3][0], figures[:3])
