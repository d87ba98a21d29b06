"""An optimizer's ranks of torch.distributed: where each parameter is, the plans for a step, and that all agree."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeta.core import Rule
from zeta.layout import BATCH_ENTRIES, Route

from .torch_distributed import Task, publish, step, tasks
from .torch_groups import check_dtype, dtype_of
from .torch_places import Place, find_place, gradient
from .torch_wire import staggered

DISAGREE = (
    "the ranks have gradients of different parameters: give zeros to those that have none (an expert without a token), "
    "or freeze the parameter on all of them"
)
PLANS = 64  # kept for as many sets of parameters that have gradients together


class Ranks:
    """Where an optimizer's parameters are, and the plans for them, made once.

    `group` are the ranks that hold the same plain parameters and gradients; `shard`: each keeps the state of a part.
    """

    def __init__(self, group: Any = None, shard: bool = False, comm_dtype: torch.dtype | None = None) -> None:
        if shard and group is None:
            raise ValueError("shard_state=True shares the state out over a process_group: give it, or leave it out")
        check_dtype("comm_dtype", comm_dtype)
        self.group, self.shard, self.comm_dtype = group, shard, dtype_of(comm_dtype)
        self._places: dict[Tensor, Place | None] = {}
        self._plans: dict[Any, list[list[Task]]] = {}

    def place(self, p: Tensor) -> Place | None:
        if p not in self._places:
            self._places[p] = find_place(p, self.group, self.shard)
        return self._places[p]

    def parted(self, p: Tensor) -> bool:
        """Whether the ranks keep the state of parts of p, which they all have whole."""
        place = self.place(p)
        return place is not None and not hasattr(p, "device_mesh") and place.parted()

    def agree(self, params: Iterable[Tensor]) -> None:
        """Raises RuntimeError, on all ranks, where some have gradients of other parameters than the others have.

        Each rank tells one number a step. On a GPU it is compared there and no host waits: the error comes a little
        later, as an assertion that failed on the device.
        """
        told: dict[Any, list[Tensor]] = {}
        for p in params:
            place = self.place(p)
            if place is not None:
                told.setdefault(place.group, []).append(p)
        for group, some in told.items():
            number = hash(tuple(p.grad is not None for p in some)) >> 1  # of truth values: the same in every process
            most = torch.full((2,), number, device=some[0].device)
            most[1].neg_()
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
            torch._assert_async(most.sum() == 0, DISAGREE)

    def step(self, rule: Rule, states: Any, options: dict[str, Any], routes: dict[Tensor, Route]) -> None:
        """One step of matrices that several ranks hold. All ranks must come here with the same parameters."""
        found: dict[Any, dict[Tensor, Place]] = {}
        for p in routes:
            place = self.place(p)
            assert place is not None
            found.setdefault(place.group, {})[p] = place
        grads = {p: gradient(p) for p in routes}  # a collective where it is placed otherwise than its parameter
        for group, places in found.items():
            key = group, tuple((id(p), p.dtype, p.device) for p in places)  # model.bfloat16() keeps a parameter's id
            if key not in self._plans:
                if len(self._plans) >= PLANS:
                    self._plans.clear()
                self._plans[key] = tasks({p: routes[p] for p in places}, places)
            staggered(step(rule, states, grads, options, batch, self.comm_dtype) for batch in self._plans[key])

    def publish(self, params: Iterable[Tensor]) -> None:
        """Makes parameters whole again, of which each rank has moved a part."""
        parts: dict[Any, list[list[Tensor]]] = {}
        for p in params if self.shard else ():
            if self.parted(p):
                lists = parts.setdefault((p.dtype, p.device), [[]])
                if lists[-1] and sum(q.numel() for q in lists[-1]) + p.numel() > BATCH_ENTRIES:
                    lists.append([])
                lists[-1].append(p)
        staggered(publish(some, self._places) for lists in parts.values() for some in lists)
