"""Tensors on their way between the ranks of torch.distributed, and what is done while they are."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeta.sharing import Box, size

Way = tuple[int, Box]  # (the rank at the other end, which part of an array)


def staggered(jobs: Iterable[Iterator[None]], pauses: int = 2) -> None:
    """Runs all jobs; while the data of one travel, the next one starts."""
    running: list[Iterator[None]] = []
    for job in chain(jobs, repeat(None, pauses)):
        if job is not None:
            next(job)
        running = [older for older in running if next(older, running) is not running]
        if job is not None:
            running.append(job)


def exchange(
    send: list[list[Tensor]], ways: list[Way], dtype: torch.dtype, device: torch.device, group: Any
) -> tuple[list[Tensor], Any]:
    """(one flat tensor from each rank, what to wait for before they are read). Group None: nothing leaves this rank.

    `ways` tells what arrives, in the order in which each rank sent it.
    """
    flat = [t.reshape(-1).to(dtype) for tensors in send for t in tensors]
    out = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
    sizes = [0] * len(send)
    for rank, at in ways:
        sizes[rank] += torch.Size(size(at)).numel()
    if group is None:
        return list(torch.split(out, sizes)), None
    received = out.new_empty(sum(sizes))
    counts = [sum(t.numel() for t in tensors) for tensors in send]
    work = dist.all_to_all_single(received, out, sizes, counts, group=group, async_op=True)
    return list(torch.split(received, sizes)), (work, out)  # `out` must live until it is sent


def wait(work: Any) -> None:
    if work is not None:
        work[0].wait()


def take(flat: list[Tensor], ways: list[Way]) -> Iterator[Tensor]:
    """The tensors in what arrived."""
    start = [0] * len(flat)
    for rank, at in ways:
        end = start[rank] + torch.Size(size(at)).numel()
        yield flat[rank][start[rank] : end].view(size(at))
        start[rank] = end
