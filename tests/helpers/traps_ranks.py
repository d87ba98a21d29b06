"""What each of two ranks does in test_torch_traps.py: what users fall into, and what must come of it."""

import faulthandler
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial, partialmethod
from typing import Any
from unittest.mock import patch

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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from zeta.backends import torch as backend
from zeta.backends.torch import Zeta, param_groups

STEPS = 6
OPTIONS: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, ns_dtype=torch.float32)
ARRANGEMENTS = ("rows", "copies", "copies, state sharded")


class Model(nn.Module):
    """Matrices, two of them of one shape, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.wide, self.tall = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)


def arranged(how: str, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A model as its ranks hold it, and what the optimizer must be told of that."""
    model = model or Model()
    if how == "rows":
        return fully_shard(model), {}
    return model, {} if how == "alone" else {"process_group": dist.group.WORLD, "shard_state": "sharded" in how}


def backward(model: nn.Module, step: int) -> None:
    """Sets gradients that are the same on all ranks and in one process."""
    rng = np.random.default_rng(step)
    for p in model.parameters():
        g = torch.tensor(rng.standard_normal(tuple(p.shape)), dtype=p.dtype)
        p.grad = scatter(g, p) if isinstance(p, DTensor) else g


def train(model: nn.Module, optimizer: Zeta, steps: Iterable[int] = range(STEPS), step: Any = None) -> None:
    for t in steps:
        backward(model, t)
        (step or optimizer.step)()


def told(do: Callable[[], Any]) -> str:
    """What the error says."""
    try:
        do()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Ranks that describe their parameters otherwise. Each differs on the second rank.


def named(model: nn.Module, odd: bool) -> list[Any]:
    return list(model.named_parameters())


def reverse(model: nn.Module, odd: bool) -> list[Any]:
    return named(model, odd)[:: -1 if odd else 1]


def swapped(model: nn.Module, odd: bool) -> list[Any]:
    """Two of one shape: nothing but their names distinguishes them."""
    own = dict(named(model, odd))
    if odd:
        names = list(own)
        i, k = names.index("first.weight"), names.index("second.weight")
        names[i], names[k] = names[k], names[i]
        own = {name: own[name] for name in names}
    return list(own.items())


def nameless(model: nn.Module, odd: bool) -> list[Any]:
    return [{"params": [p for _, p in reverse(model, odd) if p.ndim > 1], "treatment": "zeta"}]


def one_more(model: nn.Module, odd: bool) -> list[Any]:
    return named(model, odd)[: None if odd else -1]


def frozen(model: nn.Module, odd: bool) -> list[Any]:
    model.get_parameter("tall.weight").requires_grad_(not odd)
    model.get_parameter("tall.weight").grad = None
    return named(model, odd)


def other_dtype(model: nn.Module, odd: bool) -> list[Any]:
    if odd:
        model.wide.bfloat16()
    return named(model, odd)


def other_treatment(model: nn.Module, odd: bool) -> list[Any]:
    names = ("wide.weight",) if odd else ()
    first, rest = ([pair for pair in named(model, odd) if (pair[0] in names) == own] for own in (True, False))
    return [{"params": first + rest, "routes": [("adamw", (), "")] * len(first) + routes(rest)}]


def routes(pairs: list[Any]) -> list[Any]:
    return [("zeta", (1, *p.shape), "") if p.ndim > 1 else ("adamw", (), "") for _, p in pairs]


def other_groups(model: nn.Module, odd: bool) -> list[Any]:
    return param_groups(model)[:: -1 if odd else 1]


DIFFERENT = (reverse, swapped, nameless, one_more, frozen, other_dtype, other_treatment, other_groups)


def refused(how: str, groups: Callable[[nn.Module, bool], list[Any]]) -> dict[str, Any]:
    """What the first step says, and whether it left everything as it was."""
    model, options = arranged(how)
    backward(model, 0)
    given = groups(model, dist.get_rank() == 1)
    before = {name: whole(p) for name, p in model.named_parameters()}
    opt = Zeta(given, **OPTIONS, **options)
    error = told(opt.step)
    same = all(np.array_equal(before[name], whole(p)) for name, p in model.named_parameters())
    return {"error": error, "unchanged": same and not any(opt.state.values())}


def other_options(odd: dict[str, Any]) -> dict[str, Any]:
    """Of how much travels: sizes would differ."""
    model, options = arranged("copies")
    backward(model, 0)
    opt = Zeta(model.named_parameters(), **OPTIONS, **options | (odd if dist.get_rank() else {}))
    return {"error": told(opt.step), "unchanged": not any(opt.state.values())}


def other_optimizers() -> dict[str, Any]:
    """Two optimizers, which one rank steps in another order."""
    model, options = arranged("copies")
    backward(model, 0)
    opts = [Zeta(param_groups(layer), **OPTIONS, **options) for layer in (model.first, model.wide)]
    error = told(opts[dist.get_rank()].step)
    return {"error": error, "unchanged": not any(o.state for o in opts)}


def later(what: str) -> dict[str, Any]:
    """What only one rank does between two steps; the others, who asked before, raise as well."""
    model, options = arranged("copies")
    opt = Zeta(param_groups(model), **OPTIONS, **options)
    train(model, opt, range(1))
    before = read(model, opt)
    backward(model, 1)
    if dist.get_rank() and what == "a new group":
        extra = nn.Parameter(torch.ones(4, 4))
        extra.grad = torch.ones(4, 4)
        opt.add_param_group({"params": [("extra", extra)]})
    elif dist.get_rank():
        model.first.weight.grad = None
    error = told(opt.step)
    return {"error": error, "unchanged": all(np.array_equal(before[k], x) for k, x in read(model, opt).items())}


def asked_once(how: str) -> list[int]:
    """How often the host reads a tensor in each of four steps."""
    model, options = arranged(how)
    opt, waits = Zeta(param_groups(model), **OPTIONS, **options), list[int]()
    for t in range(4):
        backward(model, t)
        if t == 3:
            model.first.weight.grad = None  # on all ranks
        reads: list[torch.Tensor] = []
        with patch.object(torch.Tensor, "tolist", partialmethod(_read, torch.Tensor.tolist, reads)):
            opt.step()
        waits.append(len(reads))
    return waits


def _read(x: torch.Tensor, tolist: Callable[..., Any], reads: list[torch.Tensor]) -> Any:
    reads.append(x)
    return tolist(x)


def two_meshes() -> dict[str, np.ndarray]:
    """Parameters on two groups of the same ranks, between which one rank lists them in another order: no deadlock."""
    meshes = [DeviceMesh.from_group(dist.new_group([0, 1]), "cpu", mesh_dim_names=(name,)) for name in "ab"]
    model = Model()
    for i, layer in enumerate((model.first, model.wide)):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, meshes[i], [Shard(0)], src_data_rank=None))
    pairs = [("first.weight", model.first.weight), ("wide.weight", model.wide.weight)]
    opt = Zeta(pairs[:: -1 if dist.get_rank() else 1], **OPTIONS)
    for t in range(STEPS):
        backward(model, t)
        opt.step()
    return {name: whole(p) for name, p in pairs}


def compiled(how: str, kind: str) -> dict[str, Any]:
    """Steps of a compiled and of an eager optimizer, and how many graphs there are after each step."""
    graphs: list[int] = []
    count = [0]

    def counting(graph: Any, inputs: Any) -> Any:
        count[0] += any(node.op == "call_function" for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    arrays = []
    for compile_it in (False, True):
        model, options = arranged(how)
        opt = getattr(backend, kind)(param_groups(model), weight_decay=0.1, lr=torch.tensor(0.02), **options)
        step = torch.compile(opt.step, backend=counting) if compile_it else opt.step
        for t in range(STEPS):
            train(model, opt, [t], step)
            for group in opt.param_groups:
                group["lr"].mul_(0.9)
            if compile_it:
                graphs.append(count[0])
        arrays.append(read(model, opt))
    return {"graphs": graphs, "eager": arrays[0], "compiled": arrays[1]}


def full_state_dict(kind: str) -> dict[str, Any]:
    """Steps with `ns_dtype`, torch's own full state on the CPU, and more steps from it; and steps without a stop."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states, arrays = [], []
    for pieces in ([range(STEPS)], [range(3), range(3, STEPS)]):
        for steps in pieces:
            model, _ = arranged("rows")
            opt = getattr(backend, kind)(param_groups(model), **OPTIONS | {"ns_dtype": torch.bfloat16})
            if states:
                set_model_state_dict(model, states[0], options=options)
                set_optimizer_state_dict(model, opt, states[1], options=options)
            train(model, opt, steps)
            if len(pieces) > 1:
                states = [get_model_state_dict(model, options=options)]
                states.append(get_optimizer_state_dict(model, opt, options=options))
                dist.broadcast_object_list(states)  # torch leaves them with the first rank alone
        arrays.append(read(model, opt))
    opt.param_groups[0]["ns_dtype"] = torch.bfloat16  # what stood there before, and made torch raise
    error = told(lambda: get_optimizer_state_dict(model, opt, options=options))
    opt.param_groups[0]["ns_dtype"] = "bfloat16"
    plain = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return {"straight": arrays[0], "stopped": arrays[1], "json": json.dumps(plain), "with a dtype": error}


def no_backend(how: str) -> str:
    """Of groups for GPUs alone, whose ranks have their parameters on the CPU."""
    group = dist.new_group(backend="cuda:gloo")
    model = Model()
    if how == "copies":
        return told(lambda: Zeta(model.named_parameters(), **OPTIONS, process_group=group))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("gpus",))  # else torch takes it for the one of before
    return told(lambda: Zeta(fully_shard(model, mesh=mesh).named_parameters(), **OPTIONS))


def half_later(how: str) -> dict[str, np.ndarray]:
    """Three steps, `model.bfloat16()`, and three more."""
    model, options = arranged(how)
    opt = Zeta(param_groups(model), **OPTIONS, **options)
    train(model, opt, range(3))
    model.bfloat16()
    train(model, opt, range(3, STEPS))
    return read(model, opt)


def removed(how: str) -> dict[str, np.ndarray]:
    """Steps after a parameter has left its group, and others, of its shape, came where it was in memory."""
    model, options = arranged(how)
    opt = Zeta(model.named_parameters(), **OPTIONS, **options)
    train(model, opt, range(2))
    for t, layer in enumerate(("first", "second")):
        group, old = opt.param_groups[0], model.get_parameter(f"{layer}.weight")
        at = next(i for i, p in enumerate(group["params"]) if p is old)
        for key in ("params", "param_names", "routes"):
            del group[key][at]
        opt.state.pop(old)
        data = old.detach().clone()
        delattr(model.get_submodule(layer), "weight")
        del old
        new = nn.Parameter(data)
        model.get_submodule(layer).weight = new
        opt.add_param_group({"params": [(f"{layer}.weight", new)]})
        train(model, opt, [2 + t])
    return read(model, opt)


def resumed(how: str) -> dict[str, np.ndarray]:
    """Back to the third step after the fifth, with the plans of before."""
    model, options = arranged(how)
    opt = Zeta(param_groups(model), **OPTIONS, **options)
    train(model, opt, range(3))
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, opt.state_dict()
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)
    train(model, opt, range(10, 12))  # which are forgotten
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    train(model, opt, range(3, STEPS))
    return read(model, opt)


def not_a_number(how: str) -> dict[str, np.ndarray]:
    """A NaN in one gradient makes its own matrix NaN, and no other."""
    model, options = arranged(how)
    opt = Zeta(param_groups(model), **OPTIONS, **options)
    for t in range(3):
        backward(model, t)
        if t == 1:
            g: Any = model.get_parameter("first.weight").grad
            if not isinstance(g, DTensor):
                g[0, 0] = float("nan")
            elif dist.get_rank() == 0:  # whose shard has the first row
                g.to_local()[0, 0] = float("nan")
        opt.step()
    return read(model, opt)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for how in ARRANGEMENTS:
        for groups in DIFFERENT:
            if how == "rows" and groups is other_dtype:
                continue  # FSDP2 takes one dtype
            yield f"refused {groups.__name__} {how}", partial(refused, how, groups)
        yield f"asked once {how}", partial(asked_once, how)
        for do in (half_later, removed, resumed, not_a_number):
            if not (do is removed and how == "rows"):  # FSDP2 keeps its parameters
                yield f"{do.__name__} {how}", partial(do, how)
    yield "refused comm_dtype", partial(other_options, {"comm_dtype": torch.bfloat16})
    yield "refused shard_state", partial(other_options, {"shard_state": True})
    yield "refused optimizers", other_optimizers
    for what in ("a new group", "no gradient"):
        yield f"later {what}", partial(later, what)
    yield "two meshes", two_meshes
    for kind in ("Zeta", "NorMuon", "AdaMuon"):
        yield f"full state dict {kind}", partial(full_state_dict, kind)
    for how, kind in (("rows", "Zeta"), ("copies", "NorMuon")):
        yield f"no backend {how}", partial(no_backend, how)
        yield f"compiled {how}", partial(compiled, how, kind)


def main(rank: int, ranks: int, folder: str, names: tuple[str, ...] = ()) -> None:
    """Writes {case: what came of it} to folder/RANK.pt."""
    faulthandler.dump_traceback_later(100, exit=True)  # ranks that wait for one another would do so for ever
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save({name: do() for name, do in cases() if not names or name in names}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
