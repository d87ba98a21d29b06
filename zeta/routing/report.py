"""What a person reads of a model's routes: a table, in which layers that are alike stand once, and its sums."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from zeta.routing.by_name import route
from zeta.routing.layout import Route, shapes

if TYPE_CHECKING:
    from rich.table import Table

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Row(NamedTuple):
    """Parameters of one shape and route whose names differ by their layers' numbers alone."""

    name: str  # with "*" for these numbers
    times: int
    shape: tuple[int, ...]
    route: Route


def rows(
    parameters: Iterable[tuple[str, Any]], routes: Mapping[str, Route] | None = None, *, collapse: bool = False
) -> list[Row]:
    """The floating-point parameters, in their order; `routes` None is what the names say."""
    alike: dict[Any, list[str]] = {}
    for name, array in parameters:
        if "float" in str(array.dtype):  # not the packed weights of a quantised layer
            shape = tuple(array.shape)
            r = routes[name] if routes else route(name, shape)
            alike.setdefault((NUMBER.sub("*", name) if collapse else name, shape, r), []).append(name)
    return [
        Row(starred if len(names) > 1 else names[0], len(names), shape, r)
        for (starred, shape, r), names in alike.items()
    ]


def report(parameters: Iterable[tuple[str, Any]], routes: Mapping[str, Route] | None = None) -> "Table":
    """A rich table: name, shape, treatment, matrices, an update's RMS and the reason of every floating-point parameter.

    `parameters` are (name, array) pairs, as `model.named_parameters()` or `mlx.utils.tree_flatten(model.parameters())`
    gives them; `routes` is what `zeta.routes(model)` says, None for what the names say: `rich.print(zeta.report(...))`.
    """
    return table(rows(parameters, routes))


def table(rows: Iterable[Row]) -> "Table":
    from rich.table import Table  # not at import: a training run needs none

    columns = Table("parameter", "shape", "treatment", "matrices", "update RMS", "reason")
    for name, count, shape, r in rows:
        matrices = " + ".join("x".join(map(str, s)) for s in shapes(r))
        rms = "0.2 lr" if r.treatment == "zeta" else "up to lr"
        label = f"{name} x{count}" if count > 1 else name
        reason = r.reason + ("?" if r.doubt else "")
        columns.add_row(label, "x".join(map(str, shape)), r.treatment, matrices, rms, reason)
    return columns


def objects(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One for each row, as JSON has them."""
    return [
        dict(
            name=name,
            count=count,
            shape=shape,
            treatment=r.treatment,
            matrices=shapes(r),
            reason=r.reason,
            doubt=r.doubt,
        )
        for name, count, shape, r in rows
    ]


def footer(arrays: Mapping[str, Any], routes: Mapping[str, Route]) -> str:
    """The shares of all entries by treatment, the number of matrices, and of doubts; what is shared counts once."""
    sizes = {name: prod(array.shape) for name, array in unshared(arrays).items()}
    ours = [name for name in sizes if routes[name].treatment == "zeta"]
    total, matrices = sum(sizes.values()), sum(s[0] for name in ours for s in shapes(routes[name]))
    share = sum(sizes[name] for name in ours) / max(total, 1)
    doubts = sum(bool(routes[name].doubt) for name in sizes)
    return (
        f"{total:,} entries: {share:.1%} to Zeta as {matrices:,} matrices, {1 - share:.1%} to AdamW; "
        f"{doubts or 'no'} doubt{'s' * (doubts != 1)}"
    )


def unshared(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are the same array once, under the first of its names."""
    once = {id(array): name for name, array in reversed([*arrays.items()])}
    return {name: arrays[name] for name in once.values()}
