"""What a torch optimizer's step did to its matrices, measured while it runs, and read later."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta.step_report import Row, error, labels, rows, signs

from .orthogonalize import matrix_norm


class Measured(NamedTuple):
    """Of one batch (N, rows, cols)."""

    counts: list[tuple[Tensor, int]]  # each parameter in it, and how many of its matrices
    shape: torch.Size
    lr: float | Tensor
    sums: Tensor  # (3, N): squares of u and of the weights, errors


def of_batch(batch: Any, u: Tensor, params: list[Tensor], lr: float | Tensor, exact: bool) -> Measured:
    """Of a stack u, and of the weights after the step, which are pieces of parameters."""
    probe = None if exact else _probe(min(u.shape[-2:]), u.device, u.dtype)
    # On a CPU torch 2.13 takes 30 times as long for a stack times a vector as for its matrices one by one.
    stacks = [_figures(x, probe) for x in (u.unbind() if u.device.type == "cpu" else [u])]
    weights = [
        torch.linalg.vector_norm(p.reshape(shape), dim=(-2, -1), dtype=u.dtype)
        for p, shape in zip(params, batch.values(), strict=True)
    ]
    counts = [(p, shape[0]) for (p, _), shape in batch.items()]
    size, errors = torch.cat(stacks, 1)
    lr = lr.clone() if isinstance(lr, Tensor) else lr
    return Measured(counts, u.shape, lr, torch.stack([size, torch.cat(weights).square(), errors]))


def _figures(u: Tensor, probe: Tensor | None) -> Tensor:
    """(2, N): the squares of a stack u, or of one matrix, and the errors."""
    size = matrix_norm(u).square()
    return torch.stack([size.flatten(), error(u, size, probe).flatten()])


@cache
def _probe(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(signs(n)).to(device, dtype)


def read(batches: list[Measured], groups: list[dict[str, Any]]) -> Iterable[Row]:
    """The rows of all batches, in the order of the groups' parameters."""
    names = {p: (group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))])[k]
             for group in groups for k, p in enumerate(group["params"])}  # fmt: skip
    called = labels((batch.counts for batch in batches), names.__getitem__)
    for batch, own in zip(batches, called, strict=True):
        yield from rows(own, tuple(batch.shape), float(batch.lr), batch.sums.tolist())
