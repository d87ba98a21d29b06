"""Where an optimizer keeps what a rule keeps, for parameters that may hold several matrices: the same on every backend.

What has a number for every entry is stored in the parameter's own shape. All else (rows, factors, counts) is stored
flat: one axis, a parameter's pieces (`zeta.routing.layout.piece`) one after another, each a stack of its matrices.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from array_api_compat import array_namespace

from zeta.core import Array, Keeps, zeta
from zeta.family import eta
from zeta.routing.layout import Route, join, piece, shapes
from zeta.routing.report import unshared
from zeta.stages import Shape, entries

WRITERS = {  # of these arrays, all that are kept for a parameter
    "exp_avg exp_avg_sq": "Zeta",
    "exp_avg": "one that keeps a momentum alone (Muon, Eta, ...)",
    "exp_avg update_sq": "AdaMuon",
    "exp_avg row_sq": "NorMuon",
    "exp_avg left right": "Shampoo",
    "exp_avg exp_avg_sq left right steps": "SOAP",
    "exp_avg left left_root right right_root steps": "Shampoo",
    "exp_avg exp_avg_sq left left_basis right right_basis steps": "SOAP",
    "exp_avg norm_sq": "AdaGO",
    "exp_avg exp_avg_sq step": "AdamW",  # of torch, or ours for what is no matrix
    "momentum_buffer": "torch.optim's SGD or Muon",
} | dict.fromkeys(("m", "v", "m v"), "one of mlx.optimizers")
# What states of those arrays lacked when every step decomposed: zeros stand for it (`zeta.preconditioned.renewed`).
LACKED = {
    "exp_avg left right": {"left_root", "right_root", "steps"},
    "exp_avg exp_avg_sq left right steps": {"left_basis", "right_basis"},
}


def writers(keys: Iterable[str]) -> str:
    """Which optimizers keep just these arrays for a parameter, for a message to name them."""
    return WRITERS.get(_key(keys), "an optimizer unknown here")


def lacked(keys: Iterable[str]) -> set[str]:
    """What a state of these arrays, all that are kept for a parameter, may lack."""
    return LACKED.get(_key(keys), set())


def wanted(keeps: Keeps, route: Route, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each array that is kept for a parameter of this shape: by AdamW, or for the rule's `keeps`."""
    if route.treatment == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    return stored(keeps, route, shape)


def state_bytes(keeps: Keeps, route: Route, shape: tuple[int, ...], width: int) -> int:
    """Bytes that are kept for a parameter of this shape whose entries take `width` bytes, in every library.

    Moments take four bytes, and a narrower parameter has a remainder of its own width beside them.
    """
    numbers = sum(map(prod, wanted(keeps, route, shape).values()))
    return max(width, 4) * numbers + (width * prod(shape) if width < 4 else 0)


def totals(arrays: Mapping[str, Any], routes: Mapping[str, Route]) -> dict[str, int]:
    """Bytes of state for all these parameters by optimizer, Zeta's half for the rest included; of AdamW, for all of
    them, what torch.optim and mlx.optimizers keep: two moments of the parameter's own dtype."""
    sizes = [(routes[name], tuple(a.shape), int(a.itemsize)) for name, a in unshared(arrays).items()]
    ours = {"Zeta": zeta.keeps, "Eta": eta.keeps}
    result = {name: sum(state_bytes(keeps, *size) for size in sizes) for name, keeps in ours.items()}
    return result | {"AdamW": sum(2 * width * prod(shape) for _, shape, width in sizes)}


def stored(keeps: Keeps, route: Route, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each array that is kept for a parameter of this shape."""
    return {key: tuple(shape) if kept is entries else (sum(_sizes(kept, route)),) for key, kept in keeps.items()}


def piece_of(x: Array, kept: Shape, route: Route, i: int) -> Array:
    """What of x belongs to the i-th piece: a view wherever the library has views."""
    if kept is entries:
        return piece(x, route, i)
    sizes = _sizes(kept, route)
    return x[sum(sizes[:i]) : sum(sizes[: i + 1])]


def joined(parts: list[Array], kept: Shape, route: Route, shape: tuple[int, ...]) -> Array:
    """The stored array of all its parts: the reverse of `piece_of`."""
    if kept is entries:
        return join(parts, route, shape)
    return array_namespace(parts[0]).concat([x.reshape(-1) for x in parts])


def stack_shape(kept: Shape, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is kept for a stack (count, rows, cols)."""
    count, rows, cols = shape
    return count, *kept(rows, cols)


def _key(keys: Iterable[str]) -> str:
    return " ".join(sorted({*keys} - {"remainder"}))


def _sizes(kept: Shape, route: Route) -> list[int]:
    return [prod(stack_shape(kept, shape)) for shape in shapes(route)]
