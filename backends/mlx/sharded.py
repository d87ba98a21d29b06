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
from zeta.core import Hyper, Keeps, Orthogonalize, Rule
from zeta.routing.layout import Route
from zeta.stages import entries

from .ranks import Messages
from .stacks import Arrays, Batch, in_batches, on_stacks
from .step import Stepped, first_half, kinds, moments, second_half, sums


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
) -> Stepped:
    """(name, (param, state)) after one step, of each parameter of `routes`: this rank's rows, float32 or better."""
    own: dict[str, Arrays] = {}
    for name, route in routes.items():
        g = grads[name].astype(params[name].dtype)
        own[name] = first_half(rule, hyper, g, states[name]) | sums(rule, _among_zeros(g, messages.group), route)

    todo = in_batches(routes, {name: params[name].dtype for name in routes}, messages.group.size())
    which = kinds(rule)
    arrays = _ahead(todo, {name: {key: a[key] for key in which} for name, a in own.items()}, which, messages)
    full = {name: whole_shape(params[name], messages.group.size()) for name in routes}
    work = zip(todo, arrays, share(todo), strict=True)
    for name, after in on_stacks(partial(second_half, rule, hyper), which, routes, full, work):
        start = messages.group.rank() * params[name].shape[0]
        rows = slice(start, start + params[name].shape[0])
        new = {k: mx.contiguous(a[rows]) if which[k] is entries else a for k, a in after.items()}  # a view keeps all
        p = stages.apply(params[name], new.pop("x"), hyper.lr, hyper.weight_decay)
        messages.last += [p, *new.values()]  # what is whole is gone before more is gathered
        yield name, (p, moments(rule, own[name]) | new)


def _among_zeros(g: mx.array, group: mx.distributed.Group) -> mx.array:
    """The whole gradient's shape with this rank's rows g in their place, for sums that add up over the ranks."""
    before, after = group.rank(), group.size() - group.rank() - 1
    rows: Any = [(before * g.shape[0], after * g.shape[0])]
    return mx.pad(g, rows + [(0, 0)] * (g.ndim - 1))


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
