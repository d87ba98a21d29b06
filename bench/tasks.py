"""The tasks of `convergence.py`, but for one small enough for a core: a model, its batches, the losses held out."""

import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose files import one another by name

from trainer import text
from trainer.on_torch import FUSED, Layer, Net
from vit import ViT, digits

from zeta.bench import model

EXPERTS, CHOSEN = 4, 2
BUDGET = 10  # bytes a parameter


class Task(NamedTuple):
    model: Callable[..., nn.Module]  # of a seed and, if it is not the CPU, a device; model(*batch) is the loss ()
    batch: Callable[[int, int], tuple[Tensor, ...]]  # of a step and a seed
    search: list[tuple[Tensor, ...]]  # batches of one size, held out, that the search looks at
    claims: list[tuple[Tensor, ...]] = []  # noqa: RUF012 (of a tuple; batches held out that it never sees)
    tokens: int = 0  # a batch
    data: str = ""  # a checksum


class Size(NamedTuple):
    """A language model and the text it sees: `windows` of each split are held out."""

    layers: int
    width: int
    rows: int
    context: int
    windows: int
    dtype: torch.dtype = torch.float32  # of the model's products
    packages: tuple[str, ...] = ()  # whose sources are the text; none: Python's standard library

    @property
    def config(self) -> model.Config:
        return model.Config(256, self.context, self.layers, self.width, heads=4, kv_heads=2)

    @property
    def steps(self) -> int:
        """BUDGET bytes for every parameter."""
        parameters = sum(prod(shape) for shape in model.shapes(self.config).values())
        return ceil(BUDGET * parameters / (self.rows * self.context))


SHORT = Size(layers=4, width=128, rows=4, context=96, windows=64)
# For a GPU: of constraints.txt's versions, alike on every machine, which the numerical libraries' sources are not.
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "jax", "lightning", "matplotlib", "peft", "sklearn", "sympy")
PACKAGES += ("transformers", "trl")
FOR_GPU = {"lm_10m": Size(4, 448, 128, 256, 2048, torch.bfloat16, PACKAGES)}
SIZES = {f"lm_{name}": Size(3, width, 16, 128, 512) for name, width in (("100k", 48), ("300k", 88), ("600k", 120))}


def lm(size: Size = SHORT, experts: bool = False) -> Task:
    """examples/train_lm.py's model on Python sources; one half of the held-out files is for claims alone.

    In half precision layers are compiled: one text for all of them, and for all runs of a process.
    """
    config, length = size.config, size.context + 1
    train, validation = (np.frombuffer(part, np.uint8) for part in sources(size.packages))
    rope = tuple(torch.tensor(a, dtype=size.dtype) for a in model.rotations(config))
    ops = FUSED._replace(block=mixture if experts else lambda layer, *rest: layer(*rest))
    if size.dtype != torch.float32:
        compiled = torch.compile(model.block, dynamic=False)
        ops = FUSED._replace(block=lambda layer, x, rope, config, _: compiled(layer.tree(), x, rope, config, FUSED))

    def start(seed: int, device: str = "cpu") -> nn.Module:
        weights = model.init(config, seed)
        weights = with_experts(weights, config, seed) if experts else weights
        arrays = {name: torch.from_numpy(w).to(device) for name, w in weights.items()}
        return Net(arrays, size.dtype, rope=tuple(a.to(device) for a in rope), config=config, ops=ops)

    def batch(step: int, seed: int) -> tuple[Tensor, ...]:
        return (torch.from_numpy(text.batch(train, step, size.rows, length, seed)),)

    def looks(part: np.ndarray) -> list[tuple[Tensor, ...]]:
        rows = torch.from_numpy(text.windows(part, size.windows, length))
        return [(some,) for some in rows.split(max(16, size.rows))]

    tokens, data = size.rows * size.context, f"{crc32(validation, crc32(train)):08x}"
    if size.windows == SHORT.windows:  # too few to share
        return Task(start, batch, looks(validation), [], tokens, data)
    search, claims = np.array_split(validation, 2)
    return Task(start, batch, looks(search), looks(claims), tokens, data)


def sources(packages: tuple[str, ...]) -> text.Text:
    """The text of these installed packages, or of Python's standard library."""
    if not packages:
        return text.load()
    folder = Path(sysconfig.get_path("purelib"))
    if missing := [name for name in packages if not (folder / name).is_dir()]:
        raise SystemExit(f"{', '.join(missing)} not in {folder}, whose sources are this task's text: make test")
    files = {name: text.read(folder / name, "*.py") for name in packages}
    return text.split({f"{name}/{file}": code for name, own in files.items() for file, code in own.items()})


def moe() -> Task:
    """SHORT in two layers, with four experts of a third of the MLP's width in its place; each byte takes two."""
    return lm(SHORT._replace(layers=2), experts=True)


def with_experts(weights: dict[str, np.ndarray], config: model.Config, seed: int) -> dict[str, np.ndarray]:
    """The weights with each layer's MLP replaced by a router (experts, width) and three stacks of experts."""
    rng, w = np.random.default_rng([seed, EXPERTS]), config.width
    weights = {name: array for name, array in weights.items() if ".mlp." not in name}
    for i in range(config.layers):
        for name, gain in (("gate_proj", 1.0), ("up_proj", 1.0), ("down_proj", 1 / sqrt(2 * config.layers))):
            stack = 0.5 * gain / sqrt(w) * rng.standard_normal((EXPERTS, w, w))
            weights[f"model.layers.{i}.mlp.experts.{name}.weight"] = stack.astype(np.float32)
        router = 0.5 / sqrt(w) * rng.standard_normal((EXPERTS, w))
        weights[f"model.layers.{i}.mlp.router.weight"] = router.astype(np.float32)
    return weights


def mixture(layer: Layer, x: Tensor, rope: Any, config: model.Config, ops: model.Operations) -> Tensor:
    """x (b, t, width) after attention and the experts. All compute everything; those not chosen count nothing."""
    p = layer.tree()
    none = {"weight": x.new_zeros(0, config.width)}
    no_mlp = {"gate_proj": none, "up_proj": none, "down_proj": {"weight": none["weight"].mT}}
    x = model.block(p | {"mlp": no_mlp}, x, rope, config, ops)

    h, mlp = ops.rms_norm(x, p["post_attention_layernorm"]["weight"]).flatten(0, 1), p["mlp"]
    share, chosen = (h @ mlp["router"]["weight"].mT).softmax(-1).topk(CHOSEN)
    share = h.new_zeros(len(h), EXPERTS).scatter(1, chosen, share / share.sum(-1, keepdim=True))
    gate, up, down = (mlp["experts"][name]["weight"].mT for name in ("gate_proj", "up_proj", "down_proj"))
    y = share.mT[..., None] * ((F.silu(h @ gate) * (h @ up)) @ down)
    return x + y.sum(0).view_as(x)


class Classifier(nn.Module):
    """The vision transformer with its loss: (images (b, 8, 8), digits (b,)) -> ()."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViT()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.vit(images), labels)


def vit() -> Task:
    """A vision transformer on scikit-learn's digits, each image moved by up to a pixel when it is trained on."""
    (images, labels), held_out = digits()
    moved = F.pad(images, (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)

    def start(seed: int, device: str = "cpu") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Classifier().to(device)

    def batch(step: int, seed: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng([seed, step])
        chosen, down, right = (torch.from_numpy(rng.integers(0, n, 64)) for n in (len(labels), 3, 3))
        return moved[chosen, down, right], labels[chosen]

    return Task(start, batch, [held_out], tokens=64)


# name -> (task, steps)
TASKS: dict[str, tuple[Callable[[], Task], int]] = {
    name: (partial(lm, size), size.steps) for name, size in (SIZES | FOR_GPU).items()
}
TASKS |= {"lm": (lm, 300), "vit": (vit, 250), "moe": (moe, 300)}
