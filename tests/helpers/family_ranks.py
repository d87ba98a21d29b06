"""What each rank of test_family_ranks.py does: five steps of every class in every arrangement over ranks."""

import faulthandler
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import communication
import numpy as np
import torch
import torch._dynamo  # torch's optimizers import it: once for all ranks, here
import torch.distributed as dist
from kinds import unlike
from rank_arrays import whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from zeta import Route, family
from zeta.backends import torch as backend
from zeta.backends.torch import orthogonalize
from zeta.backends.torch import sums as torch_sums


class Mine(backend.Zeta):
    """A user's own class, here of a rule with a variance by rows and columns on both sides."""

    rule = family.rank1_both


class MineToo(backend.Zeta):
    rule = family.whiten_both


KINDS: dict[str, type[backend.Zeta]] = {kind.__name__: kind for kind in (Mine, MineToo)} | {
    name: kind for name, kind in vars(backend).items() if isinstance(kind, type)
}
UNLIKE = unlike(KINDS)  # for what is the same whatever the rule: half precision, counts, more ranks
STEPS = 5  # of which the second, third and fifth leave pieces out, and the first and fourth decompose
ROUTES = {
    "wide": Route("zeta", (1, 12, 20), "matrix"),
    "tall": Route("zeta", (1, 20, 12), "matrix"),
    "odd": Route("zeta", (1, 5, 7), "matrix"),  # fewer rows than it takes to share them evenly
    "row": Route("zeta", (1, 1, 9), "matrix"),
    "qkv": Route("zeta", (1, 20, 12), "side by side", (12, 4, 4)),
    "gate_up": Route("zeta", (1, 12, 16), "alternating", (1, 1), -1, 8),
    "columns": Route("zeta", (1, 12, 14), "side by side", (6, 8), -1),
    "heads": Route("zeta", (1, 18, 12), "alternating", (2, 2, 2), -2, 3),
    "thirds": Route("zeta", (3, 8, 12), "equal blocks of rows"),
    "experts": Route("zeta", (6, 8, 6), "stack"),
    "conv": Route("zeta", (2, 4, 18), "convolution in two groups"),
    "embed": Route("adamw", (), "embedding"),
    "norm": Route("adamw", (), "vector"),
}
SHAPES = {name: route.matrices[-2:] for name, route in ROUTES.items() if route.matrices} | {
    "thirds": (24, 12),
    "experts": (6, 8, 6),
    "conv": (8, 2, 3, 3),
    "embed": (16, 12),
    "norm": (12,),
}


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@cache
def gradients(step: int) -> dict[str, np.ndarray]:
    """At most steps without some experts, pieces, rows and columns, of which some live on one of two ranks alone."""
    rng = np.random.default_rng([1, step])
    grads = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    if step % 3:
        grads["experts"][2], grads["qkv"][12:16], grads["columns"][:, :6], grads["heads"][:2] = 0, 0, 0, 0
        grads["thirds"][8:16], grads["conv"][:4] = 0, 0
        for name in ("wide", "tall", "gate_up", "experts"):
            g = grads[name]
            rows, cols = g.shape[-2:]
            g[..., 1, :], g[..., :, 1] = 0, 0  # dead everywhere
            g[..., 2, cols // 2 :], g[..., 3, : cols // 2] = 0, 0  # dead on the one rank or the other, by columns
            g[..., rows // 2 :, 2], g[..., : rows // 2, 3] = 0, 0  # and by rows
    return grads


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, names: Any = SHAPES) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.tensor(start()[name], dtype=dtype)))


def optimizer(kind: str, model: nn.Module, precision: Any = torch.float32, **options: Any) -> backend.Zeta:
    """`precision` is that of the products; None is the default."""
    options = dict(lr=0.02, weight_decay=0.1) | options
    if KINDS[kind].rule.orthogonalizes:
        options |= {"ns_dtype": precision}
    if kind in ("Shampoo", "SOAP"):
        options |= {"precondition_frequency": 3}  # some steps decompose, others take what was kept
    named = dict(model.named_parameters())
    return KINDS[kind]([{"params": list(named.items()), "routes": [tuple(ROUTES[n]) for n in named]}], **options)


def train(model: nn.Module, optimizer: backend.Zeta) -> dict[str, np.ndarray]:
    """Parameters by name, state as "KEY.NAME", after five steps on the same gradients everywhere."""
    for step in range(STEPS):
        for name, p in model.named_parameters():
            g = torch.tensor(gradients(step)[name], dtype=p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if is_sharded(p) else g
        optimizer.step()
    return read(model, optimizer)


def is_sharded(p: Any) -> bool:
    return isinstance(p, DTensor)


def read(model: nn.Module, optimizer: backend.Zeta) -> dict[str, np.ndarray]:
    """A parameter with its remainder: which of two neighbours it is rounded to hangs on float32's last bit."""
    arrays: dict[str, np.ndarray] = {}
    for name, p in model.named_parameters():
        state = {key: whole(value) for key, value in optimizer.state[p].items()}
        arrays[name] = whole(p) + state.pop("remainder", 0.0)
        arrays |= {f"{key}.{name}": value for key, value in state.items()}
    return arrays


def alone(kind: str, dtype: torch.dtype = torch.float32, names: Any = SHAPES, **options: Any) -> dict[str, np.ndarray]:
    model = Model(dtype, names)
    return train(model, optimizer(kind, model, **options))


def copies(kind: str, dtype: torch.dtype = torch.float32, names: Any = SHAPES, **options: Any) -> dict[str, np.ndarray]:
    return alone(kind, dtype, names, process_group=dist.group.WORLD, **options)


def fsdp(
    kind: str, place: Any = None, mesh: DeviceMesh | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, np.ndarray]:
    model = fully_shard(Model(dtype), mesh=mesh, shard_placement_fn=place)
    return train(model, optimizer(kind, model, **options))


def columns(p: nn.Parameter) -> Shard | None:
    """FSDP2 shares the last axis out evenly or not at all."""
    return Shard(p.ndim - 1) if p.ndim > 1 and p.shape[-1] % dist.get_world_size() == 0 else None


def tensor_parallel(kind: str) -> dict[str, np.ndarray]:
    """The first layer by its outputs, the second by its inputs."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.ModuleDict({name: nn.Linear(*SHAPES[name][::-1], bias=False) for name in ("tall", "wide")})
    for name, layer in model.items():
        layer.weight = nn.Parameter(torch.tensor(start()[name]))
    parallelize_module(model, mesh, {"tall": ColwiseParallel(), "wide": RowwiseParallel()})
    named = Model(names=())
    for name, layer in model.items():
        named.register_parameter(name, layer.weight)
    return train(named, optimizer(kind, named))


def overwritten(right: Any, parts: Any, unit: Any, shape: Any) -> torch.Tensor:
    """The mistake of a sum that the next rank's part overwrites instead of adding to it."""
    total = right(parts, unit, shape)
    by_row, by_col = (n > 1 for n in shape(2, 2))
    for (of_rows, of_cols), t in parts:
        for own_rows, at_rows in torch_sums._numbers(of_rows, by_row):
            for own_cols, at_cols in torch_sums._numbers(of_cols, by_col):
                total[at_rows, at_cols] = t[own_rows, own_cols]
    return total


def mistaken(kind: str) -> dict[str, np.ndarray]:
    with patch.object(torch_sums, "put_together", partial(overwritten, torch_sums.put_together)):
        return fsdp(kind, columns)


def by_default(run: Callable[[], Any], has: bool) -> Any:
    """With the products that a CPU with (or without) bfloat16 units takes by itself."""
    with patch.object(orthogonalize, "CPU_HAS_BFLOAT16", has):
        return run()


@cache
def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))


def copies_of_rows(kind: str) -> dict[str, np.ndarray]:
    return fsdp(kind, mesh=square())


def default(kind: str, has: bool) -> dict[str, np.ndarray]:
    return by_default(partial(fsdp, kind, precision=None), has)


HALF = dict(dtype=torch.bfloat16)
RATE = dict(maximize=True, lr=torch.tensor([0.02]))
ONE = dict(names=("wide",))
PARTS = "copies, state in parts"
MULTIPLY = [kind for kind in KINDS if KINDS[kind].rule.orthogonalizes]
MULTIPLY_UNLIKE = [kind for kind in MULTIPLY if kind in UNLIKE]
ARRANGEMENTS: list[tuple[tuple[int, ...], str, Callable[..., dict[str, np.ndarray]], Iterable[str]]] = [
    ((1, 2), "rows", fsdp, KINDS),
    ((1, 2), PARTS, partial(copies, shard_state=True), KINDS),
    ((2,), "copies", copies, KINDS),
    ((2,), "columns", partial(fsdp, place=columns), KINDS),
    ((2,), "tensor parallel", tensor_parallel, KINDS),
    ((2,), "half, rows", partial(fsdp, **HALF), UNLIKE),
    ((2,), f"half, {PARTS}", partial(copies, shard_state=True, **HALF), UNLIKE),
    ((2,), "maximize, a tensor rate", partial(fsdp, place=columns, **RATE), UNLIKE),
    ((2,), "default True, rows", partial(default, has=True), MULTIPLY),
    ((2,), "default False, rows", partial(default, has=False), MULTIPLY_UNLIKE),
    ((2,), "float16, rows", partial(fsdp, precision=torch.float16), MULTIPLY_UNLIKE),
    ((4,), "rows", fsdp, UNLIKE),
    ((4,), PARTS, partial(copies, shard_state=True), UNLIKE),
    ((4,), "copies of rows", copies_of_rows, KINDS),
    ((4,), "one matrix", partial(copies, shard_state=True, **ONE), KINDS),
]
CASES = [(n, name, kind) for ranks, name, _, kinds in ARRANGEMENTS for n in ranks for kind in kinds]
COUNTED = [(cut, kind) for cut in communication.AXES for kind in UNLIKE]  # on four ranks


def results(n: int) -> Iterator[tuple[str, Any]]:
    """What this one of n ranks gets in each case, by "KIND: NAME"."""
    for ranks, name, run, kinds in ARRANGEMENTS:
        for kind in kinds if n in ranks else ():
            yield f"{kind}: {name}", run(kind)
    for kind in ("Eta", "Mine") if n == 2 else ():
        yield f"{kind}: mistaken", mistaken(kind)
    for cut, kind in COUNTED if n == 4 else ():
        yield f"{kind}: counted {cut}", communication.counted(cut, KINDS[kind])


def main(rank: int, ranks: int, folder: str) -> None:
    """Writes {arrangement: arrays} to folder/RANKS-RANK.pt."""
    faulthandler.dump_traceback_later(200, exit=True)  # ranks that wait for one another would do so for ever
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    torch.save(dict(results(ranks)), f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()
