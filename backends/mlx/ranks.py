"""Newton-Schulz sharded over the ranks of an `mx.distributed.Group` that hold the same parameters and gradients.

Each matrix is orthogonalised by one rank, and all ranks receive the result: `all_gather`, which every backend of MLX
has. MLX runs collectives in whatever order a rank's graph is walked, and here the graphs differ from rank to rank. So
the order is fixed: a step starts on the device what its gradients wait for, then itself, before anything else can; and
within the step, which `mx.compile` may make part of a larger graph, `mx.depends` puts one message after another.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from zeta.coefficients import Steps
from zeta.core import Orthogonalize
from zeta.newton_schulz_forms import flops
from zeta.sharding import balance

from .stacks import Batch

Stack = tuple[int, ...]  # (count, rows, cols)


def together(grads: dict[str, mx.array], group: mx.distributed.Group | None) -> dict[str, mx.array]:
    """The gradients, none of them there before all are: whatever averages them comes first on every rank."""
    arrays = list(grads.values())
    if not group or not grads:
        return grads
    dispatch(arrays)
    return dict(zip(grads, mx.depends(arrays, arrays), strict=True))


def dispatch(arrays: Any) -> None:
    """Starts the work for a tree of arrays, without waiting, where it can be: not inside `mx.compile`."""
    try:
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
    except ValueError as error:
        if "graph transformation" not in str(error):
            raise


class Messages:
    """What the ranks of a group send one another, in the order of these calls, whatever the graph around them."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group, self.last = group, list[mx.array]()  # what there must be before more is sent

    def all_gather(self, x: mx.array) -> mx.array:
        """(ranks n, ...) of every rank's x (n, ...)."""
        self.last = [mx.distributed.all_gather(mx.depends([x], [x, *self.last])[0], group=self.group)]
        return self.last[0]


def shared(
    orthogonalize: Orthogonalize, coefficients: Steps, messages: Messages | None, todo: Sequence[Batch]
) -> list[Orthogonalize]:
    """`orthogonalize` for each batch of a step, with each matrix done by one rank; to be called in this order."""
    if messages is None:
        return [orthogonalize for _ in todo]
    stacks = [(sum(count for count, *_ in batch.values()), *next(iter(batch.values()))[1:]) for batch in todo]
    owners = plan(stacks, coefficients, messages.group.size())
    return [partial(_share, own, orthogonalize, messages) for own in owners]


def plan(stacks: Sequence[Stack], coefficients: Steps, ranks: int) -> list[list[int]]:
    """The owner of each matrix of each stack, such that the ranks have equal work over all stacks."""
    costs = [flops(rows, cols, coefficients) for count, rows, cols in stacks for _ in range(count)]
    owners = iter(balance(costs, ranks))
    return [[next(owners) for _ in range(count)] for count, _, _ in stacks]


def _share(owners: list[int], orthogonalize: Orthogonalize, messages: Messages, x: mx.array) -> mx.array:
    """u (count, rows, cols) for x (count, rows, cols); the owner, too, uses what was gathered."""
    group = messages.group
    held = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(group.size())]
    most = max(map(len, held))  # all ranks must send the same shape
    own = held[group.rank()]
    u = mx.pad(orthogonalize(x[mx.array(own, mx.int32)]), [(0, most - len(own)), (0, 0), (0, 0)])
    gathered = messages.all_gather(mx.depends([u], [x])[0])  # of a rank that owns nothing, too, not before there is x
    place = {i: rank * most + k for rank, ids in enumerate(held) for k, i in enumerate(ids)}
    return gathered[mx.array([place[i] for i in range(len(owners))])]
