"""What a step costs each rank: bytes sent, operations of Newton-Schulz, and how even they are.

Beside it the plain way: every rank gathers every whitened matrix and orthogonalises all of them. The numbers follow
from `zeta.sharding`, which the optimizers obey; `--check` counts them in real runs of two and four ranks. Zeta stands
for rules that send x and u alone, Eta for those that need sums, NorMuon for those whose second half has state.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from measure import show

import zeta
from zeta import family
from zeta.core import Rule
from zeta.newton_schulz_forms import flops
from zeta.routing.layout import Route, shapes
from zeta.sharding import Box, Held, box_size, held, plan, sent
from zeta.storage import stored

Shapes = dict[str, tuple[int, ...]]
AXES = {"copies": None, "rows": 0, "columns": -1}  # of every parameter, what the ranks shard


RULES = {"Zeta": family.zeta, "Eta": family.eta, "NorMuon": family.normuon}


class Cost(NamedTuple):
    """Of each rank."""

    sent: list[int]  # entries
    flops: list[int]
    state: list[int]  # entries, of the matrices


def dense(layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocab: int, head: int = 128) -> Shapes:
    """Names and shapes of a model like Qwen3 or Llama."""
    sizes = {"q": (heads * head, width), "k": (kv_heads * head, width), "v": (kv_heads * head, width)}
    layer: Shapes = {f"self_attn.{name}_proj": shape for name, shape in sizes.items()}
    layer |= {"self_attn.o_proj": (width, heads * head), "mlp.down_proj": (width, hidden)}
    layer |= {f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    return _model(layers, width, vocab, {f"{name}.weight": shape for name, shape in layer.items()})


def experts(layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocab: int, count: int) -> Shapes:
    """The same with a mixture of experts, each kind of matrix one stack, as Transformers keeps it."""
    one = dense(1, width, hidden, heads, kv_heads, vocab)
    layer = {n.removeprefix("model.layers.0."): s for n, s in one.items() if "layers" in n and "mlp" not in n}
    layer |= {"mlp.gate.weight": (count, width), "mlp.experts.gate_up_proj": (count, 2 * hidden, width)}
    return _model(layers, width, vocab, layer | {"mlp.experts.down_proj": (count, width, hidden)})


def _model(layers: int, width: int, vocab: int, layer: Shapes) -> Shapes:
    ends = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    return ends | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


MODELS: dict[str, Callable[[], Shapes]] = {  # layers, width, hidden, heads, key-value heads, vocabulary (, experts)
    "Qwen3-0.6B": partial(dense, 28, 1024, 3072, 16, 8, 151936),
    "Qwen3-1.7B": partial(dense, 28, 2048, 6144, 16, 8, 151936),
    "Qwen3-8B": partial(dense, 36, 4096, 12288, 32, 8, 151936),
    "Qwen3-32B": partial(dense, 64, 5120, 25600, 64, 8, 151936),
    "Llama-3-70B": partial(dense, 80, 8192, 28672, 64, 8, 128256),
    "Qwen3-30B-A3B": partial(experts, 48, 2048, 768, 32, 4, 151936, 128),
    "Mixtral-8x7B": partial(experts, 32, 4096, 14336, 32, 8, 32000, 8),
    "small": partial(dense, 12, 96, 192, 4, 2, 256, 16),  # for --check
}


def cost(model: Shapes, mesh: tuple[int, ...], cuts: tuple[str, ...], rule: Rule = family.zeta) -> Cost:
    """Of one step of the model's matrices over a mesh, whose axes hold copies or shard rows or columns."""
    by_name = routes(model)
    arrays: dict[Any, Any] = {n: (model[n], r, None, holders(model[n], mesh, cuts)) for n, r in by_name.items()}
    batches, ranks = plan(arrays), prod(mesh)
    work = [0] * ranks
    for unit, owner in (task for batch in batches for task in batch):
        work[owner] += sum(n * flops(rows, cols) for n, rows, cols in shapes(unit.route))
    state = [sum(kept(rule, r, shape, h[rank].box) for shape, r, _, h in arrays.values()) for rank in range(ranks)]
    return Cost(sent(batches, {n: array[3] for n, array in arrays.items()}, rule), work, state)


def kept(rule: Rule, route: Route, shape: tuple[int, ...], box: Box) -> int:
    """The entries of a parameter's state on a rank with this part of it."""
    stored_shapes = stored(rule.keeps, route, shape)
    return sum(prod(box_size(box)) if stored_shapes[key] == shape else prod(stored_shapes[key]) for key in rule.keeps)


def gathered(model: Shapes, mesh: tuple[int, ...], cuts: tuple[str, ...]) -> int:
    """The entries that a rank sends where every rank gathers every matrix."""
    parts = {n: holders(model[n], mesh, cuts) for n in routes(model)}
    peers = prod(n for n, cut in zip(mesh, cuts, strict=True) if cut != "copies") - 1
    return max(peers * sum(prod(box_size(h[rank].box)) for h in parts.values()) for rank in range(prod(mesh)))


def routes(model: Shapes) -> dict[str, Route]:
    by_name = {name: zeta.route(name, shape) for name, shape in model.items()}
    return {name: r for name, r in by_name.items() if r.treatment == "zeta"}


def holders(shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[str, ...]) -> list[Held]:
    axes = [AXES[cut] for cut in cuts]
    return held(shape, mesh, [None if axis is None else axis % len(shape) for axis in axes])


def row(name: str, mesh: tuple[int, ...], cuts: tuple[str, ...], width: int) -> dict[str, Any]:
    model = MODELS[name]()
    planned = cost(model, mesh, cuts)
    whole = sum(planned.flops)
    return {
        "model": name,
        "matrices, 1e9": sum(prod(model[n]) for n in routes(model)) / 1e9,
        "ranks": " of ".join(f"{n} {cut}" for n, cut in zip(mesh, cuts, strict=True)),
        "GB sent, most": width * max(planned.sent) / 1e9,
        **{
            name: width * max(cost(model, mesh, cuts, rule).sent) / 1e9
            for name, rule in RULES.items()
            if name != "Zeta"
        },
        "mean": width * sum(planned.sent) / len(planned.sent) / 1e9,
        "gather all": width * gathered(model, mesh, cuts) / 1e9,
        "TFLOP, most": max(planned.flops) / 1e12,
        "gather all ": whole / 1e12,
        "most / mean": max(planned.flops) * len(planned.flops) / whole,
    }


def counted(cut: str, kind: Any = None) -> tuple[int, int, int]:
    """What this rank of torch.distributed really sends, computes and keeps in one step of the small model."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.utils.flop_counter import FlopCounterMode

    from zeta.backends.torch import Zeta
    from zeta.backends.torch import step as torch_step

    mesh, params, entries, flops = init_device_mesh("cpu", (dist.get_world_size(),)), [], 0, 0
    model = MODELS["small"]()
    for name in routes(model):
        axis = AXES[cut]
        placement = Replicate() if axis is None else Shard(axis % len(model[name]))
        p, g = (distribute_tensor(torch.randn(model[name]), mesh, [placement], src_data_rank=None) for _ in range(2))
        params.append((name, nn.Parameter(p)))
        params[-1][1].grad = g
    send = dist.all_to_all_single

    def count(received: Any, out: Any, sizes: list[int], counts: list[int], **names: Any) -> Any:
        nonlocal entries
        entries += sum(counts) - counts[dist.get_rank()]
        return send(received, out, sizes, counts, **names)

    def multiplied(newton_schulz: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal flops
            with FlopCounterMode(display=False) as counter:  # around the products alone: it is slow
                y = newton_schulz(*arguments)
            flops += counter.get_total_flops()
            return y

        return run

    optimizer = (kind or Zeta)(params)
    both = {name: multiplied(getattr(torch_step, name)) for name in ("newton_schulz", "newton_schulz_")}
    with patch.object(dist, "all_to_all_single", count), patch.multiple(torch_step, **both):
        optimizer.step()
    state = [value for _, p in params for value in optimizer.state[p].values()]
    return entries, flops, sum(getattr(v, "to_local", lambda v=v: v)().numel() for v in state)


def rank_of(rank: int, ranks: int, folder: str) -> None:
    """Writes what it counted to the folder."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from trainer.on_torch import leave

    from zeta.backends import torch as backend

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(
        {(name, cut): counted(cut, getattr(backend, name)) for name in RULES for cut in AXES}, f"{folder}/{rank}"
    )
    leave(0)


def measured(ranks: int) -> dict[tuple[str, str], Cost]:
    """What was counted on each of so many processes of this machine."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_of, (ranks, folder), nprocs=ranks)
        counts = [torch.load(Path(folder, str(rank))) for rank in range(ranks)]
    return {what: Cost(*map(list, zip(*(one[what] for one in counts), strict=True))) for what in counts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=[name for name in MODELS if name != "small"])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--copies", type=int, default=1, help="of the whole model; the ranks of each shard it")
    parser.add_argument("--cut", choices=AXES, default="rows", help="what they shard; copies: all hold all (DDP)")
    parser.add_argument("--half", action="store_true", help="in two bytes an entry (comm_dtype), else in four")
    parser.add_argument("--check", action="store_true", help="count in real runs of 2 and 4 ranks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.backend, options.device = "torch", "cpu"
    if options.ranks % options.copies:
        parser.error(f"--ranks {options.ranks} does not divide into --copies {options.copies}")
    if options.check:
        rows = [
            {
                "ranks": ranks,
                "optimizer": name,
                "cut": cut,
                "": what,
                "of each rank": ", ".join(map("{:,}".format, got)),
                "as told": got == want,
            }
            for ranks in (2, 4)
            for (name, cut), real in measured(ranks).items()
            for what, got, want in zip(
                Cost._fields, real, cost(MODELS["small"](), (ranks,), (cut,), RULES[name]), strict=True
            )
        ]
        show("Counted in one step of a 12-layer model", rows, options)
        raise SystemExit(not all(row["as told"] for row in rows))
    mesh, cuts = (options.ranks,), (options.cut,)
    if options.copies > 1:
        mesh, cuts = (options.copies, options.ranks // options.copies), ("copies", options.cut)
    rows = [row(name, mesh, cuts, 2 if options.half else 4) for name in options.model]
    show(
        f"One step over {options.ranks} ranks",
        rows,
        options,
        "Gradients and parameters, which FSDP or DDP send, apart.",
    )


if __name__ == "__main__":
    main()
