"""One step over the ranks of torch.distributed: matrices go to their owners, and updates come back.

`zeta.sharding` plans it. A rule's first half runs where the entries are; x, sums over the gradient and the state of the
second half go to a matrix's owner; u and that state come back. Of that state, what has a number for every entry lies as
its parameter does; all else is whole on every rank, so that the owner reads its own and sends the new one to all.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from zeta.core import Hyper, Rule
from zeta.routing.layout import Route, batches, piece, shapes
from zeta.sharding import Box, Lines, Unit, box_size, lines, overlap, plan, receivers, senders, sum_size
from zeta.stages import entries
from zeta.storage import piece_of, stack_shape

from . import step as torch_step
from . import sums as torch_sums
from .mail import Mail
from .orthogonalize import stack, unstack
from .placement import Place, mine

Way = tuple[int, Box, tuple[Lines, Lines]]  # (the rank at the other end, which part of a unit, rows and columns in it)


class Task(NamedTuple):
    """A unit of work, and all that can be known of it before a step."""

    unit: Unit
    route: Route  # of the whole parameter
    place: Place
    owner: int
    rows: slice | None  # of this rank's part of the parameter; None where it has none of the unit
    senders: list[Way]
    receivers: list[Way]


class Whole(NamedTuple):
    """What the owner of a unit puts together."""

    x: Tensor  # of the unit's shape; later u
    state: dict[str, Tensor]  # of the unit's shape each
    sums: dict[str, Tensor]


def tasks(routes: dict[Tensor, Route], places: dict[Tensor, Place]) -> list[list[Task]]:
    """Batches of tasks for parameters with places in one process group: the same on all ranks but for `rows`."""
    arrays: dict[Any, Any] = {p: (tuple(p.shape), r, p.dtype, places[p].holders) for p, r in routes.items()}
    return [[_task(unit, owner, routes, places) for unit, owner in batch] for batch in plan(arrays)]


def _task(unit: Unit, owner: int, routes: dict[Any, Route], places: dict[Any, Place]) -> Task:
    place, rows = places[unit.key], None
    where = overlap(place.box, unit)
    if where:
        start = unit.start + where[0].start - place.box[0].start
        rows = slice(start, start + where[0].stop - where[0].start)
    ways = senders(unit, owner, place.holders), receivers(unit, place.holders)
    both = [[(rank, at, lines(unit, at)) for rank, at in way] for way in ways]
    return Task(unit, routes[unit.key], place, owner, rows, *both)


def step(
    rule: Rule, states: Any, grads: Any, options: dict[str, Any], batch: list[Task], comm: torch.dtype | None
) -> Iterator[None]:
    """`rule.update` for a batch, in place. Pauses while matrices travel, and again while their updates do."""
    (group, holders, me), p = batch[0].place, cast(Tensor, batch[0].unit.key)
    wide = torch.promote_types(p.dtype, torch.float32)
    hyper, wire = torch_step.settings(options, p.device), comm or wide
    flat = [key for key in rule.carried if rule.keeps[key] is not entries]

    mail = Mail(len(holders), wire, wide, p.device)
    first_half(rule, states, grads, options, hyper, [t for t in batch if t.rows], mail)
    own = [t for t in batch if t.owner == me]
    expect(rule, own, mail)
    mail.post(group if any(rank != t.owner for t in batch for rank, _, _ in t.senders) else None)
    yield
    mail.wait()
    wholes = [put_together(rule, t, mail) for t in own]

    mail = Mail(len(holders), wire, wide, p.device)
    second_half(rule, states, options, hyper, own, wholes)
    for t, whole in zip(own, wholes, strict=True):
        for rank, at, _ in t.receivers:
            mail.send(rank, mail.wire, whole.x[at])
            for value in whole.state.values():
                mail.send(rank, mail.wide, value[at])
        for rank in range(len(holders)):
            for value in flat_state(rule, states, t) if rank != me else ():
                mail.send(rank, mail.wide, value)
    for t in batch:
        for _, at, _ in (way for way in t.receivers if way[0] == me):
            mail.expect(t.owner, mail.wire, box_size(at))
            for _ in range(len(rule.carried) - len(flat)):
                mail.expect(t.owner, mail.wide, box_size(at))
        for value in flat_state(rule, states, t) if t.owner != me else ():
            mail.expect(t.owner, mail.wide, tuple(value.shape))
    mail.post(group if flat or any(rank != t.owner for t in batch for rank, _, _ in t.receivers) else None)
    yield
    mail.wait()
    finish(rule, states, hyper, batch, mail)


def first_half(rule: Rule, states: Any, grads: Any, options: Any, hyper: Hyper, here: list[Task], mail: Mail) -> None:
    """The rule's first half on this rank's parts; into the mail goes what their owners need of them."""
    if not here:
        return
    me = here[0].place.rank
    g = [view(grads[t.unit.key], t).to(mail.wide, copy=True) for t in here]
    if options["maximize"]:
        torch._foreach_neg_(g)
    sends = [next((sides for rank, _, sides in t.senders if rank == me), None) for t in here]
    sums = [
        [torch_sums.of_part(x, sides, stage, shape) for stage, shape in rule.summed.values()] if sides else []
        for x, sides in zip(g, sends, strict=True)
    ]  # before x is written over the gradient
    moments = [key for key in rule.keeps if key not in rule.carried]
    torch_step.local(rule, g, {key: [view(states[t.unit.key][key], t) for t in here] for key in moments}, hyper)
    for t, x, sides, tensors in zip(here, g, sends, sums, strict=True):
        if sides:
            mail.send(t.owner, mail.wire, x)
            for value in [view(states[t.unit.key][key], t) for key in like_x(rule)] + tensors:
                mail.send(t.owner, mail.wide, value)


def expect(rule: Rule, own: list[Task], mail: Mail) -> None:
    """Tells the mail what `first_half` of all ranks sends to an owner."""
    for t in own:
        for rank, at, _ in t.senders:
            mail.expect(rank, mail.wire, box_size(at))
            for _ in like_x(rule):
                mail.expect(rank, mail.wide, box_size(at))
            for _, shape in rule.summed.values():
                mail.expect(rank, mail.wide, sum_size(shape, t.unit, at))


def put_together(rule: Rule, t: Task, mail: Mail) -> Whole:
    """A unit of what its senders sent."""
    arrays, sums = dict[str, Tensor](), {key: list[Any]() for key in rule.summed}
    for _, at, sides in t.senders:
        parts = {"x": mail.take(mail.wire)} | {key: mail.take(mail.wide) for key in like_x(rule)}
        for key, value in parts.items():
            if box_size(at) == t.unit.shape:
                arrays[key] = value
            else:
                arrays.setdefault(key, value.new_empty(t.unit.shape))[at] = value
        for key in rule.summed:
            sums[key].append((sides, mail.take(mail.wide)))
    totals = {k: torch_sums.put_together(sums[k], t.unit, shape) for k, (_, shape) in rule.summed.items()}
    return Whole(arrays.pop("x"), arrays, totals)


def second_half(rule: Rule, states: Any, options: Any, hyper: Hyper, own: list[Task], wholes: list[Whole]) -> None:
    """Each x becomes u, and the state that was put together, or that this rank has whole, what it is after the step."""
    routes = {i: t.unit.route for i, t in enumerate(own)}
    for batch in batches({i: (r, None) for i, r in routes.items()}):
        stacked, names = list(batch.values()), rule.summed
        x = [piece(wholes[i].x, routes[i], k) for i, k in batch]
        kept = {key: [piece(wholes[i].state[key], routes[i], k) for i, k in batch] for key in like_x(rule)}
        kept |= {
            key: [flat_piece(rule, key, states, own[i], k) for i, k in batch] for key in rule.carried if key not in kept
        }
        sums = {
            key: torch.cat([torch_sums.of_piece(wholes[i].sums[key], shape, routes[i], k) for i, k in batch])
            for key, (_, shape) in names.items()
        }
        state = {key: stack(kept[key], [stack_shape(rule.keeps[key], v) for v in stacked]) for key in rule.carried}
        wide = next(iter(sums.values())).dtype
        u, state = torch_step.whole(rule, stack(x, stacked).to(wide), sums, state, options, hyper)
        for old, new in [(x, u), *((kept[key], value) for key, value in state.items())]:
            torch._foreach_copy_(old, unstack(new, old))


def finish(rule: Rule, states: Any, hyper: Hyper, batch: list[Task], mail: Mail) -> None:
    """Moves this rank's parts, and takes in the state that came back with their updates."""
    updates = []
    here, me = [t for t in batch if t.rows], batch[0].place.rank
    for t in batch:
        if t.rows:
            updates.append(mail.take(mail.wire))
            for key in like_x(rule):
                view(states[t.unit.key][key], t).copy_(mail.take(mail.wide))
        for value in flat_state(rule, states, t) if t.owner != me else ():
            value.copy_(mail.take(mail.wide))
    if here:
        params = [view(t.unit.key, t) for t in here]
        rests = [view(states[t.unit.key]["remainder"], t) for t in here if "remainder" in states[t.unit.key]]
        torch_step.apply(params, rests, [u.to(mail.wide) for u in updates], hyper)


def like_x(rule: Rule) -> list[str]:
    """The keys of the second half's state that has a number for every entry."""
    return [key for key in rule.carried if rule.keeps[key] is entries]


def flat_state(rule: Rule, states: Any, t: Task) -> list[Tensor]:
    """The second half's other state of a unit, which all ranks have whole: views, piece by piece."""
    keys = [key for key in rule.carried if rule.keeps[key] is not entries]
    return [flat_piece(rule, key, states, t, i) for key in keys for i in range(len(shapes(t.route)))]


def flat_piece(rule: Rule, key: str, states: Any, t: Task, i: int) -> Tensor:
    """That of the i-th piece (count, ...) of each of a unit's matrices."""
    kept, (count, _, _) = rule.keeps[key], t.unit.route.matrices
    stored: Tensor = piece_of(states[t.unit.key][key], kept, t.route, i)
    start = t.unit.start * count // t.unit.shape[0]
    return stored.view(stack_shape(kept, shapes(t.route)[i]))[start : start + count]


def publish(params: list[Tensor], places: dict[Tensor, Any]) -> Iterator[None]:
    """Every rank's part of each parameter to all other ranks. Pauses while they travel."""
    place, dtype = places[params[0]], params[0].dtype
    mail = Mail(len(place.holders), dtype, dtype, params[0].device)
    for p in params:
        for rank, held in enumerate(places[p].holders):
            mail.send(rank, dtype, mine(p, places[p]))
            mail.expect(rank, dtype, box_size(held.box))
    mail.post(place.group)
    yield
    mail.wait()
    for p in params:
        for held in places[p].holders:
            p[held.box].copy_(mail.take(dtype))


def view(t: Any, task: Task) -> Tensor:
    """This rank's part of the unit, of a parameter, its gradient or its state."""
    assert task.rows is not None
    return mine(t, task.place)[task.rows]
