"""A rule's step where every rank of a group holds some rows of each parameter, as `mlx.nn.fully_shard` leaves them.

`local` runs on the rows. Then the ranks gather x and the entries of `whole`'s state, and add up the sums; each matrix
is orthogonalised by one of them, `whole` runs on all, and each keeps its rows of what comes out. What has no number for
every entry (row means, factors) is whole on every rank. A rank receives, for each entry of the whole model's matrices,
four bytes of x, four of each array of entries that `whole` keeps, and two or four of u, the dtype of its products.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from typing import Any

import mlx.core as mx

from zeta import stages
from zeta.core import Hyper, Orthogonalize, Rule, flat_axes
from zeta.routing.layout import Route, batches, piece, shapes
from zeta.stages import entries
from zeta.storage import whole

from .ranks import Messages
from .stacks import Arrays, Batch, on_stacks


def whole_shape(shard: mx.array, ranks: int) -> tuple[int, ...]:
    """The shape of the parameter that this is one rank's rows of."""
    return ranks * shard.shape[0], *shard.shape[1:]


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
    todo = list(batches({n: (r, params[n].dtype) for n, r in routes.items()}))
    g = {n: grads[n].astype(params[n].dtype) for n in routes}
    local = {n: rule.local(g[n], {k: states[n][k] for k in rule.keeps.keys() - rule.carried}, hyper, stages) for n in g}
    like_x = [key for key in rule.carried if rule.keeps[key] is entries]
    flat = {n: {key: states[n][key] for key in rule.carried if key not in like_x} for n in routes}

    def gather(names: list[str]) -> dict[str, Arrays]:
        rows = {n: {"x": local[n][0]} | {key: states[n][key] for key in like_x} for n in names}
        sums = {n: _sums(rule, g[n], routes[n], messages) for n in names}
        wholes, totals = _gathered(rows, messages), _added(sums, messages)
        return {n: wholes[n] | totals[n] | flat[n] for n in names}

    def second_half(stacks: Arrays, orthogonalize: Orthogonalize) -> Arrays:
        x, sums = stacks["x"], {key: stacks[f"sum {key}"] for key in rule.summed}
        carried = {key: stacks[key] for key in rule.carried}
        u, state = rule.whole(x, sums, carried, hyper, lambda x: orthogonalize(x).astype(x.dtype), stages)
        return {"x": u * (sums["moved"] > 0).astype(u.dtype), **state}

    kinds = {"x": entries} | {key: rule.keeps[key] for key in rule.carried}
    kinds |= {f"sum {key}": shape for key, (_, shape) in rule.summed.items()}
    ranks, rank = messages.group.size(), messages.group.rank()
    wholes = {n: whole_shape(params[n], ranks) for n in routes}
    work = zip(todo, _ahead(todo, gather), share(todo), strict=True)
    for name, after in on_stacks(second_half, kinds, routes, wholes, work).items():
        p = params[name]
        own = slice(rank * p.shape[0], (rank + 1) * p.shape[0])
        u = after.pop("x")[own]
        carried = {key: mx.contiguous(a[own]) if key in like_x else a for key, a in after.items()}  # a view keeps all
        yield name, (stages.apply(p, u, hyper.lr, hyper.weight_decay), local[name][1] | carried)


def _ahead(todo: list[Batch], gather: Callable[[list[str]], dict[str, Arrays]]) -> Iterator[dict[str, Arrays]]:
    """What was gathered by each batch's turn: the next one's, too, so that its owner need not wait for this one's."""
    arrays: dict[str, Arrays] = {}
    for k in range(len(todo)):
        for batch in todo[k : k + 2]:
            names = [name for name in dict.fromkeys(name for name, _ in batch) if name not in arrays]
            arrays |= gather(names) if names else {}
        yield arrays


def _gathered(rows: dict[str, Arrays], messages: Messages) -> dict[str, Arrays]:
    """The whole arrays of every rank's rows, which take one message."""
    ranks = messages.group.size()
    flat = [a.reshape(1, -1) for arrays in rows.values() for a in arrays.values()]
    parts = iter(_split(messages.all_gather(mx.concatenate(flat, axis=1)), flat))
    return {n: {k: next(parts).reshape(whole_shape(a, ranks)) for k, a in arrays.items()} for n, arrays in rows.items()}


def _added(sums: dict[str, Arrays], messages: Messages) -> dict[str, Arrays]:
    """The sums over all ranks' rows, which take one message."""
    flat = [a.reshape(1, -1) for arrays in sums.values() for a in arrays.values()]
    parts = iter(_split(messages.all_sum(mx.concatenate(flat, axis=1)), flat))
    return {n: {key: next(parts).reshape(-1) for key in arrays} for n, arrays in sums.items()}


def _split(x: mx.array, parts: list[mx.array]) -> list[mx.array]:
    """x (n, sizes of all) along its last axis, as the parts were put together."""
    ends = list(accumulate(a.size for a in parts))
    return [x[:, end - a.size : end] for a, end in zip(parts, ends, strict=True)]


def _sums(rule: Rule, g: mx.array, route: Route, messages: Messages) -> Arrays:
    """The sums over this rank's rows, for all of the parameter's matrices: the other ranks' rows are zero."""
    before, after = messages.group.rank(), messages.group.size() - messages.group.rank() - 1
    rows: Any = [(before * g.shape[0], after * g.shape[0])]
    full = mx.pad(g, rows + [(0, 0)] * (g.ndim - 1))
    pieces = [piece(full, route, i).reshape(view) for i, view in enumerate(shapes(route))]
    return {
        f"sum {key}": whole([getattr(stages, stage)(x, flat_axes(shape)) for x in pieces], shape, route, ())
        for key, (stage, shape) in rule.summed.items()
    }
