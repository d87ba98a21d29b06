"""The route of every parameter of a torch or MLX model, read from its modules.

Both libraries name their layers alike, so one rule serves both. Classes are recognised by their names and those of
their bases: no library is imported, and a model's own subclass of Linear is a Linear.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zeta.routing.by_name import layer_of, overruled, route, warn_of_doubts
from zeta.routing.fused import Layer
from zeta.routing.layout import Route

Wish = str | Route | None
Overrides = Mapping[str, Wish] | Callable[[str, Any], Wish]

# The fused query, key and value of these take turns by heads; of those they stand one after the other. Read in the
# models' code: transformers 5.23, mlx-lm 0.32.
ALTERNATING = re.compile(r"gpt_neox|bloom|persimmon|falcon|gpt_bigcode|phi3small|\.minimax\.|codegen")
CONTIGUOUS = re.compile(r"bailing|chatglm")
UNKNOWN_HEADS = re.compile(r"codegen")  # cut for four devices, whatever its heads
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "kv_n_heads", "n_kv_head")
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


def routes(model: Any, overrides: Overrides | None = None, *, per_head: bool = False) -> dict[str, Route]:
    """The route of every floating-point parameter of a torch or MLX model, by its dotted path.

    `overrides` is {pattern: wish}, the pattern searched for in the path, or a function of (name, array). A wish is
    "zeta", "adamw", a `zeta.Route`, or None for the rule's own choice. `per_head` makes every head of query, key and
    value a matrix of its own. What the model leaves open is named in a warning. Raises ValueError for a wish that does
    not fit, a pattern that nothing matches, and a model that MLX has sharded already.
    """
    arrays, modules = read(model)
    shards = [name for name, module in modules.items() if type(module).__name__ == "FullyShardedModule"]  # of MLX
    if shards:
        where = shards[-1] or "the model"
        raise ValueError(f"{where} is sharded, so its shapes are one rank's: read the routes before nn.fully_shard")
    layers = {name: _layer(name, tuple(a.shape), modules, per_head) for name, a in arrays.items()}
    special: dict[int, Layer] = {}  # a table that is embedding and head at once is one parameter with two names
    for name, layer in layers.items():
        if layer.kind in ("embedding", "head"):
            special.setdefault(id(arrays[name]), layer)
    by_rule = {n: route(n, tuple(a.shape), special.get(id(a), layers[n])) for n, a in arrays.items()}
    found = _overrule(by_rule, arrays, overrides or {})
    warn_of_doubts(found, 'decide with overrides={"part of the name": "zeta", "adamw" or a zeta.Route}')
    return found


def read(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its floating-point arrays and its modules, by path; what is shared stands under each of its names."""
    if hasattr(model, "named_parameters"):
        arrays = dict(model.named_parameters(remove_duplicate=False))
        modules = dict(model.named_modules(remove_duplicate=False))
    else:
        arrays, modules = dict(_flatten(model.parameters())), dict(model.named_modules())
    return {name: a for name, a in arrays.items() if "float" in str(a.dtype)}, modules


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict | list | tuple):
        yield prefix[:-1], tree
        return
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flatten(value, f"{prefix}{name}.")


def _layer(name: str, shape: tuple[int, ...], modules: dict[str, Any], per_head: bool) -> Layer:
    """What the name tells, corrected by what the modules around it tell."""
    layer = layer_of(name, shape)
    path = name.rpartition(".")[0]
    while path not in modules:  # an array in one of MLX's lists
        path = path.rpartition(".")[0]
    owner, bases = modules[path], {base.__name__ for base in type(modules[path]).__mro__}
    heads, kv_heads, order = _attention(path, modules)
    kind = _kind(layer, path, modules, bases)
    gates = next((GATES[base] for base in bases & GATES.keys() if re.match(r".*\.?(weight_[ih]h|W[xh])", name)), 1)
    return layer._replace(
        kind=kind,
        transposed=_transposed(owner, layer, shape, bases),
        heads=heads,
        kv_heads=kv_heads,
        alternating=True if getattr(owner, "is_concatenated", True) is False else order,
        groups=owner.groups if kind == "convolution" and hasattr(owner, "groups") else gates,
        per_head=per_head,
        doubt="",
    )


def _kind(layer: Layer, path: str, modules: dict[str, Any], bases: set[str]) -> str:
    linear = any(base.endswith("Linear") for base in bases) or "Conv1D" in bases
    if layer.kind in ("lora", "bias", "quantisation scale"):
        return layer.kind
    if bases & {"Embedding", "EmbeddingBag", "QuantizedEmbedding"}:
        return "embedding"
    if modules[path] is _output(modules[""]) or (linear and layer.kind == "head" and _is_last(path, modules)):
        return "head"
    if any("Norm" in base for base in bases):
        return "norm"
    if any(re.match(r"Conv(Transpose)?[123]d$", base) for base in bases):
        return "convolution"
    return "matrix" if linear else layer.kind


def _output(model: Any) -> Any:
    """The module that a model itself calls its head: Transformers' language models and timm's classifiers do."""
    for name in ("get_output_embeddings", "get_classifier"):
        head = getattr(model, name, None)
        if callable(head) and head() is not None:
            return head()
    return ()  # no module is this


def _is_last(path: str, modules: dict[str, Any]) -> bool:
    """Whether a layer called "classifier.6" is the last of the head's numbered ones; True without a number."""
    stem = re.sub(r"\.\d+$", "", path)
    numbered = [
        p
        for p, module in modules.items()
        if re.fullmatch(re.escape(stem) + r"\.\d+", p) and type(module).__name__.endswith("Linear")
    ]
    return stem == path or numbered[-1] == path


def _transposed(owner: Any, layer: Layer, shape: tuple[int, ...], bases: set[str]) -> bool | None:
    if "Conv1D" in bases:  # Transformers' own, of GPT-2: a Linear that stores (in, out)
        return True
    if isinstance(getattr(owner, "is_transposed", None), bool):  # Transformers' experts say so themselves
        return bool(owner.is_transposed)
    down: Any = getattr(owner, "down_proj", None)
    if len(shape) == 3 and len(getattr(down, "shape", ())) == 3:
        straight, crossed = (2 * down.shape[2], down.shape[1]), (down.shape[2], 2 * down.shape[1])
        fits = [shape[1:] == straight, shape[1:] == crossed]
        return None if fits[0] == fits[1] else fits[1]
    return None if len(shape) > 2 and not any(base.endswith("Linear") for base in bases) else False


def _attention(path: str, modules: dict[str, Any]) -> tuple[int, int, bool | None]:
    """Heads and key-value heads of the nearest module around `path` that has any, and whether q, k, v take turns."""
    ends = [i for i in range(len(path), 0, -1) if path[i : i + 1] in ("", ".")]
    for module in [modules[path[:i]] for i in [*ends, 0] if path[:i] in modules]:  # MLX's lists are no modules
        holders = [module, getattr(module, "config", None), getattr(module, "args", None)]
        heads = _number(holders, HEADS)
        if heads:
            source = f"{type(module).__module__}.{type(module).__name__}".lower()
            known = True if ALTERNATING.search(source) else False if CONTIGUOUS.search(source) else None
            return (0, 0, True) if UNKNOWN_HEADS.search(source) else (heads, _number(holders, KV_HEADS) or heads, known)
    return 0, 0, None


def _number(holders: list[Any], names: tuple[str, ...]) -> int:
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((n for n in found if type(n) is int and n > 0), 0)


def _overrule(by_rule: dict[str, Route], arrays: dict[str, Any], overrides: Overrides) -> dict[str, Route]:
    found = dict(by_rule)
    matched: set[str] = set()
    for name, array in arrays.items():
        if callable(overrides):
            wish = overrides(name, array)
        else:
            patterns = [pattern for pattern in overrides if re.search(pattern, name)]
            matched.update(patterns)
            wish = overrides[patterns[0]] if patterns else None
        if wish is not None:
            found[name] = overruled(by_rule[name], wish, tuple(array.shape))
    unused = [] if callable(overrides) else sorted(set(overrides) - matched)
    if unused:
        raise ValueError(f"no parameter's name contains {unused}: the model has {sorted(arrays)[:5]} and others")
    return found
