"""The tables of `zeta bench`, as rows {column: value}, of either library's side."""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import numpy as np

from zeta.bench import model
from zeta.bench.measure import Contenders, Row, medians
from zeta.core import Array
from zeta.core import newton_schulz as plain

Side = Any  # Torch or Mlx, of on_torch.py and on_mlx.py
Iterations = dict[str, Callable[[Array], Array]]  # Newton-Schulz of one matrix, by name
Matrices = tuple[int, int, int]  # (count, rows, cols)


class Sizes(NamedTuple):
    """What is measured on a device of one kind, where all of it should take about a minute."""

    matrices: Sequence[Matrices]
    gpt: tuple[int, int, int]  # layers, width, vocabulary
    lm: model.Config
    batch: int  # windows of the language model's context


SIZES = {
    "cpu": Sizes(
        matrices=[(16, 256, 256), (2, 1024, 1024), (4, 512, 2048), (1, 1024, 4096)],
        gpt=(4, 512, 8192),
        lm=model.Config(vocab=2048, context=256, layers=4, width=256, heads=4, kv_heads=2),
        batch=8,
    ),
    "gpu": Sizes(
        matrices=[(24, 512, 512), (8, 1024, 1024), (4, 1024, 4096), (2, 2048, 2048)],
        gpt=(8, 768, 8192),
        lm=model.Config(vocab=8192, context=1024, layers=8, width=768, heads=12, kv_heads=4),
        batch=8,
    ),
    "mlx cpu": Sizes(  # a hundredth of the operations a second of torch's
        matrices=[(8, 128, 512), (4, 256, 256), (2, 256, 1024)],
        gpt=(4, 128, 1024),
        lm=model.Config(vocab=512, context=64, layers=2, width=128, heads=4, kv_heads=2),
        batch=8,
    ),
}
SIZES["torch cuda"] = SIZES["gpu"]._replace(
    gpt=(12, 768, 50304),
    lm=model.Config(vocab=50304, context=1024, layers=12, width=768, heads=12, kv_heads=4, tied=True),
    batch=16,
)


def sizes(side: Side) -> Sizes:
    name = f"{side.library} {side.kind}"
    return SIZES[name] if name in SIZES else SIZES["cpu" if side.kind == "cpu" else "gpu"]


def newton_schulz(side: Side, shape: Matrices, peers: Iterations, rounds: int, seconds: float = inf) -> Row:
    """A stack of this shape at once, beside these peers matrix by matrix. Errors are of its first matrix, ours and the
    first peer's."""
    x = np.random.default_rng(0).standard_normal(shape)
    stack, first, oracle = side.array(x), side.array(x[0]), polynomial(x[0])

    def one_by_one(peer: Callable[[Array], Array]) -> Any:
        return side.wait([peer(matrix) for matrix in stack])

    ours: Contenders = {"zeta": lambda: side.wait(side.newton_schulz(stack))}
    times = medians(ours | {name: partial(one_by_one, peer) for name, peer in peers.items()}, rounds, seconds)
    row: Row = {"shape": "x".join(map(str, shape)), "zeta ms": 1e3 * times["zeta"]}
    for name in peers:
        row |= {f"{name} ms": 1e3 * times[name], f"x {name}": times[name] / times["zeta"]}
    row["error"] = error(side.numpy(side.newton_schulz(stack))[0], oracle)
    name, peer = next(iter(peers.items()))
    row[f"{name}'s error"] = error(side.numpy(peer(first)), oracle)
    return row | {"transient MiB": mebibytes(side.peak(ours["zeta"]))}


def step(side: Side, contenders: Contenders, rounds: int, seconds: float = inf) -> list[Row]:
    """A step of each, beside the first's, with what it holds for that long."""
    times = medians(contenders, rounds, seconds)
    first = next(iter(times))
    return [
        {
            "optimizer": name,
            "ms": 1e3 * times[name],
            f"x {first}": times[name] / times[first],
            "transient MiB": mebibytes(side.peak(run)),
        }
        for name, run in contenders.items()
    ]


def training_step(
    side: Side, config: model.Config, batch: int, names: Sequence[str], rounds: int, seconds: float = inf
) -> list[Row]:
    """What share of a language model's training step is each optimizer's; a batch has so many windows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab, size=(batch, config.context + 1), dtype=np.int32)
    gradients = "forward and backward"
    contenders: Contenders = {gradients: side.gradients(config, tokens)}
    times = medians(contenders | {name: side.step(name, model.shapes(config)) for name in names}, rounds, seconds)
    return [
        {
            "optimizer": name,
            f"{gradients} ms": 1e3 * times[gradients],
            "step ms": 1e3 * times[name],
            "share": times[name] / (times[gradients] + times[name]),
        }
        for name in names
    ]


def symmetric_products(side: Side, rounds: int, seconds: float = inf) -> list[Row]:
    """The Triton kernel beside cuBLAS, on batches as a step has them; empty for a device that has none."""
    rows: list[Row] = []
    for n, contenders in side.symmetric_products():
        times = medians(contenders, rounds, seconds)
        ratio = times["cuBLAS"] / times["Triton"]
        rows.append({"rows": n, **{f"{name} ms": 1e3 * took for name, took in times.items()}, "x cuBLAS": ratio})
    return rows


def gate(rows: Sequence[Row]) -> float:
    """From how many rows on the kernel is faster at every size that was measured; inf where it is not at the last."""
    slower = [i for i, row in enumerate(rows) if row["x cuBLAS"] <= 1]
    first = slower[-1] + 1 if slower else 0
    return int(rows[first]["rows"]) if first < len(rows) else inf


def gpt(layers: int, width: int, vocab: int) -> model.Shapes:
    """Names and shapes of a GPT's parameters."""
    result: model.Shapes = {"embed.weight": (vocab, width), "lm_head.weight": (vocab, width)} if vocab else {}
    for i in range(layers):
        result |= {f"layers.{i}.attn.qkv.weight": (3 * width, width), f"layers.{i}.attn.proj.weight": (width, width)}
        result |= {f"layers.{i}.mlp.up.weight": (4 * width, width), f"layers.{i}.mlp.down.weight": (width, 4 * width)}
        result |= {f"layers.{i}.norm1.weight": (width,), f"layers.{i}.norm2.weight": (width,)}
    return result


def polynomial(x: Array) -> Array:
    """What five `jordan` steps must make of a matrix (rows, cols), as it is in float32."""
    return plain(x.astype(np.float32).astype(np.float64))


def error(got: Array, oracle: Array) -> float:
    return float(np.linalg.norm(got - oracle) / np.linalg.norm(oracle))


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
