"""Tensors on their way between the ranks of torch.distributed, and what is done while they are."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def staggered(jobs: Iterable[Iterator[None]], pauses: int = 2) -> None:
    """Runs all jobs; while the data of one travel, the next one starts."""
    running: list[Iterator[None]] = []
    for job in chain(jobs, repeat(None, pauses)):
        if job is not None:
            next(job)
        running = [older for older in running if next(older, running) is not running]
        if job is not None:
            running.append(job)


class Mail:
    """What each rank sends to each other, in `wire` or `wide`: a message for each dtype, whose order both ends know."""

    def __init__(self, ranks: int, wire: torch.dtype, wide: torch.dtype, device: torch.device) -> None:
        self.wire, self.wide, self.device = wire, wide, device
        self.sent: dict[torch.dtype, list[list[Tensor]]] = {d: [[] for _ in range(ranks)] for d in (wire, wide)}
        self.expected: dict[torch.dtype, list[tuple[int, tuple[int, ...]]]] = {d: [] for d in self.sent}
        self.received: dict[torch.dtype, Iterator[Tensor]] = {}
        self.works: list[Any] = []

    def send(self, rank: int, dtype: torch.dtype, tensor: Tensor) -> None:
        self.sent[dtype][rank].append(tensor)

    def expect(self, rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.expected[dtype].append((rank, shape))

    def post(self, group: Any) -> None:
        """Lets everything travel. Group None: all ranks send to themselves alone."""
        for dtype, send in self.sent.items():
            flat = [t.reshape(-1).to(dtype) for tensors in send for t in tensors]
            out = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.device)
            sizes, counts = [0] * len(send), [sum(t.numel() for t in tensors) for tensors in send]
            for rank, shape in self.expected[dtype]:
                sizes[rank] += prod(shape)
            received = out
            if group is not None:
                received = out.new_empty(sum(sizes))
                work = dist.all_to_all_single(received, out, sizes, counts, group=group, async_op=True)
                self.works.append((work, out))  # `out` must live until it is sent
            self.received[dtype] = _open(list(torch.split(received, sizes)), self.expected[dtype])
        self.sent.clear()

    def wait(self) -> None:
        for work, _ in self.works:
            work.wait()
        self.works.clear()

    def take(self, dtype: torch.dtype) -> Tensor:
        """The next of what was expected in this dtype."""
        return next(self.received[dtype])


def _open(flat: list[Tensor], expected: list[tuple[int, tuple[int, ...]]]) -> Iterator[Tensor]:
    """The tensors in what arrived, one flat tensor from each rank."""
    start = [0] * len(flat)
    for rank, shape in expected:
        end = start[rank] + prod(shape)
        yield flat[rank][start[rank] : end].view(shape)
        start[rank] = end
