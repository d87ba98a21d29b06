"""What each rank of test_torch_distributed.py does: ten steps in every arrangement of parameters over ranks."""

import copy
import faulthandler
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch's optimizers import it: once for all ranks, here
import torch.distributed as dist
from rank_arrays import read, scatter, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from zeta import Route
from zeta.backends.torch import Zeta, load_sharded, param_groups, save_sharded

STEPS = 10
SHAPES = {
    "wide": (24, 40),
    "tall": (40, 24),
    "odd": (5, 7),  # fewer rows than it takes to share them evenly
    "row": (1, 9),
    "qkv": (40, 24),
    "fused_columns": (24, 30),
    "heads": (36, 24),
    "experts": (6, 16, 12),
    "conv": (8, 4, 3, 3),
    "embed": (30, 24),
    "norm": (24,),
    "scalar": (),
    "frozen": (8, 8),
}
ROUTES = {
    "qkv": Route("zeta", (1, 40, 24), "fused", (24, 8, 8)),
    "fused_columns": Route("zeta", (1, 24, 30), "fused", (10, 20), -1),
    "heads": Route("zeta", (1, 36, 24), "fused", (4, 4, 4), -2, 3),
    "conv": Route("zeta", (2, 4, 36), "convolution in two groups"),
    "embed": Route("adamw", (), "embedding"),
    "norm": Route("adamw", (), "vector"),
    "scalar": Route("adamw", (), "vector"),
}
OPTIONS: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, ns_dtype=torch.float32)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """None for the frozen one; at some steps zero for an expert and for one part of a fused layer."""
    rng = np.random.default_rng([1, step])
    found = {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items() if name != "frozen"}
    if step % 3:
        found["experts"][2], found["qkv"][24:32], found["fused_columns"][:, :10], found["heads"][:4] = 0, 0, 0, 0
    return found


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, array in start().items():
            self.register_parameter(name, nn.Parameter(torch.tensor(array, dtype=dtype), name != "frozen"))


def optimizer(model: nn.Module, **options: Any) -> Zeta:
    named = dict(model.named_parameters())
    routes = [tuple(ROUTES.get(n) or Route("zeta", _stack(tuple(p.shape)), "matrix")) for n, p in named.items()]
    return Zeta([{"params": list(named.items()), "routes": routes}], **OPTIONS | options)


def _stack(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] if len(shape) > 2 else 1, *shape[-2:])


def train(model: nn.Module, optimizer: Zeta, steps: range = range(STEPS)) -> None:
    for step in steps:
        grads = gradients(step)
        for name, p in model.named_parameters():
            if name in grads:
                g = torch.tensor(grads[name], dtype=p.dtype)
                p.grad = scatter(g, p) if isinstance(p, DTensor) else g
        optimizer.step()
    assert len(optimizer.state) == sum(p.grad is not None for p in model.parameters())
    optimizer.state_dict()


def copies(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, np.ndarray]:
    model = Model(dtype)
    opt = optimizer(model, process_group=dist.group.WORLD, **options)
    train(model, opt)
    return read(model, opt)


def fsdp(place: Callable[[nn.Parameter], Shard | None] | None = None, mesh: DeviceMesh | None = None) -> Any:
    model = Model()
    del model.scalar  # FSDP2 takes none
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    opt = optimizer(model)
    train(model, opt)
    return read(model, opt)


def columns(p: nn.Parameter) -> Shard | None:
    """FSDP2 shares the last axis out evenly or not at all."""
    return Shard(p.ndim - 1) if p.ndim > 1 and p.shape[-1] % dist.get_world_size() == 0 else None


def experts() -> dict[str, np.ndarray]:
    """Experts on ranks of their own, all else copied, as DTensors."""
    model, mesh = Model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for name, p in list(model.named_parameters()):
        placement = Shard(0) if name == "experts" else Replicate()
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.data, mesh, [placement], src_data_rank=None)))
    opt = optimizer(model)
    train(model, opt)
    return read(model, opt)


def partial_gradients() -> dict[str, np.ndarray]:
    """Gradients that are still to be added up over the ranks, some of which hold nothing of some parameters."""
    model, mesh = Model(), init_device_mesh("cpu", (dist.get_world_size(),))
    del model.scalar
    for name, p in list(model.named_parameters()):
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)], src_data_rank=None)))
    opt = optimizer(model)
    for step in range(STEPS):
        for name, grad in gradients(step).items():
            if name != "scalar":
                part = torch.tensor(grad) / dist.get_world_size()
                model.get_parameter(name).grad = DTensor.from_local(part, mesh, [Partial()])
        opt.step()
    return read(model, opt)


def full_state_dict() -> dict[str, np.ndarray]:
    """Five steps, torch's own full state, and five more from it."""
    options, states = StateDictOptions(full_state_dict=True), []
    for steps in (range(5), range(5, STEPS)):
        model = Model()
        del model.scalar
        fully_shard(model)
        opt = optimizer(model)
        if states:
            set_model_state_dict(model, states[0], options=options)
            set_optimizer_state_dict(model, opt, states[1], options=options)
        train(model, opt, steps)
        states = [get_model_state_dict(model, options=options), get_optimizer_state_dict(model, opt, options=options)]
        dist.broadcast_object_list(states)  # torch leaves them with the first rank alone
    return read(model, opt)


def from_one_process(shard_state: bool) -> dict[str, np.ndarray]:
    """Five steps of one process, and five more of ranks that load its whole state."""
    alone, model = Model(), Model()
    if not shard_state:
        del alone.scalar, model.scalar
    first = optimizer(alone)
    train(alone, first, range(5))
    model.load_state_dict(alone.state_dict())
    if not shard_state:
        fully_shard(model)
    opt = optimizer(model, process_group=dist.group.WORLD if shard_state else None, shard_state=shard_state)
    opt.load_state_dict(first.state_dict())
    train(model, opt, range(5, STEPS))
    return read(model, opt)


def told(do: Callable[[], Any]) -> str:
    """What the error says."""
    try:
        do()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused() -> dict[str, str]:
    """The errors of what ranks cannot do, which must be everyone's, and leave everything as it was."""
    found, model = {}, Model()
    opt = optimizer(model, process_group=dist.group.WORLD, shard_state=True)
    train(model, opt, range(1))
    before = read(model, opt)
    model.get_parameter(("wide", "norm")[dist.get_rank()]).grad = None
    found["other gradients"] = told(opt.step)
    if dist.get_rank():
        opt.zero_grad()
    found["no gradients"] = told(opt.step)
    found["a copy"] = told(lambda: copy.deepcopy(opt))
    assert all(np.array_equal(before[name], array) for name, array in read(model, opt).items())

    alone, halves = Model(), Model()
    found["a part"] = told(lambda: optimizer(alone).load_state_dict(opt.state_dict()))
    del halves.scalar
    by_columns = optimizer(fully_shard(halves, shard_placement_fn=columns))
    train(halves, by_columns, range(1))
    rows = Model()
    del rows.scalar
    found["columns as rows"] = told(lambda: optimizer(fully_shard(rows)).load_state_dict(by_columns.state_dict()))
    for original in (True, False):
        flat = FullyShardedDataParallel(mlp(), use_orig_params=original, device_id=torch.device("cpu"))
        found[f"FSDP1 {original}"] = told(lambda flat=flat: param_groups(flat))  # type: ignore[misc]
        found[f"FSDP1 {original}, named"] = told(lambda flat=flat: Zeta(flat.named_parameters()))  # type: ignore[misc]
    return found


def taking_turns(group: Any = None) -> dict[str, np.ndarray]:
    """As experts may, another parameter at every step."""
    model = Model()
    opt = optimizer(model, process_group=group)
    for step in range(STEPS):
        opt.zero_grad()
        name = ("wide", "tall", "odd")[step % 3]
        model.get_parameter(name).grad = torch.tensor(gradients(step)[name])
        opt.step()
    return read(model, opt)


def shards_alone() -> dict[str, np.ndarray]:
    """The mistake that the other arrangements must not make: each shard taken for a matrix of its own."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    p = nn.Parameter(torch.tensor(start()["wide"]).chunk(ranks, 1)[rank].clone())
    opt = Zeta([("wide", p)], **OPTIONS)
    for step in range(STEPS):
        p.grad = torch.tensor(gradients(step)["wide"]).chunk(ranks, 1)[rank].clone()
        opt.step()
    parts = [torch.empty_like(p) for _ in range(ranks)]
    dist.all_gather(parts, p.detach())
    return {"wide": whole(torch.cat(parts, 1))}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def train_mlp(model: nn.Module) -> dict[str, np.ndarray]:
    """Ten real steps, with the gradients of a backward pass, the same data on every rank."""
    opt, rng = Zeta(model.named_parameters(), **OPTIONS), np.random.default_rng(2)
    for _ in range(STEPS):
        x = torch.tensor(rng.standard_normal((8, 16)), dtype=torch.float32)
        opt.zero_grad()
        (model(x) - x).square().mean().backward()
        opt.step()
    return read(model, opt)


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def moved_house(folder: str) -> dict[str, np.ndarray]:
    """Five steps with rows sharded, saved, and five more with columns sharded."""
    model = Model()
    del model.scalar
    fully_shard(model)
    opt = optimizer(model)
    train(model, opt, range(5))
    save_sharded(f"{folder}/saved-{dist.get_world_size()}", model, opt, {"step": 5})
    model = Model()
    del model.scalar
    fully_shard(model, shard_placement_fn=columns)
    opt = optimizer(model)
    assert load_sharded(f"{folder}/saved-{dist.get_world_size()}", model, opt) == {"step": 5}
    train(model, opt, range(5, STEPS))
    return read(model, opt)


def arrangements(folder: str) -> Iterator[tuple[str, Any]]:
    """Two ranks try everything; one and four what may be otherwise with them: nothing to send, and empty shards."""
    ranks = dist.get_world_size()
    yield "copies, state sharded", partial(copies, shard_state=True)
    yield "rows, then columns", partial(moved_house, folder)
    if ranks == 1:
        yield "half precision", partial(copies, torch.bfloat16)
        return
    yield "experts", experts
    if ranks == 2:
        yield "shards alone", shards_alone
        yield "copies", copies
        yield "rows", fsdp
        yield "columns", partial(fsdp, columns)
        yield "partial gradients", partial_gradients
        yield "half precision on the way", partial(copies, shard_state=True, comm_dtype=torch.bfloat16)
        yield "full state dict", full_state_dict
        yield "state of one process in rows", partial(from_one_process, False)
        yield "state of one process sharded", partial(from_one_process, True)
        yield "taking turns", partial(taking_turns, dist.group.WORLD)
        yield "half precision", partial(copies, torch.bfloat16)
        yield "half precision, state sharded", partial(copies, torch.bfloat16, shard_state=True)
        yield "tensor parallel", lambda: train_mlp(tensor_parallel(init_device_mesh("cpu", (2,))))
        yield "refused", refused
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        yield "rows, twice", partial(fsdp, None, mesh)
        yield (
            "tensor parallel, rows",
            lambda: train_mlp(fully_shard(tensor_parallel(mesh["inner"]), mesh=mesh["outer"])),
        )


def main(rank: int, ranks: int, folder: str) -> None:
    """Writes {arrangement: arrays} to folder/RANKS-RANK.pt."""
    faulthandler.dump_traceback_later(100, exit=True)  # ranks that wait for one another would do so for ever
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    torch.save({name: run() for name, run in arrangements(folder)}, f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()
