"""Which layers hold several matrices in one parameter, and how they lie in it."""

import re
from math import prod
from typing import NamedTuple

from zeta.routing.layout import Route, cut

QKV = re.compile(r"^(qkv(_proj|_linear)?|to_qkv|[Ww]qkv|W_pack|c_attn|in_proj_weight|query_key_value)$")
GATE_UP = re.compile(r"^(gate_up_proj|gate_and_up_proj|up_gate_proj|gate_up|Wi|w12|w13|weights_in)$")
FUSED = re.compile(r"q_?k_?v|(^|_)kv(_|$)|gate_(and_)?up|up_gate|^in_proj|^W[i1]$|keys_values")  # in any way
SEPARATE = re.compile(r"^(q|k|v|query|key|value)(_proj)?$")
# Several projections in one, differently in every model: state-space layers, latent attention, keys with values.
UNSURE = re.compile(r"^(in_proj|in_proj_(qkv\w*|ba)|kv_b_proj|kv_a_proj_with_mqa|to_kv|kv_proj|kv)$")


class Layer(NamedTuple):
    """What is known about the layer of a parameter, from its name or from the model."""

    # "embedding", "head", "norm", "bias", "convolution", "transposed convolution", "lora", "quantisation scale",
    # "entries" (no matrix, for another reason); "matrix" for all else
    kind: str
    name: str = ""  # its own name, not its path: "c_attn"
    transposed: bool | None = None  # the weight is (..., in, out); None if unknown
    heads: int = 0  # of the attention that it belongs to; 0 if unknown
    kv_heads: int = 0
    alternating: bool | None = None  # the fused matrices take turns along their axis; None if unknown
    groups: int = 1  # of a convolution; the gates of a recurrent layer
    per_head: bool = False  # cut query, key and value into one matrix a head
    matrices: tuple[int, ...] = ()  # (count, rows, cols), where the shape alone would be read as others
    parts: tuple[int, ...] = ()  # rows of its matrices as the module's code splits them; () if it shows nothing
    repeats: int = 1  # how often they alternate
    doubt: str = ""


def fused(shape: tuple[int, ...], layer: Layer) -> Route | None:
    """The route of a parameter (..., out, in), or (..., in, out), that holds several matrices; None if it holds one."""
    if layer.doubt:
        return _whole(shape, layer.doubt)
    if len(layer.parts) == 1:
        return None
    if layer.parts and not (layer.per_head and QKV.match(layer.name)):
        return _as_split(shape, layer)
    if QKV.match(layer.name):
        return _qkv(shape, layer)
    if GATE_UP.match(layer.name):
        return _gate_up(shape, layer)
    if layer.groups > 1 and shape[-2] % layer.groups == 0:
        return cut(shape, (shape[-2] // layer.groups,) * layer.groups, "gates of a recurrent layer")
    heads = layer.kv_heads if layer.name[:1] in "kv" else layer.heads
    axis = -1 if layer.transposed else -2
    if layer.per_head and SEPARATE.match(layer.name) and heads and shape[axis] % heads == 0:
        return cut(shape, (shape[axis] // heads,) * heads, "heads", axis)
    return _whole(shape, "may hold several projections, which are taken as one") if UNSURE.match(layer.name) else None


def _as_split(shape: tuple[int, ...], layer: Layer) -> Route:
    """As the module's own code splits it."""
    names = f"{len(layer.parts)} projections"
    if QKV.match(layer.name) and len(layer.parts) == 3:
        names = "query, key, value"
    if GATE_UP.match(layer.name) and len(layer.parts) == 2:
        names = "gate, up"
    turns = "" if layer.repeats == 1 else " alternating" if names == "gate, up" else " alternating by heads"
    return cut(shape, layer.parts, names + turns, -1 if layer.transposed else -2, layer.repeats)


def _qkv(shape: tuple[int, ...], layer: Layer) -> Route:
    stored_as_in_out = layer.transposed or (layer.transposed is None and shape[-1] == 3 * shape[-2])
    axis = -1 if stored_as_in_out else -2
    out, heads, kv = shape[axis], layer.heads, layer.kv_heads or layer.heads
    if layer.alternating is None and layer.name == "query_key_value":
        return _whole(shape, "fuses query, key and value in an order that differs between models")
    if not heads and out == 3 * shape[-3 - axis] and not layer.alternating:
        return cut(shape, (out // 3,) * 3, "query, key, value", axis)
    if heads == kv and heads and out == 2 * shape[-3 - axis]:
        return cut(shape, (out // 2,) * 2, "key, value", axis)
    if not heads or out % (heads + 2 * kv) or heads % kv:
        return _whole(shape, "fuses query, key and value, but its numbers of heads could not be found")
    size = out // (heads + 2 * kv)
    if layer.per_head:
        return cut(shape, (size,) * (heads + 2 * kv), "query, key, value by heads", axis)
    if layer.alternating:
        return cut(shape, (heads // kv * size, size, size), "query, key, value alternating by heads", axis, kv)
    return cut(shape, (heads * size, kv * size, kv * size), "query, key, value", axis)


def _gate_up(shape: tuple[int, ...], layer: Layer) -> Route:
    if layer.transposed is None and len(shape) > 2:
        return _whole(shape, "fuses gate and up in a stack of experts, but along which axis could not be found")
    axis = -1 if layer.transposed else -2
    half = shape[axis] // 2
    if shape[axis] % 2:
        return _whole(shape, f"should fuse gate and up, but {shape[axis]} is odd")
    if layer.alternating:
        return cut(shape, (1, 1), "gate, up alternating", axis, half)
    return cut(shape, (half, half), "gate, up", axis)


def _whole(shape: tuple[int, ...], doubt: str) -> Route:
    return Route("zeta", (prod(shape[:-2]), *shape[-2:]), "matrix as a whole", doubt=doubt)
