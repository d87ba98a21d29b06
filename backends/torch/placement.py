"""Where the ranks of torch.distributed keep a parameter: whole on each (DDP), or as a DTensor (FSDP2, tensor
parallel)."""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zeta.sharding import Box, Held, held


class Place(NamedTuple):
    """Where the ranks of a process group keep a parameter."""

    group: Any
    holders: list[Held]  # by rank in the group
    rank: int  # of this process in the group

    @property
    def box(self) -> Box:
        return self.holders[self.rank].box

    def parted(self) -> bool:
        """Whether some rank has a part of the parameter alone."""
        return len({str(h.box) for h in self.holders}) > 1


def find_place(p: Tensor, group: Any, shard: bool) -> Place | None:
    """The place of a DTensor, or of a copy on every rank of `group`, of which each steps its own part if `shard`.

    None for a parameter that only this process knows of. Raises ValueError where the group cannot send from p's device.
    """
    if hasattr(p, "device_mesh"):
        return _of_dtensor(p)
    if group is None or dist.get_world_size(group) == 1:
        return None
    _check_backend(group, p)
    ranks = dist.get_world_size(group)
    return Place(group, held(p.shape, (ranks,), (0 if shard and p.ndim else None,)), dist.get_rank(group))


def _check_backend(group: Any, p: Tensor) -> None:
    device, backends = p.device.type, dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    if device not in ("meta", *(one.split(":")[0] for one in backends.split(","))):
        raise ValueError(
            f'a parameter of shape {tuple(p.shape)} is on the device "{device}", but its process group has the '
            f'backends "{backends}" alone: add one, as in init_process_group("cpu:gloo,cuda:nccl"), or move it'
        )


def _of_dtensor(p: Any) -> Place | None:
    mesh = p.device_mesh
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}: shard or replicate it")
    # FSDP2 over tensor parallelism, torch 2.13: the strided mesh axis, the first, shares out what the other left.
    order = sorted(range(mesh.ndim), key=lambda i: "Strided" in type(p.placements[i]).__name__)
    cuts = [getattr(placement, "dim", None) for placement in p.placements]
    boxes = held(p.shape, mesh.shape, cuts, order)
    if mesh.ndim == 1:
        group = mesh.get_group()
    else:
        group = dist.group.WORLD if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()
    _check_backend(group, p.to_local())  # which FSDP2 may keep on another device than the mesh's
    flat = mesh.mesh.flatten().tolist()
    holders = [boxes[flat.index(rank)] for rank in dist.get_process_group_ranks(group)]
    here = Place(group, holders, dist.get_rank(group))
    expected = tuple(s.stop - s.start for s in here.box)
    if tuple(p.to_local().shape) != expected:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)}, placed as {p.placements}, has {tuple(p.to_local().shape)} here, "
            f"not {expected}: zeta knows shards of torch.chunk's sizes"
        )
    return here


def check_placement(value: Any, p: Any, place: Place | None) -> None:
    """Raises ValueError where saved state, a DTensor, lies over the ranks otherwise than p's state is to."""
    if not hasattr(value, "device_mesh"):
        return
    sharded = hasattr(p, "device_mesh") or (place is not None and place.parted())
    placements = p.placements if hasattr(p, "device_mesh") else (_shard_rows(),)
    if not sharded or value.placements != placements or value.to_local().shape != mine(p, place).shape:
        wish = f"placed as {placements}" if sharded else "whole on each rank"
        raise ValueError(
            f"state of shape {tuple(value.shape)} is placed as {value.placements} on {value.device_mesh}, but this "
            f"optimizer keeps it {wish}: bring it over with save_sharded and load_sharded"
        )


def _shard_rows() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)


def mine(t: Any, place: Place | None) -> Tensor:
    """The part of a parameter, its gradient or its state that this rank steps: a view."""
    if hasattr(t, "to_local"):
        return t.to_local()  # type: ignore[no-any-return]
    return t if place is None else t[place.box]  # type: ignore[no-any-return]


def gradient(p: Any) -> Any:
    """The gradient, placed as its parameter."""
    if hasattr(p, "device_mesh") and p.grad.placements != p.placements:
        return p.grad.redistribute(p.device_mesh, p.placements)
    return p.grad


def zeros(p: Any, dtype: torch.dtype, place: Place | None) -> Tensor:
    """Zeros for a parameter's state, placed as the state is: a DTensor where each rank keeps a part."""
    if hasattr(p, "device_mesh"):
        return torch.zeros_like(p, dtype=dtype)
    if place is None or not place.parted():
        return torch.zeros(p.shape, dtype=dtype, device=p.device)
    return _of_parts(torch.zeros(p[place.box].shape, dtype=dtype, device=p.device), p, place)


def placed(value: Tensor, p: Any, place: Place | None) -> Tensor:
    """A whole tensor of p's shape, which every rank has, placed as the state is."""
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    if place is None or not place.parted():
        return value.to(p.device)
    return _of_parts(value[place.box].to(p.device).clone(), p, place)


def _of_parts(here: Tensor, p: Tensor, place: Place) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh = _mesh(place.group, p.device.type)
    return DTensor.from_local(here, mesh, [_shard_rows()], run_check=False, shape=p.shape, stride=p.stride())


@cache
def _mesh(group: Any, device: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device)
