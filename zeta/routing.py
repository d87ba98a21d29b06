"""Which parameter gets which treatment, and as which matrices: one rule from name and shape, for every backend.

Matrices go to Zeta; vectors, biases, norms, embeddings and the output head go to AdamW, as in the paper. (The published
code sends embeddings and head to Newton-Schulz too; the paper wins.)
"""

import re
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar

from rich.table import Table

Treatment = Literal["zeta", "adamw"]
Key = TypeVar("Key", bound=Hashable)
BATCH_ENTRIES = 4 << 20

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
STACK = re.compile(r"expert|switch_mlp|switch_glu|moe")
CONVOLUTION = re.compile(r"conv|patch_embed")
LEAF = re.compile(r"^(weight|bias|kernel|scale|gamma|beta|\d+)$")


class Route(NamedTuple):
    """What happens to one parameter. `matrices` is (count, rows, cols), its entries in order; () for AdamW."""

    treatment: Treatment
    matrices: tuple[int, ...]
    reason: str


@cache
def route(name: str, shape: tuple[int, ...]) -> Route:
    """The route of the parameter called `name` (its dotted path; "" if unknown) of this shape."""
    *path, leaf = name.split(".")
    modules = [*path, *([] if LEAF.match(leaf) else [leaf])]
    while modules and modules[-1].isdigit():
        modules.pop()
    owner = modules[-1] if modules else ""
    inside_layer = any(part.isdigit() for part in modules)

    def adamw(reason: str) -> Route:
        return Route("adamw", (), reason)

    if len(shape) < 2:
        return adamw("vector")
    if leaf.endswith("bias") and owner != "relative_attention_bias":
        return adamw("bias")
    if "norm" in owner or re.match(r"ln(_|\d|$)", owner):
        return adamw("norm")
    if EMBEDDING.search(owner) and len(shape) < 4:
        return adamw("embedding")
    if LM_HEAD.search(owner) or (HEAD.match(owner) and not inside_layer):
        return adamw("output head")
    if len(shape) == 2:
        return Route("zeta", (1, *shape), "matrix")
    if STACK.search(name) or (len(shape) == 3 and not CONVOLUTION.search(name)):
        return Route("zeta", (prod(shape[:-2]), *shape[-2:]), "stack of matrices")
    return Route("zeta", (1, shape[0], prod(shape[1:])), "convolution as (out, rest)")


def batches(routes: dict[Key, tuple[Route, Hashable]]) -> Iterator[dict[Key, tuple[int, ...]]]:
    """What one step takes together, as {key: (count, rows, cols)}: matrices of one shape and one kind (dtype, device).

    `routes` is {key: (route, kind)}. A batch holds at most an eighth of all entries (BATCH_ENTRIES if that is more):
    transient memory stays a small share of the model, and the number of batches does not grow with its layers.
    """
    cap = max(BATCH_ENTRIES, sum(prod(r.matrices) for r, _ in routes.values()) // 8)
    unfinished: dict[Hashable, dict[Key, tuple[int, ...]]] = {}
    for key, (r, kind) in routes.items():
        alike = (r.matrices[1:], kind)
        batch = unfinished.setdefault(alike, {})
        if batch and sum(map(prod, batch.values())) + prod(r.matrices) > cap:
            yield batch
            batch = unfinished[alike] = {}
        batch[key] = r.matrices
    yield from unfinished.values()


def report(parameters: Iterable[tuple[str, Any]]) -> Table:
    """A rich table of name, shape, treatment, matrices and reason: `rich.print(zeta.report(model.named_parameters()))`.

    `parameters` are (name, array) pairs; for MLX, `mlx.utils.tree_flatten(model.trainable_parameters())`.
    """
    table = Table("parameter", "shape", "treatment", "matrices", "reason")
    for name, array in parameters:
        treatment, matrices, reason = route(name, tuple(array.shape))
        table.add_row(name, "x".join(map(str, array.shape)), treatment, "x".join(map(str, matrices)), reason)
    return table
