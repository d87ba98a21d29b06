"""Which parameter gets which treatment, and as which matrices: one rule for every backend.

Matrices go to Zeta; vectors, biases, norms, embeddings and the output head go to AdamW, as in the paper. (The published
code sends embeddings and head to Newton-Schulz too; the paper wins.) A parameter's name and shape decide nearly all;
what they leave open, `zeta.routes` reads from the model.

A mixture's router (experts, width) is a matrix like others, as in the published codes of Zeta and of Moonlight, whose
Muon takes all of two axes but embedding and head; AdamW at two rates did not better (bench/README.md, "Routers").
"""

import re
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from math import prod

from zeta.routing.fused import Layer, fused
from zeta.routing.layout import Route, check_route

# Matched with the module that owns the parameter ("embed_tokens" of "model.embed_tokens.weight"), not the whole path:
# "patch_embeddings.projection" is a projection. Position tables and special tokens are embeddings.
EMBEDDING = re.compile(
    r"embed|(^|_)(emb|embd|wte|wpe|pos|position)(_|$)|(^|_)(cls|mask|register|dist|distillation)_tokens?$"
    r"|^shared$|^relative_attention_bias$"
)
# A head stands outside the numbered layers; "lm_head" is one wherever it stands.
HEAD = re.compile(
    r"^(head|heads|output|unembed|classifier|score|logits|proj_out|output_projection|qa_outputs|decoder)$"
)
LM_HEAD = re.compile(r"(^|_)lm_heads?$")
HEAD_END = re.compile(r"((^|[._])(head|classifier)\.(fc|out_proj|out)|^fc)$")  # of timm, RoBERTa, torchvision
STACK = re.compile(r"expert|switch_mlp|switch_glu|moe")
CONVOLUTION = re.compile(r"conv|patch_embed")
LENGTHS = re.compile(r"(^|\.)(parametrizations\.\w+\.original0|weight\w*_g)$")  # torch.nn.utils' two weight norms
LORA = re.compile(r"(^|\.)lora_[abAB](\.|$)")
LEAF = re.compile(r"^(weight|bias|kernel|scale|gamma|beta|\d+)$")
# What torch.compile, DDP, FSDP, activation checkpoints and PEFT add to a path.
WRAPPER = re.compile(
    r"(^module|\b_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.\w+)\."
)


@cache
def route(name: str, shape: tuple[int, ...], layer: Layer | None = None) -> Route:
    """The route of the parameter called `name` (its dotted path; "" if unknown) of this shape.

    `layer` is what its model says about it; None is `layer_of(name, shape)`.
    """
    layer = layer or layer_of(name, shape)
    if 0 in shape:
        return Route("adamw", (), "empty")
    if len(shape) < 2:
        return Route("adamw", (), "vector")
    if layer.kind in ("bias", "norm", "embedding", "quantisation scale"):
        return Route("adamw", (), layer.kind)
    if len(shape) > 2 and sum(n > 1 for n in shape) < 2:  # a layer scale as (channels, 1, 1)
        return Route("adamw", (), "vector")
    if layer.kind == "head":
        return Route("adamw", (), "output head", doubt=layer.doubt)
    if layer.kind == "entries":
        return Route("adamw", (), "entry by entry")
    if layer.kind.endswith("convolution"):
        return convolution(shape, layer)
    if layer.matrices and not layer.parts:
        reason = "stack of matrices" if layer.matrices[0] > 1 else "matrix"
        return Route("zeta", layer.matrices, reason, doubt=layer.doubt)
    if layer.kind == "lora":
        return Route("zeta", (prod(shape[:-2]), *shape[-2:]), "LoRA pair")
    reason = "matrix" if len(shape) == 2 else "stack of matrices"
    return fused(shape, layer) or Route("zeta", (prod(shape[:-2]), *shape[-2:]), reason, doubt=layer.doubt)


def convolution(shape: tuple[int, ...], layer: Layer) -> Route:
    """As a matrix (out, rest) a group; a transposed one as (in, rest), or (rest, in) where it is stored so."""
    if layer.groups == shape[0] > 1:
        return Route("adamw", (), "depthwise convolution: a vector a channel")
    if shape[0] == 1 and layer.kind == "convolution":
        return Route("adamw", (), "convolution to one channel: a vector")
    sides = "(out, rest)" if layer.kind == "convolution" else "(rest, in)" if layer.matrices else "(in, rest)"
    reason = f"{layer.kind} as {sides}" + (f" in {layer.groups} groups" if layer.groups > 1 else "")
    if layer.matrices:
        return Route("zeta", layer.matrices, reason, doubt=layer.doubt)
    count, doubt = layer.groups, layer.doubt
    if layer.parts and layer.groups == 1 and len(set(layer.parts)) == 1 == layer.repeats:
        count, reason = len(layer.parts), f"{len(layer.parts)} projections, each a {reason}"
    elif layer.parts:
        doubt = "holds several projections, which are taken as one"
    return Route("zeta", (count, shape[0] // count, prod(shape[1:])), reason, doubt=doubt)


@cache
def layer_of(name: str, shape: tuple[int, ...]) -> Layer:
    """What a parameter's name (and the number of its axes) says about its layer."""
    name = WRAPPER.sub("", name)
    *path, leaf = name.split(".")
    modules = [*path, *([] if LEAF.match(leaf) else [leaf])]
    numbered = modules and modules[-1].isdigit()
    while modules and modules[-1].isdigit():
        modules.pop()
    owner = modules[-1] if modules else ""
    inside_layer = any(part.isdigit() for part in modules)

    if LORA.search(name):
        return Layer("lora", owner)
    if leaf in ("scales", "biases"):  # of MLX's quantised layers: one of each for a group of weights
        return Layer("quantisation scale", owner)
    if leaf.endswith("bias") and owner != "relative_attention_bias":
        return Layer("bias", owner)
    if is_length(name, shape):
        return Layer("norm", owner)
    if "norm" in owner or re.match(r"ln(_|\d|$)", owner):
        return Layer("norm", owner)
    if EMBEDDING.search(owner) and owner != "unembed" and len(shape) < 4:
        return Layer("embedding", owner)
    if LM_HEAD.search(owner) or (not inside_layer and (HEAD.match(owner) or HEAD_END.search(".".join(modules)))):
        doubt = "is one of several layers of the head, of which only the last should go to AdamW"
        return Layer("head", owner, doubt=doubt if numbered else "")
    if len(shape) > 2 and not STACK.search(name) and (len(shape) > 3 or CONVOLUTION.search(name)):
        return Layer("convolution", owner)
    unknown = len(shape) == 3 and not STACK.search(name)
    return Layer("matrix", owner, doubt="is taken for a stack of matrices, but may be a convolution" if unknown else "")


def is_length(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array holds the lengths that a weight norm keeps of its matrix's rows."""
    return bool(LENGTHS.search(name)) and len(shape) == 2 and 1 in shape


def overruled(by_rule: Route, wish: str | Route, shape: tuple[int, ...]) -> Route:
    """The route that a user asks for: a treatment, or a whole route. Raises ValueError where the shape forbids it."""
    if isinstance(wish, Route):
        return check_route(wish, shape)
    if wish not in ("zeta", "adamw"):
        raise ValueError(f'treatment is {wish!r}, but must be "zeta", "adamw" or a zeta.Route')
    if wish == by_rule.treatment:
        return by_rule._replace(doubt="")
    if wish == "adamw":
        return Route("adamw", (), "by your choice")
    if len(shape) < 2:
        raise ValueError(f'treatment "zeta" needs matrices, but one of its parameters has shape {tuple(shape)}')
    return route("", tuple(shape), Layer("matrix" if len(shape) < 4 else "convolution"))


def warn_of_doubts(routes: Mapping[str, Route], remedy: str) -> None:
    """Names all parameters whose route is a guess, each once for all numbered layers."""
    doubts = {re.sub(r"\b\d+\b", "*", name): r.doubt for name, r in routes.items() if r.doubt}
    if doubts:
        lines = "; ".join(f"{name} {doubt}" for name, doubt in doubts.items())
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("zeta", "torch", "mlx"):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"{lines}: {remedy}", stacklevel=level)  # of the user's line
