"""What a torch optimizer's step did to its matrices, measured while it runs, and read later."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta.routing.layout import Route, piece
from zeta.step_report import Row, error, labels, rows, signs

from .orthogonalize import matrix_norm
from .step import Batch


class Measured(NamedTuple):
    """Of one batch (N, rows, cols)."""

    batch: Batch
    lr: float | Tensor
    sums: Tensor  # (2, N): squares of u, errors


def of_batch(batch: Batch, u: Tensor, lr: float | Tensor, exact: bool) -> Measured:
    """Of a stack u, which moved the pieces of the batch."""
    probe = None if exact else _probe(min(u.shape[-2:]), u.device, u.dtype)
    # On a CPU torch 2.13 takes 30 times as long for a stack times a vector as for its matrices one by one.
    figures = [_figures(x, probe) for x in (u.unbind() if u.device.type == "cpu" else [u])]
    return Measured(batch, lr.clone() if isinstance(lr, Tensor) else lr, torch.cat(figures, 1))


def _figures(u: Tensor, probe: Tensor | None) -> Tensor:
    """(2, N): the squares of a stack u, or of one matrix, and the errors."""
    size = matrix_norm(u).square()
    return torch.stack([size.flatten(), error(u, size, probe).flatten()])


@cache
def _probe(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(signs(n)).to(device, dtype)


@torch.no_grad()
def weights(batch: Batch, routes: dict[Tensor, Route]) -> Tensor:
    """(N,) squares of the matrices of a batch as they are now: a step that nobody looks at need not read them."""
    matrices = [piece(p, routes[p], i).reshape(shape) for (p, i), shape in batch.items()]
    return torch.cat([matrix_norm(w.to(torch.promote_types(w.dtype, torch.float32))) for w in matrices]).square_()


def read(batches: list[Measured], groups: list[dict[str, Any]]) -> Callable[[], Iterable[Row]]:
    """What gives the rows of all batches, in the order of the groups' parameters."""
    pairs = [(p, Route(*r)) for group in groups for p, r in zip(group["params"], group["routes"], strict=True)]
    sizes = [weights(measured.batch, dict(pairs)) for measured in batches]
    return lambda: _rows(batches, sizes, groups)


def _rows(batches: list[Measured], sizes: list[Tensor], groups: list[dict[str, Any]]) -> Iterable[Row]:
    names = {p: (group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))])[k]
             for group in groups for k, p in enumerate(group["params"])}  # fmt: skip
    called = labels(([(p, shape[0]) for (p, _), shape in one.batch.items()] for one in batches), names.__getitem__)
    for (batch, lr, sums), size, own in zip(batches, sizes, called, strict=True):
        (squares, errors), shape = sums.tolist(), next(iter(batch.values()))
        yield from rows(own, shape, float(lr), [squares, size.flatten().tolist(), errors])
