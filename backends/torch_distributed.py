"""One step over the ranks of torch.distributed: matrices go to their owners, and updates come back.

`zeta.sharing` plans it. Whitened matrices and updates alone go over the wire; moments stay with the rank that keeps
them.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from zeta.layout import Route, batches, piece
from zeta.sharing import Unit, across, part, plan, receivers, senders, size, whole

from .torch_newton_schulz import matrix_norm, newton_schulz_, stack, unstack
from .torch_places import Place, mine
from .torch_state import round_back, widen
from .torch_wire import Way, exchange, take, wait


class Task(NamedTuple):
    """A unit of work, and all that can be known of it before a step."""

    unit: Unit
    place: Place
    owner: int
    rows: slice | None  # of this rank's part of the parameter; None where it has none of the unit
    senders: list[Way]
    receivers: list[Way]


def tasks(routes: dict[Tensor, Route], places: dict[Tensor, Place]) -> list[list[Task]]:
    """Batches of tasks for parameters with places in one process group: the same on all ranks but for `rows`."""
    arrays: dict[Any, Any] = {p: (tuple(p.shape), r, p.dtype, places[p].holders) for p, r in routes.items()}
    return [[_task(unit, owner, places) for unit, owner in batch] for batch in plan(arrays)]


def _task(unit: Unit, owner: int, places: dict[Any, Place]) -> Task:
    place, rows = places[unit.key], None
    where = part(place.box, unit)
    if where:
        start = unit.start + where[0].start - place.box[0].start
        rows = slice(start, start + where[0].stop - where[0].start)
    ways = senders(unit, owner, place.holders), receivers(unit, place.holders)
    return Task(unit, place, owner, rows, list(ways[0]), list(ways[1]))


def step(
    states: Any, grads: Any, options: dict[str, Any], batch: list[Task], comm: torch.dtype | None
) -> Iterator[None]:
    """`zeta.core.update` for a batch, in place. Pauses while matrices travel, and again while their updates do."""
    (group, _, me), p = batch[0].place, cast(Tensor, batch[0].unit.key)
    wide = torch.promote_types(p.dtype, torch.float32)
    wire = comm or wide
    here, own = [t for t in batch if t.rows], [t for t in batch if t.owner == me]

    send = outgoing(batch)
    for task, *tensors in zip(here, *whiten(states, grads, options, here), strict=True):
        if any(rank == me for rank, _ in task.senders):
            send[task.owner] += tensors
    ways = [(rank, cut) for t in own for rank, at in t.senders for cut in (at, across(at, t.unit.route))]
    travels = any(rank != t.owner for t in batch for rank, _ in t.senders)
    arriving, work = exchange(send, ways, wire if travels else wide, p.device, group if travels else None)
    yield
    wait(work)
    arrived = take(arriving, ways)
    wholes = [assemble(t, arrived) for t in own]
    orthogonalize(own, wholes, options)

    send = outgoing(batch)
    for t, (u, _) in zip(own, wholes, strict=True):
        for rank, at in t.receivers:
            send[rank].append(u[at])
    ways = [(t.owner, at) for t in here for rank, at in t.receivers if rank == me]
    travels = any(rank != t.owner for t in batch for rank, _ in t.receivers)
    arriving, work = exchange(send, ways, wire if travels else wide, p.device, group if travels else None)
    yield
    wait(work)
    move(states, options, here, list(take(arriving, ways)))


def whiten(states: Any, grads: Any, options: dict[str, Any], here: list[Task]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts of the whitened matrices, and where a gradient is not zero, each row (or column) as one."""
    if not here:
        return [], []
    (b1, b2), eps = options["betas"], options["eps"]
    m, v = ([view(states[t.unit.key][key], t) for t in here] for key in ("exp_avg", "exp_avg_sq"))
    g = [view(grads[t.unit.key], t).to(a.dtype) for t, a in zip(here, m, strict=True)]
    if options["maximize"]:
        g = list(torch._foreach_neg(g))
    torch._foreach_lerp_(m, g, 1 - b1)  # m = b1 m + (1 - b1) g
    torch._foreach_mul_(v, b2)
    torch._foreach_addcmul_(v, g, g, 1 - b2)  # v = b2 v + (1 - b2) g g
    x = torch._foreach_sqrt(v)
    torch._foreach_add_(x, eps)
    x = torch._foreach_div(m, x)  # m / (sqrt(v) + eps)
    return list(x), [(a != 0).any(-3 - t.unit.route.axis, keepdim=True) for t, a in zip(here, g, strict=True)]


def assemble(task: Task, arrived: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """(x of the unit's shape, where its gradient is not zero) from what its senders sent."""
    parts = [(at, next(arrived), next(arrived)) for _, at in task.senders]
    if len(parts) == 1:  # it was whole
        return parts[0][1:]
    x = parts[0][1].new_empty(task.unit.shape)
    moved = x.new_zeros(size(across(whole(task.unit.shape), task.unit.route)))
    for at, there, some in parts:
        x[at] = there
        moved[across(at, task.unit.route)] += some
    return x, moved


def orthogonalize(own: list[Task], wholes: list[tuple[Tensor, Tensor]], options: dict[str, Any]) -> None:
    """Each x becomes the update for lr 1: 0.2 sqrt(rows cols) / |u| u; zero for a matrix without a gradient."""
    routes = {i: t.unit.route for i, t in enumerate(own)}
    for batch in batches({i: (r, None) for i, r in routes.items()}):
        views = list(batch.values())
        pieces = [piece(wholes[i][0], routes[i], k) for i, k in batch]
        flags = [
            piece(wholes[i][1], routes[i], k).reshape(view[0], -1) for (i, k), view in zip(batch, views, strict=True)
        ]
        dtype = torch.promote_types(pieces[0].dtype, torch.float32)
        u = newton_schulz_(stack(pieces, views).to(dtype), options["coefficients"], options["ns_dtype"])
        moved = torch.cat([(flag != 0).any(1) for flag in flags]).to(dtype)[:, None, None]
        u = u * (0.2 * sqrt(u[0].numel()) * moved / (matrix_norm(u) + options["eps"]))
        for x, update in zip(pieces, unstack(u, pieces), strict=True):
            x.copy_(update)


def move(states: Any, options: dict[str, Any], here: list[Task], updates: list[Tensor]) -> None:
    """w = (1 - lr weight_decay) w - lr u, for this rank's parts."""
    if not here:
        return
    params = [view(t.unit.key, t) for t in here]
    rests = [view(states[t.unit.key]["remainder"], t) for t in here] if "remainder" in states[here[0].unit.key] else []
    wide = widen(params, rests) if rests else params
    lr = options["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(params[0].device, non_blocking=True)
    torch._foreach_mul_(wide, 1 - lr * options["weight_decay"])
    torch._foreach_sub_(wide, torch._foreach_mul([u.to(wide[0].dtype) for u in updates], lr))
    if rests:
        round_back(params, rests, wide)


def publish(params: list[Tensor], places: dict[Tensor, Any]) -> Iterator[None]:
    """Every rank's part of each parameter to all other ranks. Pauses while they travel."""
    first = places[params[0]]
    send = [[mine(p, places[p]) for p in params] for _ in first.holders]
    ways = [(rank, h.box) for p in params for rank, h in enumerate(places[p].holders)]
    arriving, work = exchange(send, ways, params[0].dtype, params[0].device, first.group)
    yield
    wait(work)
    arrived = take(arriving, ways)
    for p in params:
        for h in places[p].holders:
            p[h.box].copy_(next(arrived))


def view(t: Any, task: Task) -> Tensor:
    """This rank's part of the unit, of a parameter, its gradient or its state."""
    assert task.rows is not None
    return mine(t, task.place)[task.rows]


def outgoing(batch: list[Task]) -> list[list[Tensor]]:
    return [[] for _ in batch[0].place.holders]
