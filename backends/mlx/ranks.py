"""Newton-Schulz shared out over the ranks of an `mx.distributed.Group` that hold the same parameters and gradients.

Each matrix is orthogonalised by one rank, and all ranks receive the result: `all_gather`, which every backend of MLX
has. MLX runs collectives in whatever order a rank's graph is walked, and here the graphs differ from rank to rank. So
the order is fixed: a step starts on the device what its gradients wait for, then itself, before anything else can; and
within the step, which `mx.compile` may make part of a larger graph, `mx.depends` puts one message after another.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from zeta.coefficients import Steps
from zeta.core import Orthogonalize
from zeta.newton_schulz_forms import flops
from zeta.sharding import balance

Stack = tuple[int, ...]  # (count, rows, cols)


def together(grads: dict[str, mx.array], group: mx.distributed.Group | None) -> dict[str, mx.array]:
    """The gradients, none of them there before all are: whatever averages them comes first on every rank."""
    found = list(grads.values())
    if not group or not grads:
        return grads
    dispatch(found)
    return dict(zip(grads, mx.depends(found, found), strict=True))


def dispatch(arrays: Any) -> None:
    """Starts the work for a tree of arrays, without waiting, where it can be: not inside `mx.compile`."""
    try:
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
    except ValueError as error:
        if "graph transformation" not in str(error):
            raise


def shared(
    orthogonalize: Orthogonalize,
    stacks: Sequence[Stack],
    coefficients: Steps,
    group: mx.distributed.Group | None,
) -> Iterator[Orthogonalize]:
    """`orthogonalize` for each stack of a step, with each matrix done by one rank; to be called in this order."""
    if group is None:
        yield from (orthogonalize for _ in stacks)
        return
    before: list[mx.array] = []  # what was gathered last
    for owners in plan(stacks, coefficients, group.size()):
        yield partial(_share, owners, orthogonalize, group, before)


def plan(stacks: Sequence[Stack], coefficients: Steps, ranks: int) -> list[list[int]]:
    """The owner of each matrix of each stack, such that the ranks have equal work over all stacks."""
    costs = [flops(rows, cols, coefficients) for count, rows, cols in stacks for _ in range(count)]
    owners = iter(balance(costs, ranks))
    return [[next(owners) for _ in range(count)] for count, _, _ in stacks]


def _share(
    owners: list[int], orthogonalize: Orthogonalize, group: mx.distributed.Group, before: list[mx.array], x: mx.array
) -> mx.array:
    """u (count, rows, cols) for x (count, rows, cols), after `before`; the owner, too, uses what was gathered."""
    held = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(group.size())]
    most = max(map(len, held))  # all ranks must send the same shape
    own = held[group.rank()]
    u = mx.pad(orthogonalize(x[mx.array(own, mx.int32)]), [(0, most - len(own)), (0, 0), (0, 0)])
    before[:] = [mx.distributed.all_gather(mx.depends([u], [x, *before])[0], group=group)]
    place = {i: rank * most + k for rank, ids in enumerate(held) for k, i in enumerate(ids)}
    return before[0][mx.array([place[i] for i in range(len(owners))])]
