"""A small Qwen3-like language model: pure functions on the arrays of any library, over a nested dict of parameters.

Names and shapes are those of Qwen3 in transformers and mlx-lm: weights are (out, in), and `flatten` gives the familiar
dotted names, from which `zeta.route` decides. Attention, RMSNorm and cross-entropy are plain here and reach the model
as an argument, so that a library's fused form can take their place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

Array = Any
Params = dict[str, Any]  # nested; the leaves are arrays
Shapes = dict[str, tuple[int, ...]]  # by dotted name
EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """The model's shape. Raises ValueError where sizes do not divide."""

    vocab: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "width", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads of an even size: "
                f"choose a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly: choose a divisor")

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class Operations(NamedTuple):
    """The operations that libraries have forms of their own of."""

    rms_norm: Callable[[Array, Array], Array]  # x (..., size), weight (size,) -> (..., size)
    attention: Callable[[Array, Array, Array], Array]  # q (b, heads, t, size), k and v (b, kv_heads, t, size) -> like q
    cross_entropy: Callable[[Array, Array], Array]  # logits (n, vocab), targets (n,) -> () mean, in nats
    block: Callable[..., Array] | None = None  # in place of `block`, for layers that are more than their parameters


def logits(params: Params, tokens: Array, rope: tuple[Array, Array], config: Config, ops: Operations) -> Array:
    """(b, t, vocab) scores of the next token; tokens (b, t), rope from `rotations`, t = config.context."""
    xp = array_namespace(tokens)
    model = params["model"]
    table = model["embed_tokens"]["weight"]
    x = xp.reshape(xp.take(table, xp.reshape(tokens, (-1,)), axis=0), (*tokens.shape, config.width))
    for i in range(config.layers):
        x = (ops.block or block)(model["layers"][str(i)], x, rope, config, ops)
    x = ops.rms_norm(x, model["norm"]["weight"])
    return x @ (table if config.tied else params["lm_head"]["weight"]).mT


def block(p: Params, x: Array, rope: tuple[Array, Array], config: Config, ops: Operations) -> Array:
    """x (b, t, width) after attention and the gated MLP, each added to the stream."""
    xp = array_namespace(x)
    attn, mlp, (b, t, _) = p["self_attn"], p["mlp"], x.shape

    def heads(name: str, x: Array) -> Array:  # (b, t, width) -> (b, heads, t, head_size)
        y = x @ attn[f"{name}_proj"]["weight"].mT
        return xp.permute_dims(xp.reshape(y, (b, t, -1, config.head_size)), (0, 2, 1, 3))

    h = ops.rms_norm(x, p["input_layernorm"]["weight"])
    q = rotate(ops.rms_norm(heads("q", h), attn["q_norm"]["weight"]), rope)
    k = rotate(ops.rms_norm(heads("k", h), attn["k_norm"]["weight"]), rope)
    y = xp.permute_dims(ops.attention(q, k, heads("v", h)), (0, 2, 1, 3))
    x = x + xp.reshape(y, (b, t, config.width)) @ attn["o_proj"]["weight"].mT

    h = ops.rms_norm(x, p["post_attention_layernorm"]["weight"])
    g = h @ mlp["gate_proj"]["weight"].mT
    silu = g / (1 + xp.exp(-g))
    return x + (silu * (h @ mlp["up_proj"]["weight"].mT)) @ mlp["down_proj"]["weight"].mT


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """x (b, heads, t, size) with each pair (i, i + size/2) turned by its position's angle."""
    xp = array_namespace(x)
    cos, sin = rope
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x: Array, weight: Array) -> Array:
    """x (..., size) with mean square one, times weight."""
    xp = array_namespace(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal; q (b, heads, t, size), k and v (b, kv_heads, t, size): neighbouring heads share a k and a v."""
    xp = array_namespace(q)
    b, heads, t, size = q.shape
    q = xp.reshape(q, (b, k.shape[1], heads // k.shape[1], t, size))
    s = q @ k[:, :, None].mT / sqrt(size)
    s = xp.where(xp.tril(xp.ones_like(s)) > 0, s, -xp.inf)
    w = xp.exp(s - xp.max(s, axis=-1, keepdims=True))
    w = w / xp.sum(w, axis=-1, keepdims=True)
    return xp.reshape(w @ v[:, :, None], (b, heads, t, size))


def cross_entropy(scores: Array, targets: Array) -> Array:
    """The mean of -log softmax(scores (n, vocab))[targets (n,)], in nats."""
    xp = array_namespace(scores)
    s = scores - xp.max(scores, axis=-1, keepdims=True)
    picked = xp.take_along_axis(s, xp.astype(targets, xp.int64)[:, None], axis=-1)[:, 0]  # torch takes no other type
    return xp.mean(xp.log(xp.sum(xp.exp(s), axis=-1)) - picked)


PLAIN = Operations(rms_norm, attention, cross_entropy)


def loss(params: Params, tokens: Array, rope: tuple[Array, Array], config: Config, ops: Operations = PLAIN) -> Array:
    """() mean loss in nats per token; tokens (b, context + 1)."""
    xp = array_namespace(tokens)
    scores = logits(params, tokens[:, :-1], rope, config, ops)
    return ops.cross_entropy(xp.reshape(scores, (-1, config.vocab)), xp.reshape(tokens[:, 1:], (-1,)))


def rotations(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (context, head_size / 2) of RoPE's angles (arXiv 2104.09864), NumPy float64."""
    half = config.head_size // 2
    angles = np.outer(np.arange(config.context), 10000.0 ** (-np.arange(half) / half))
    return np.cos(angles), np.sin(angles)


def shapes(config: Config) -> Shapes:
    """Name -> shape of every parameter; weights are (out, in)."""
    w, hidden, kv = config.width, 3 * config.width, config.kv_heads * config.head_size
    projections = {"q": (w, w), "k": (kv, w), "v": (kv, w), "o": (w, w)}
    layer: Shapes = {f"self_attn.{name}_proj": shape for name, shape in projections.items()}
    layer |= {"mlp.gate_proj": (hidden, w), "mlp.up_proj": (hidden, w), "mlp.down_proj": (w, hidden)}
    layer |= {f"self_attn.{name}_norm": (config.head_size,) for name in "qk"}
    layer |= {f"{name}_layernorm": (w,) for name in ("input", "post_attention")}
    names = {"model.embed_tokens": (config.vocab, w), "model.norm": (w,)}
    names |= {f"model.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}
    if not config.tied:
        names["lm_head"] = (config.vocab, w)
    return {f"{name}.weight": shape for name, shape in names.items()}


def init(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Name -> array, NumPy float32: the point that every backend starts from."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        deviation = 0.02 if name.startswith(("model.embed", "lm_head")) else 0.5 / sqrt(shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what each block adds to the stream starts small
            deviation /= sqrt(2 * config.layers)
        return (deviation * rng.standard_normal(shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes(config).items()}


def nest(flat: dict[str, Array]) -> Params:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree: Params = {}
    for name, array in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, Array]:
    """{"a": {"b": x}} as {"a.b": x}."""
    flat: dict[str, Array] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
