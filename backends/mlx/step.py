"""A rule's step in MLX: `local` on each parameter as it lies, `whole` on stacks of matrices of one shape, in turns.

MLX walks a step's graph breadth first: left alone, it begins every batch before it ends one, and what is between is
there for all at once. `mx.depends` gives arrays that are computed after others, inside `mx.compile`, too.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from zeta import stages
from zeta.core import Hyper, Keeps, Orthogonalize, Rule, flat_axes
from zeta.routing.layout import Route, piece, shapes
from zeta.stages import entries
from zeta.storage import joined

from .stacks import Arrays, Batch, on_stacks

Stepped = Iterator[tuple[str, tuple[mx.array, Arrays]]]  # (name, (param, state))


class Turns:
    """Work in turns, of which at most `ahead` are under way at once."""

    def __init__(self, ahead: int = 1) -> None:
        self._ends = deque[list[mx.array]](([] for _ in range(ahead)), ahead)  # what each turn is over with

    def begin(self, arrays: list[mx.array]) -> list[mx.array]:
        """What the next turn works on: not there before the turn `ahead` of it is over."""
        before = self._ends[0]
        self._ends.append([])
        return mx.depends(arrays, before) if before else arrays

    def end(self, *arrays: mx.array) -> None:
        """The turn is not over before these are there."""
        self._ends[-1].extend(arrays)


def update(
    rule: Rule,
    hyper: Hyper,
    routes: dict[str, Route],
    work: list[tuple[Batch, Orthogonalize]],
    grads: Arrays,
    states: dict[str, Arrays],
    params: Arrays,
    turns: Turns,
    observe: Callable[[mx.array], Any],
) -> Stepped:
    """(name, (param, state)) after one step, of each parameter of `routes`: float32 or better.

    `observe` is given the u (count, rows, cols) of each batch.
    """
    own: dict[str, Arrays] = {}

    def first(batch: Batch) -> dict[str, Arrays]:
        names = list(dict.fromkeys(name for name, _ in batch))
        ready = turns.begin([own[name]["x"] if name in own else grads[name] for name in names])
        for name, x in zip(names, ready, strict=True):
            if name in own:  # of a fused layer, whose other matrices went before
                own[name]["x"] = x
            else:
                g = x.astype(params[name].dtype)
                own[name] = first_half(rule, hyper, g, states[name]) | sums(rule, g, routes[name])
        return own

    def second(stacks: Arrays, orthogonalize: Orthogonalize) -> Arrays:
        after = second_half(rule, hyper, stacks, orthogonalize)
        turns.end(*after.values())
        observe(after["x"])
        return after

    full = {name: params[name].shape for name in routes}
    todo = ((batch, first(batch), orthogonalize) for batch, orthogonalize in work)
    for name, after in on_stacks(second, kinds(rule), routes, full, todo):
        p = stages.apply(params[name], after.pop("x"), hyper.lr, hyper.weight_decay)
        yield name, (p, moments(rule, own[name]) | after)


def kinds(rule: Rule) -> Keeps:
    """The shapes of what `second_half` works on."""
    summed = {f"sum {key}": shape for key, (_, shape) in rule.summed.items()}
    return {"x": entries} | {key: rule.keeps[key] for key in rule.carried} | summed


def first_half(rule: Rule, hyper: Hyper, g: mx.array, state: Arrays) -> Arrays:
    """x and the state after `local`, with what `whole` takes of the state."""
    x, after = rule.local(g, moments(rule, state), hyper, stages)
    return {"x": x} | after | {key: state[key] for key in rule.carried}


def moments(rule: Rule, state: Arrays) -> Arrays:
    """What `local` keeps."""
    return {key: state[key] for key in rule.keeps if key not in rule.carried}


def sums(rule: Rule, g: mx.array, route: Route) -> Arrays:
    """The sums over all of a gradient's matrices, as they are stored."""
    pieces = [piece(g, route, i).reshape(shape) for i, shape in enumerate(shapes(route))]
    return {
        f"sum {key}": joined([getattr(stages, stage)(x, flat_axes(shape)) for x in pieces], shape, route, ())
        for key, (stage, shape) in rule.summed.items()
    }


def second_half(rule: Rule, hyper: Hyper, stacks: Arrays, orthogonalize: Orthogonalize) -> Arrays:
    """u, as x, and the state of `whole`; a matrix whose gradient is zero is not moved."""
    summed, state = {key: stacks[f"sum {key}"] for key in rule.summed}, {key: stacks[key] for key in rule.carried}
    u, state = rule.whole(stacks["x"], summed, state, hyper, lambda x: orthogonalize(x).astype(x.dtype), stages)
    return {"x": u * (summed["moved"] > 0).astype(u.dtype), **state}
