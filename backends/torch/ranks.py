"""An optimizer's ranks of torch.distributed: where each parameter is, the plans for a step, and that all agree."""

from collections.abc import Iterable
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeta.core import Rule
from zeta.routing.layout import BATCH_ENTRIES, Route

from .exchange import Task, publish, step, tasks
from .groups import check_dtype, dtype_of
from .mail import staggered
from .placement import Place, find_place, gradient

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
        self._places: dict[Tensor, Place] = {}  # keeps them alive: whatever else is known by id stays theirs
        self.shared = False  # whether other ranks know of any of them
        self._plans: dict[Any, list[list[Task]]] = {}
        self._digests: dict[Any, int] = {}  # of parameters that all ranks have described alike

    def place(self, p: Tensor) -> Place | None:
        place = self._places.get(p) or find_place(p, self.group, self.shard)
        if place is not None:
            self._places[p], self.shared = place, True
        return place

    def parted(self, p: Tensor) -> bool:
        """Whether the ranks keep the state of parts of p, which they all have whole."""
        place = self.place(p)
        return place is not None and not hasattr(p, "device_mesh") and place.parted()

    def by_group(self, params: Iterable[Tensor]) -> dict[Any, dict[Tensor, Place]]:
        """{process group: {parameter: place}}, in an order of groups that is the same on all ranks, or they would wait
        for one another."""
        places: dict[Any, dict[Tensor, Place]] = {}
        for p in params:
            place = self.place(p)
            if place is not None:
                places.setdefault(place.group, {})[p] = place
        if len(places) == 1:
            return places
        return dict(sorted(places.items(), key=lambda one: (dist.get_process_group_ranks(one[0]), one[0].group_name)))

    def agree(self, param_groups: list[dict[str, Any]]) -> None:
        """Raises RuntimeError, on all ranks, where some have other parameters or gradients than the others have.

        Each rank sends one number a step. On a GPU it is compared there and no host waits, but for the first step with
        these parameters: later errors come a little late, as an assertion that failed on the device.
        """
        where = {p: (i, k) for i, group in enumerate(param_groups) for k, p in enumerate(group["params"])}
        for group, places in self.by_group(p for p in where if p.requires_grad or p.grad is not None).items():
            key = group, tuple((id(p), p.dtype) for p in places)
            known = key in self._digests
            texts = [] if known else [self._describe(param_groups, *where[p]) for p in places]
            digest = self._digests[key] if known else int(sha256("\n".join(texts).encode()).hexdigest()[:15], 16)
            number = hash((digest, *(p.grad is not None for p in places))) >> 1  # of numbers: the same in all processes
            most = torch.full((3,), number, device=next(iter(places)).device)
            most[1].neg_()
            most[2].fill_(known)
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
            if known:
                torch._assert_async(most[0] + most[1] == 0, DISAGREE)
                continue
            high, low, any_known = most.tolist()
            if high + low:  # who knew them raises, too, and so cannot tell what it has
                raise RuntimeError(DISAGREE if any_known else _difference(group, texts))
            if len(self._digests) >= PLANS:
                self._digests.clear()
            self._digests[key] = digest

    def _describe(self, param_groups: list[dict[str, Any]], i: int, k: int) -> str:
        """All in which a parameter must be the same on every rank."""
        group = param_groups[i]
        p, route, names = group["params"][k], Route(*group["routes"][k]), group.get("param_names")
        name, rule = names[k] if names else "a parameter", "AdamW"
        if route.matrices:
            rule = f"{group.get('rule', 'Zeta')} as {route.matrices}"
            rule += f" of parts {route.parts} x {route.repeats} on axis {route.axis}" if route.parts else ""
        place = getattr(p, "placements", "state sharded" if self.parted(p) else "copied")
        sent = f", sent as {self.comm_dtype}" if self.comm_dtype else ""
        return f"{name} ({tuple(p.shape)}, {p.dtype}, {place}{sent}, in group {i}, for {rule})"

    def step(self, rule: Rule, states: Any, options: dict[str, Any], routes: dict[Tensor, Route]) -> None:
        """One step of those matrices that several ranks hold. All must come here with the same parameters."""
        for group, places in self.by_group(routes).items():
            grads = {p: gradient(p) for p in places}  # a collective where it is placed otherwise than its parameter
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


def _difference(group: Any, texts: list[str]) -> str:
    """What differs between the parameters that the ranks describe: the first of it."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, texts, group)
    first, *others = (dist.get_global_rank(group, i) for i in range(len(told)))
    for rank, other in zip(others, told[1:], strict=True):
        for ours, theirs in zip_longest(told[0], other, fillvalue="nothing"):
            if ours != theirs:
                return (
                    f"the ranks have different parameters: where rank {first} has {ours}, rank {rank} has {theirs}; "
                    "give the optimizer the same ones, in the same order, frozen or not, on all of them"
                )
    return DISAGREE
