"""The route of every parameter of a torch or MLX model, read from its modules.

Both libraries name their layers alike, so one rule serves both. Classes are recognised by their names and those of
their bases: no library is imported, and a model's own subclass of Linear is a Linear.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from zeta.routing.by_name import is_length, layer_of, overruled, route, warn_of_doubts
from zeta.routing.fused import FUSED, QKV, UNSURE, Layer
from zeta.routing.kinds import Model, Place, bases, kind_of, place
from zeta.routing.layout import Route
from zeta.routing.splits import attribute

Wish = str | Route | None
Overrides = Mapping[str, Wish] | Callable[[str, Any], Wish]

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
    known = Model(modules, {name: tuple(a.shape) for name, a in arrays.items()})
    layers = {name: _layer(name, tuple(a.shape), known, per_head) for name, a in arrays.items()}
    special: dict[int, Layer] = {}  # a table that is embedding and head at once is one parameter with two names
    for name, layer in layers.items():
        if layer.kind in ("embedding", "head"):
            special.setdefault(id(arrays[name]), layer)
    by_rule = {n: route(n, tuple(a.shape), special.get(id(a), layers[n])) for n, a in arrays.items()}
    chosen = _overrule(by_rule, arrays, overrides or {})
    warn_of_doubts(chosen, 'decide with overrides={"part of the name": "zeta", "adamw" or a zeta.Route}')
    return chosen


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


def _layer(name: str, shape: tuple[int, ...], model: Model, per_head: bool) -> Layer:
    """What the name says, corrected by what the modules around it say."""
    if is_length(name, shape):
        return layer_of(name, shape)
    at = place(name, model.modules)
    layer = kind_of(at, shape, model)
    owner, names = model.modules[at.path], bases(model.modules[at.path])
    heads, kv_heads = model.heads(at.path)
    gated = re.match(r"weight_[ih]h|W[xh]", at.leaf)
    layer = layer._replace(
        transposed=_transposed(owner, layer, shape, names),
        heads=heads,
        kv_heads=kv_heads,
        groups=next((GATES[base] for base in names & GATES.keys() if gated), layer.groups),
        per_head=per_head,
    )
    return _split(layer, at, shape, model) if layer.kind in ("matrix", "convolution") and len(shape) > 1 else layer


def _split(layer: Layer, at: Place, shape: tuple[int, ...], model: Model) -> Layer:
    """With the parts that the code of the module around the layer splits it into."""
    users = [*at.users(model)]
    if any(attribute(user, "is_concatenated") is False for user, _ in users):  # Transformers' experts say so themselves
        return layer._replace(alternating=True)
    rows, cols = (shape[-1], shape[-2]) if layer.transposed else (shape[-2], shape[-1])
    if layer.kind == "convolution":
        rows, cols = shape[0], prod(shape[1:])
    sizes = len(shape) - 2 if layer.kind == "convolution" else 0
    answers = at.splits(model, rows, cols, sizes)
    told = next((told for told in answers if told.parts), answers[0] if answers else None)
    wraps = any(QKV.match(child) for _, child in users) and not QKV.match(layer.name)
    if told and told.sure and (told.parts or not wraps):
        single = not told.parts and UNSURE.match(layer.name)
        return layer._replace(parts=(rows,) if single else told.parts, repeats=told.repeats)
    if told and (told.missed or wraps or FUSED.search(layer.name)):
        return layer._replace(doubt="is split by its module in a way that was not understood, and taken as one")
    return layer


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


def _overrule(by_rule: dict[str, Route], arrays: dict[str, Any], overrides: Overrides) -> dict[str, Route]:
    chosen = dict(by_rule)
    matched: set[str] = set()
    for name, array in arrays.items():
        if callable(overrides):
            wish = overrides(name, array)
        else:
            patterns = [pattern for pattern in overrides if re.search(pattern, name)]
            matched.update(patterns)
            wish = overrides[patterns[0]] if patterns else None
        if wish is not None:
            chosen[name] = overruled(by_rule[name], wish, tuple(array.shape))
    unused = [] if callable(overrides) else sorted(set(overrides) - matched)
    if unused:
        raise ValueError(f"no parameter's name contains {unused}: the model has {sorted(arrays)[:5]} and others")
    return chosen
