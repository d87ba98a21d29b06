"""A rule's parts on torch tensors, in place: for matrices that this process has whole, and for the ranks."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zeta.core import Hyper, Rule, flat_axes
from zeta.routing.layout import Route, piece
from zeta.stages import per_row
from zeta.storage import piece_of, stack_shape

from .groups import dtype_of
from .orthogonalize import newton_schulz, newton_schulz_, stack, unstack
from .stages import CACHED, InPlace
from .state import round_back, widen

Batch = dict[tuple[Tensor, int], tuple[int, ...]]


def step(rule: Rule, states: Any, options: dict[str, Any], batch: Batch, routes: dict[Tensor, Route]) -> Tensor:
    """u, after `rule.update` for pieces of one shape, {(parameter, piece): (count, rows, cols)}."""
    shapes, hyper = list(batch.values()), settings(options, next(iter(batch))[0].device)
    params = [piece(p, routes[p], i) for p, i in batch]  # views: what is written to them is written to p
    kept = {key: [piece_of(states[p][key], shape, routes[p], i) for p, i in batch] for key, shape in rule.keeps.items()}
    wide = torch.promote_types(params[0].dtype, torch.float32)
    g = stack([piece(p.grad, routes[p], i) for p, i in batch], shapes).to(wide)
    if options["maximize"]:
        g.neg_()
    sums = {key: getattr(InPlace, stage)(g, flat_axes(shape)) for key, (stage, shape) in rule.sums.items()}
    rows = [sums[key] for key, wish in rule.sums.items() if wish == ("nonzero_count", per_row)]
    sums["moved"] = rows[0].amax(-2, keepdim=True) if rows else InPlace.nonzero_count(g, (-2, -1))
    local(rule, unstack(g, params), {key: kept[key] for key in kept if key not in rule.carried}, hyper)
    carried = {k: stack(kept[k], [stack_shape(rule.keeps[k], shape) for shape in shapes]) for k in rule.carried}
    u, carried = whole(rule, g, sums, carried, options, hyper)
    for key, value in carried.items():
        torch._foreach_copy_(kept[key], unstack(value, kept[key]))
    rests = [piece(states[p]["remainder"], routes[p], i) for p, i in batch if "remainder" in states[p]]
    apply(params, rests, unstack(u, params), hyper)
    return u


def settings(options: dict[str, Any], device: torch.device) -> Hyper:
    """A group's, with tensors for lr and decay where foreach takes them: on the device, with no axes."""
    lr, decay = (
        x.reshape(()).to(device, non_blocking=True) if isinstance(x, Tensor) else x
        for x in (options["lr"], options["weight_decay"])
    )
    return Hyper(lr, options["betas"], options["eps"], decay)


def local(rule: Rule, g: list[Tensor], state: dict[str, list[Tensor]], hyper: Hyper) -> None:
    """The rule's first half: its state changes, and x is written over the gradient."""
    on_cpu = g[0].device.type == "cpu" and not torch.compiler.is_compiling()  # which fuses the passes itself
    for entries, kept in cached(g, state) if on_cpu else [(g, state)]:
        stages = InPlace(entries)
        stages.over_gradient(rule.local(entries, kept, hyper, stages)[0])


def cached(g: list[Tensor], state: dict[str, list[Tensor]]) -> Iterator[tuple[list[Tensor], dict[str, list[Tensor]]]]:
    """g and the state in parts of about CACHED entries: of a stage's passes over one, all but the first find it in a
    CPU's caches."""
    counts = [max(1, min(len(t), t.numel() // CACHED)) for t in g]

    def pieces(tensors: list[Tensor]) -> list[Tensor]:
        return [piece for t, n in zip(tensors, counts, strict=True) for piece in t.tensor_split(n)]

    g, state, start, entries = pieces(g), {key: pieces(tensors) for key, tensors in state.items()}, 0, 0
    for end, x in enumerate(g, 1):
        entries += x.numel()
        if entries >= CACHED or end == len(g):
            yield g[start:end], {key: tensors[start:end] for key, tensors in state.items()}
            start, entries = end, 0


def whole(
    rule: Rule, x: Tensor, sums: dict[str, Tensor], state: dict[str, Tensor], options: Mapping[str, Any], hyper: Hyper
) -> tuple[Tensor, dict[str, Tensor]]:
    """(u, state) of the rule's second half, for a stack x (count, rows, cols) and its state, which are written over.

    u is zero for a matrix whose gradient is exactly zero: see `zeta.stages.apply`.
    """

    def orthogonalize(y: Tensor) -> Tensor:
        ours = newton_schulz_ if y is x else newton_schulz
        return ours(y, options["coefficients"], dtype_of(options["ns_dtype"]))

    moved = sums["moved"] > 0
    with torch.autocast(x.device.type, enabled=False):  # it would round products silently
        u, state = rule.whole(x, sums, state, hyper, orthogonalize, InPlace([]))
    return u.mul_(moved), state


def apply(params: list[Tensor], remainders: list[Tensor], u: list[Tensor], hyper: Hyper) -> None:
    """`zeta.stages.apply`, in float32 or better; half-precision weights keep what rounding takes off them."""
    wide = widen(params, remainders) if remainders else params
    InPlace.apply(wide, u, hyper.lr, hyper.weight_decay)
    if remainders:
        round_back(params, remainders, wide)
