"""How a parameter holds its matrices: as one, side by side, alternating or stacked; and how to take them out.

A layer that fuses several matrices (query, key and value; gate and up) must be orthogonalised as the matrices that it
holds. Every optimizer takes them out with `piece`, steps them together with others of the same shape, and puts them
back with `join`, or writes through the view that `piece` is in torch.
"""

from collections.abc import Hashable, Iterator
from math import prod
from typing import Literal, NamedTuple, TypeVar

from array_api_compat import array_namespace

from zeta.core import Array

Treatment = Literal["zeta", "adamw"]
Key = TypeVar("Key", bound=Hashable)
BATCH_ENTRIES = 4 << 20
# Of one product, lest a GPU that also draws a display takes its kernel for one that hangs and ends the process: Windows
# after two seconds, Metal after a time that is not published (MLX's issues 1231, 3267). This many take a tenth of a
# second at 1e12 a second, 40 % of the float32 peak of an M1, the slowest GPU of a Mac with MLX: derived, not measured.
# A matrix by itself may take more: one of 4096 x 11008 four times as many.
BATCH_OPERATIONS = 10**11


class Route(NamedTuple):
    """What happens to one parameter, and why."""

    treatment: Treatment
    matrices: tuple[int, ...]  # (count, rows, cols), its entries in order; () for AdamW
    reason: str
    parts: tuple[int, ...] = ()  # lengths along `axis` of the matrices side by side in each of those; () if it is one
    axis: int = -2  # -2: the rows are divided; -1: the columns, for weights stored as (in, out)
    repeats: int = 1  # the parts alternate this often along the axis: heads that keep their q, k and v together
    doubt: str = ""  # what could not be known, as a warning says it


VECTORS = ("vector", "bias", "norm")  # whose weights are not decayed unless asked, whatever their axes


def is_vector(route: Route, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a vector, such as a norm's scale or a bias: Megatron, too, does not decay those."""
    return route.treatment == "adamw" and (sum(n > 1 for n in shape) < 2 or route.reason in VECTORS)


def cut(shape: tuple[int, ...], parts: tuple[int, ...], reason: str, axis: int = -2, repeats: int = 1) -> Route:
    """The route of a parameter (..., rows, cols) whose rows (or columns, axis -1) are divided into `parts`."""
    count, rows, cols = prod(shape[:-2]), *shape[-2:]
    if repeats == 1 and axis == -2 and len(set(parts)) == 1:  # equal blocks of rows are a stack: nothing to take apart
        return Route("zeta", (count * len(parts), parts[0], cols), reason)
    return Route("zeta", (count, rows, cols), reason, parts, axis, repeats)


def shapes(route: Route) -> list[tuple[int, ...]]:
    """(count, rows, cols) of each piece."""
    if not route.parts:
        return [route.matrices] if route.matrices else []
    count, rows, cols = route.matrices
    lengths = [route.repeats * part for part in route.parts]
    return [(count, n, cols) if route.axis == -2 else (count, rows, n) for n in lengths]


def piece(x: Array, route: Route, i: int) -> Array:
    """The i-th piece of x, in x's own shape but for the axis it was cut along: a view wherever the library has views.

    Reshaped to `shapes(route)[i]` it is a stack of matrices.
    """
    if not route.parts:
        return x
    start = sum(route.parts[:i])
    stop = start + route.parts[i]
    if route.repeats > 1:
        axis = x.ndim + route.axis
        x = x.reshape(*x.shape[:axis], route.repeats, sum(route.parts), *x.shape[axis + 1 :])
    return x[..., start:stop, :] if route.axis == -2 else x[..., start:stop]


def join(pieces: list[Array], route: Route, shape: tuple[int, ...]) -> Array:
    """The parameter of this shape from all its pieces, each as `shapes(route)` says: the reverse of `piece`."""
    if not route.parts:
        return pieces[0].reshape(shape)
    axis = len(shape) + route.axis
    alternating = (route.repeats,) if route.repeats > 1 else ()
    own = [
        x.reshape(*shape[:axis], *alternating, part, *shape[axis + 1 :])
        for x, part in zip(pieces, route.parts, strict=True)
    ]
    return array_namespace(own[0]).concat(own, axis=route.axis).reshape(shape)


def batches(
    routes: dict[Key, tuple[Route, Hashable]], most: int | None = None, operations: int = BATCH_OPERATIONS
) -> Iterator[dict[tuple[Key, int], tuple[int, ...]]]:
    """What one step takes together, as {(key, i): (count, rows, cols)}: pieces of one shape and one kind.

    `routes` is {key: (route, kind)}, kind being dtype and device. A batch holds at most `most` entries (None: an eighth
    of all, or BATCH_ENTRIES, if that is more), and so few that a product x x^T takes at most so many operations, or one
    piece, if that is more: transient memory stays a small share of the model, while small matrices go together.
    """
    most = most or max(BATCH_ENTRIES, sum(prod(r.matrices) for r, _ in routes.values() if r.matrices) // 8)
    unfinished: dict[Hashable, dict[tuple[Key, int], tuple[int, ...]]] = {}
    for key, (r, kind) in routes.items():
        for i, shape in enumerate(shapes(r)):
            alike = (shape[1:], kind)
            batch = unfinished.setdefault(alike, {})
            cap = min(most, operations // (2 * min(shape[1:])))
            if batch and sum(map(prod, batch.values())) + prod(shape) > cap:
                yield batch
                batch = unfinished[alike] = {}
            batch[key, i] = shape
    yield from unfinished.values()


def check_route(route: Route, shape: tuple[int, ...]) -> Route:
    """The route, if it fits a parameter of this shape; else ValueError."""
    if route.treatment not in ("zeta", "adamw"):
        raise ValueError(f'treatment is {route.treatment!r}, but must be "zeta" or "adamw": {route}')
    lengths = route.matrices and route.matrices[route.axis]
    fits = prod(route.matrices) == prod(shape) and (not route.parts or tuple(shape[-2:]) == route.matrices[-2:])
    if route.treatment == "zeta" and (len(route.matrices) != 3 or not fits):
        raise ValueError(f"matrices {route.matrices} do not fit a parameter of shape {tuple(shape)}: {route}")
    if route.parts and route.repeats * sum(route.parts) != lengths:
        raise ValueError(f"parts {route.parts} times {route.repeats} do not add up to {lengths}: {route}")
    return route
