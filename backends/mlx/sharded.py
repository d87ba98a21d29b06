"""A rule's step where every rank of a group holds some rows of each parameter, as `mlx.nn.fully_shard` leaves them.

`local` runs on the rows. Then the ranks gather x, the entries of `whole`'s state, and sums; each matrix is
orthogonalised by one of them, `whole` runs on all, and each keeps its rows of what comes out. What has no number for
every entry (row means, factors) is whole on every rank. A rank receives, for each entry of the whole model's matrices,
four bytes of x, four of each array of entries that `whole` keeps, and two or four of u, the dtype of its products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import mlx.core as mx

from zeta import stages
from zeta.core import Hyper, Keeps, Orthogonalize, Rule, flat_axes
from zeta.routing.layout import Route, batches, piece, shapes
from zeta.stages import entries
from zeta.storage import joined

from .ranks import Messages
from .stacks import Arrays, Batch, on_stacks


def whole_shape(rows: mx.array, ranks: int) -> tuple[int, ...]:
    """The shape of the parameter that these are one rank's rows of."""
    return ranks * rows.shape[0], *rows.shape[1:]


def is_shard(p: mx.array, route: Route) -> bool:
    """Whether p has fewer entries than the matrices of its route."""
    return p.size < prod(route.matrices)


def update(
    rule: Rule,
    hyper: Hyper,
    routes: dict[str, Route],
    grads: Arrays,
    states: dict[str, Arrays],
    params: Arrays,
    messages: Messages,
    share: Callable[[list[Batch]], list[Orthogonalize]],
) -> Iterator[tuple[str, tuple[mx.array, Arrays]]]:
    """(name, (param, state)) after one step, of each parameter of `routes`: this rank's rows, float32 or better."""
    sums = {f"sum {key}": shape for key, (_, shape) in rule.summed.items()}
    kinds = {"x": entries} | {key: rule.keeps[key] for key in rule.carried} | sums
    moments, own = dict[str, Arrays](), dict[str, Arrays]()
    for name, route in routes.items():
        g, state = grads[name].astype(params[name].dtype), states[name]
        x, moments[name] = rule.local(g, {k: state[k] for k in rule.keeps.keys() - rule.carried}, hyper, stages)
        own[name] = {"x": x} | {key: state[key] for key in rule.carried} | _sums(rule, g, route, messages)

    todo = list(batches({name: (route, params[name].dtype) for name, route in routes.items()}))
    arrays = _ahead(todo, own, kinds, messages)
    full = {name: whole_shape(params[name], messages.group.size()) for name in routes}
    work = zip(todo, arrays, share(todo), strict=True)
    for name, after in on_stacks(partial(_second_half, rule, hyper), kinds, routes, full, work):
        start = messages.group.rank() * params[name].shape[0]
        rows = slice(start, start + params[name].shape[0])
        new = {k: mx.contiguous(a[rows]) if kinds[k] is entries else a for k, a in after.items()}  # a view keeps all
        p = stages.apply(params[name], new.pop("x"), hyper.lr, hyper.weight_decay)
        messages.last += [p, *new.values()]  # what is whole is gone before more is gathered
        yield name, (p, moments[name] | new)


def _sums(rule: Rule, g: mx.array, route: Route, messages: Messages) -> Arrays:
    """The sums over this rank's rows, for all of the parameter's matrices: the other ranks' rows are zero."""
    before, after = messages.group.rank(), messages.group.size() - messages.group.rank() - 1
    rows: Any = [(before * g.shape[0], after * g.shape[0])]
    full = mx.pad(g, rows + [(0, 0)] * (g.ndim - 1))
    pieces = [piece(full, route, i).reshape(shape) for i, shape in enumerate(shapes(route))]
    return {
        f"sum {key}": joined([getattr(stages, stage)(x, flat_axes(shape)) for x in pieces], shape, route, ())
        for key, (stage, shape) in rule.summed.items()
    }


def _ahead(todo: list[Batch], own: dict[str, Arrays], kinds: Keeps, messages: Messages) -> Iterator[dict[str, Arrays]]:
    """What was gathered by each batch's turn: the next one's, too, so that its owner need not wait for this one's."""
    arrays: dict[str, Arrays] = {}
    for k in range(len(todo)):
        for batch in todo[k : k + 2]:
            names = dict.fromkeys(name for name, _ in batch if name not in arrays)
            arrays |= _gathered({name: own[name] for name in names}, kinds, messages) if names else {}
        yield arrays


def _gathered(own: dict[str, Arrays], kinds: Keeps, messages: Messages) -> dict[str, Arrays]:
    """What every rank has of these, in one message: entries whole, sums added up; the other state as it is."""
    sent = [(n, k, a) for n, kept in own.items() for k, a in kept.items() if kinds[k] is entries or k[:4] == "sum "]
    parts = messages.all_gather(mx.concatenate([a.reshape(1, -1) for _, _, a in sent], axis=1))  # (ranks, all)
    wholes = {name: dict(kept) for name, kept in own.items()}
    for (name, key, a), end in zip(sent, accumulate(a.size for _, _, a in sent), strict=True):
        x = parts[:, end - a.size : end]
        shape = whole_shape(a, len(parts))
        wholes[name][key] = x.reshape(shape) if kinds[key] is entries else x.sum(axis=0)
    return wholes


def _second_half(rule: Rule, hyper: Hyper, stacks: Arrays, orthogonalize: Orthogonalize) -> Arrays:
    """u, as x, and the state of `whole`; a matrix whose gradient is zero is not moved."""
    sums, state = {key: stacks[f"sum {key}"] for key in rule.summed}, {key: stacks[key] for key in rule.carried}
    u, state = rule.whole(stacks["x"], sums, state, hyper, lambda x: orthogonalize(x).astype(x.dtype), stages)
    return {"x": u * (sums["moved"] > 0).astype(u.dtype), **state}
