"""What kind of layer an array belongs to: by the class of the module that owns it, by shape, and by the module's code.

Classes are recognised by their names and those of their bases: no library is imported, and a model's own subclass of
Linear is a Linear.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from zeta.routing.by_name import LM_HEAD, WRAPPER, layer_of
from zeta.routing.fused import Layer
from zeta.routing.source import LIBRARIES, Use, class_of, is_never_called, keywords, use
from zeta.routing.splits import SINGLE, Split, attribute, is_torch, split

PARAMETRIZED = re.compile(r"\.?parametrizations\.(\w+)\.original\d?$")
CONTAINERS = {"ParameterList", "ParameterDict"}
LISTS = {"ModuleList", "list"}
CONVOLUTION = re.compile(r"Conv(Transpose)?[123]d$")
IN_FIRST = re.compile(r"ConvTranspose[123]d$")  # of torch
EMBEDDINGS = {"Embedding", "EmbeddingBag", "QuantizedEmbedding"}
OUTPUTS = re.compile(r"(^|_)(vocab_size|num_vocab|num_labels|num_classes)(_|$)")
# Modules that are heads, and layers that are where their rows are no width of the model.
HEAD_MODULE = re.compile(r"^(\w+_)?(heads?|classifier|postnet)$|^(\w+_)?(class|bbox|box)_(embed|predictor)$")
FEW = 16  # coordinates of a box, actions
PREDICTION = re.compile(
    r"^(head_linear|regression|seq_relationship|logits_\w+|pred(ict)?_\w+|\w+_pred|feat_out|prob_out)$"
)
UNSURE = re.compile(r"^(output|proj_out|fc)$")  # of a head only where their rows are no width of the model
BLOCK = re.compile(r"^(output|residual)_layer$")  # of a block of two layers beside one, which may be the last
LAST = re.compile(r"^(final_\w+|conv_out|conv_last|conv_post)$")  # may put out an image's or a sound's few channels
GATE = re.compile(r"gate|router|_res_proj$")  # one number of these scales a sum inside
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "kv_n_heads", "n_kv_head")
PER_LAYER = re.compile(r"^per_layer_model_projection$")  # of Gemma 3n and 4: a matrix of each of the model's layers
GROUPS = ("groups", "n_groups", "num_groups", "n_blocks")
# Names of layers, and of arrays that a module multiplies with its own hands.
TELLING = re.compile(r"(proj|projection|linear|dense|fc\d*|kernel|router|^w\d|^w[qkvo]|_w)(_weight)?$")
TAKEN_APART = "ends a head, but its module takes what it puts out apart, as if it were several matrices"
POSITIONS = re.compile(r"(^|[._])(pos|position|positional)_emb\w*$|(^|_)pos$")
AS_WIDE = "ends what is named a head or an output, but is no wider than a layer inside, and taken for a matrix"
UNTAKEN = "puts out channels that no layer takes in, as a head does, and is taken for a matrix"
UNTOLD = "belongs to no known layer, and its module's code does not say whether it is a matrix"


class Model:
    """A model's modules by path, and what they have in common."""

    def __init__(self, modules: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.modules, self.shapes = modules, shapes
        self.known_heads: dict[str, tuple[int, int]] = {}

    @cached_property
    def own_heads(self) -> set[str]:
        """The layers that a model itself calls its heads, by path: Transformers' language models and timm's do."""
        # What Transformers shards of this class itself: its head.
        sharded = attribute(class_of(self.modules[""]), "_tp_plan") or ()
        told: list[Any] = [self.modules.get(path) for path in sharded]
        for name in ("get_output_embeddings", "get_classifier"):
            get = getattr(self.modules[""], name, None)
            heads = get() if callable(get) else None
            told += heads if isinstance(heads, tuple | list) else [heads]
        paths = [p for p, m in self.modules.items() if m is not None and any(m is head for head in told)]
        inside = [[layer for layer in self.layers if f"{layer}.".startswith(f"{path}.")] for path in paths]
        shape = {p: _shape(self.modules[p]) for layers in inside for p in layers}
        return {p for layers in inside for p in layers if shape[p] == shape[layers[-1]]}

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, cols) of all linear layers, by path."""
        shapes = {p: _shape(m) for p, m in self.modules.items()}
        return {p: (s[0], prod(s[1:])) for p, s in shapes.items() if len(s) > 1 and is_pointwise(self.modules[p], s)}

    def heads(self, path: str) -> tuple[int, int]:
        """Heads and key-value heads of the nearest module around `path` that has any; 0 if none has."""
        if path not in self.known_heads:
            module = self.modules.get(path)  # None for MLX's lists, which are no modules
            around = self.heads(path.rpartition(".")[0]) if path else (0, 0)
            own = _number(module, HEADS)
            self.known_heads[path] = (own, _number(module, KV_HEADS) or own) if own else around
        return self.known_heads[path]

    @cached_property
    def layers(self) -> list[str]:
        """The modules with a weight of more than one axis, by path."""
        return [p for p, m in self.modules.items() if len(_shape(m)) > 1]

    @cached_property
    def tables(self) -> set[tuple[int, ...]]:
        """The shapes of the vocabularies' embeddings."""
        shapes = {_shape(m) for m in self.modules.values() if bases(m) & EMBEDDINGS}
        return {shape for shape in shapes if shape and shape[0] in self.vocabularies}

    def is_mirrored(self, path: str) -> bool:
        """Whether, in a model that names no vocabulary, a linear layer has an embedding's shape, and is the last or one
        that none takes from."""
        if self.vocabularies or path not in self.linears:
            return False
        tables = {_shape(m) for p, m in self.modules.items() if bases(m) & EMBEDDINGS and not POSITIONS.search(p)}
        last = next(name for name, shape in reversed(self.shapes.items()) if len(shape) > 1)  # as it was registered
        return self.linears[path] in tables and (self.is_output(path) or last == f"{path}.weight")

    @cached_property
    def layers_in(self) -> Counter[str]:
        """How many layers each module holds, itself included."""
        return Counter(p[:i] for p in self.layers for i in range(len(p) + 1) if p[i : i + 1] in ("", "."))

    @cached_property
    def widths(self) -> set[int]:
        """What linear layers take in, but for a few numbers: the output of a head is none of these."""
        return {cols for _, cols in self.linears.values() if cols > FEW}

    @cached_property
    def taken(self) -> set[int]:
        """The widths that layers and norms take in, and all that arrays have which modules own directly."""
        sizes: set[int] = set()
        for name, shape in self.shapes.items():
            at = place(name, self.modules)
            owner, own = self.modules[at.path], len(shape) > 1 and at.leaf == "weight"
            if at.leaf.endswith("bias") or bases(owner) & EMBEDDINGS:
                continue
            if own and (is_linear(bases(owner)) or any(CONVOLUTION.match(base) for base in bases(owner))):
                taken = _shape(owner)[1:]
                sizes.update(taken, [n * (attribute(owner, "groups") or 1) for n in taken])
            else:
                sizes.update(shape)
        return sizes

    def is_output(self, path: str) -> bool:
        """Whether no layer takes in what this layer puts out, by its number of rows; of a convolution, whether these
        are classes or few."""
        rows = _shape(self.modules[path])[0]
        return rows in self.vocabularies or (rows not in self.widths if path in self.linears else rows <= FEW)

    @cached_property
    def vocabularies(self) -> set[int]:
        """The sizes of vocabularies, and the numbers of classes, in the configs."""
        return set(_outputs(self.modules[""], 0))


class Place(NamedTuple):
    """Where an array stands: the module that owns it, by path, and its name there."""

    name: str  # as layer_of wants it
    path: str
    leaf: str

    def users(self, model: Model) -> Iterator[tuple[Any, str]]:
        """The modules whose code may use the array, each with what the array or its layer is called there.

        Of a layer that is the module around it, and the next where that only wraps the layer.
        """
        path, child = self.path, self.leaf
        if model.layers_in[path] != 1 or path not in model.layers:
            yield model.modules[path], child
        while path and model.layers_in[path] == 1:
            path, _, child = path.rpartition(".")
            while path and (WRAPPER.fullmatch(f"{child}.") or bases(model.modules.get(path, [])) & LISTS):
                path, _, child = path.rpartition(".")
            yield model.modules[path], child

    def splits(self, model: Model, rows: int, cols: int, sizes: int) -> list[Split]:
        """How these modules split the output of a (rows, cols) layer; a convolution's `sizes` are seen by the first."""
        asked = [split(user, child, rows, cols, 0 if i else sizes) for i, (user, child) in enumerate(self.users(model))]
        return [told for told in asked if told]


def place(name: str, modules: dict[str, Any]) -> Place:
    """A weight-normed layer's array belongs to the layer, one in a list to the module that holds the list."""
    name = PARAMETRIZED.sub(r".\1", name)
    path, _, leaf = name.rpartition(".")
    while path not in modules or bases(modules[path]) & CONTAINERS:
        path, _, leaf = path.rpartition(".")
    return Place(name, path, leaf)


def _shape(module: Any) -> tuple[int, ...]:
    """Of the module's weight, the axis that it puts out first."""
    shape, names = tuple(getattr(attribute(module, "weight"), "shape", ())), bases(module)
    in_first = is_torch(module) and any(name == "Conv1D" or IN_FIRST.match(name) for name in names)
    return (shape[1], shape[0], *shape[2:]) if in_first else shape


def bases(module: Any) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def is_linear(names: set[str]) -> bool:
    return any(name.endswith("Linear") for name in names) or "Conv1D" in names


def is_pointwise(module: Any, shape: tuple[int, ...]) -> bool:
    """Whether a module is a linear layer, which a convolution of size 1 is, too."""
    names = bases(module)
    convolution = any(CONVOLUTION.match(name) for name in names)
    return is_linear(names) or (convolution and sorted(shape[1:])[:-1] == [1] * (len(shape) - 2))


def kind_of(at: Place, shape: tuple[int, ...], model: Model) -> Layer:
    """What the name says of an array, corrected by its owner: kind, groups, layout, doubt."""
    layer = layer_of(at.name, shape)
    owner = model.modules[at.path]
    names = bases(owner)
    convolution = next((name for name in names if CONVOLUTION.match(name)), "")
    if layer.kind in ("lora", "bias", "quantisation scale"):
        return layer._replace(doubt="")
    if names & EMBEDDINGS:
        return layer._replace(kind="embedding", doubt="")
    if at.path in model.own_heads:
        return layer._replace(kind="head", doubt="")
    is_layer, out_first = bool(convolution) or is_linear(names), _shape(owner) or shape
    if is_layer and is_head(at, out_first, layer, model):
        is_doubtful = layer.kind != "head" and _is_split(at, out_first, model)
        return layer._replace(kind="head", doubt=TAKEN_APART if is_doubtful else "")
    if any("Norm" in name for name in names):
        return layer._replace(kind="norm", doubt="")
    if not is_layer:
        return _bare(layer, at, model, shape)
    if not convolution and _is_table(at, model):
        return layer._replace(kind="embedding", doubt="")
    if convolution:
        in_head = _around(at.path)[0] != at.path  # and is not one by its own name, as conv_head
        may_end = in_head and _may_end(at.path, out_first, layer, model)
        doubt = UNTAKEN if _is_untaken(at, out_first, layer, model) else AS_WIDE if may_end else ""
        return _convolution(layer, owner, shape, "Transpose" in convolution)._replace(doubt=doubt)
    return _linear(layer, at, shape, model)._replace(
        doubt=AS_WIDE if _may_end(at.path, out_first, layer, model) else ""
    )


def _number(module: Any, names: tuple[str, ...]) -> int:
    """The first of these numbers that a module or its config has; 0 if none."""
    holders = (module, attribute(module, "config"), attribute(module, "args"))
    numbers = (attribute(holder, name) for holder in holders for name in names)
    return next((n for n in numbers if type(n) is int and n > 0), 0)


def _outputs(owner: Any, depth: int) -> Iterator[int]:
    for name in ("config", "args") if depth == 0 else ():
        yield from _outputs(attribute(owner, name), 1)
    values = getattr(owner, "__dict__", {}) if depth else {}
    for name, value in values.items():
        if type(value) is int and OUTPUTS.search(name):
            yield value
        elif name.endswith("_config") and depth < 3:
            yield from _outputs(value, depth + 1)
    if depth and type(attribute(owner, "num_labels")) is int:
        yield owner.num_labels


def is_head(at: Place, shape: tuple[int, ...], layer: Layer, model: Model) -> bool:
    """Whether a layer is the output's: by its name, by a vocabulary of rows or one, or as the last of a named head."""
    if LM_HEAD.search(layer.name):
        return _is_last(at.path, model)
    if at.path in model.linears and shape[0] == 1 and not _in_attention(at.path, model):
        return not GATE.search(layer.name)
    head, in_layers = _around(at.path)
    if in_layers or _in_attention(at.path, model):
        return False
    if PREDICTION.match(layer.name) or (layer.kind == "head" and not UNSURE.match(layer.name)):
        is_clear = at.path in model.linears and not model.own_heads
        return _is_last(at.path, model) and (is_clear or model.is_output(at.path))
    (rows, cols), around = (shape[0], prod(shape[1:])), model.modules.get(at.path.rpartition(".")[0])
    is_classes = at.path in model.linears and rows > cols and rows in model.vocabularies
    if is_classes and rows in model.widths:  # but for an encoder that takes its own classes in again
        is_classes = (cols, rows) in model.linears.values()
    if (rows, cols) in model.tables or (is_classes and not model.tables) or model.is_mirrored(at.path):
        return True
    is_block = hasattr(around, "proj_in")  # of which proj_out is the second layer
    if (layer.kind == "head" or BLOCK.match(layer.name)) and not is_block:
        return model.is_output(at.path)
    return bool(head) and _ends(at.path, head, model)


def _around(path: str) -> tuple[str, bool]:
    """The outermost module around a layer that is named as a head is ("" if none), and whether that (or the layer, if
    none is) stands in a numbered layer."""
    parts = re.sub(r"(\.\d+)+$", "", path).split(".")
    for i, part in enumerate(parts):
        if HEAD_MODULE.match(part):
            return ".".join(parts[: i + 1]), any(p.isdigit() for p in parts[:i])
    return "", any(p.isdigit() for p in parts)


def _ends(path: str, head: str, model: Model) -> bool:
    """Whether a layer is an output and after it come only layers of its own module that are none, or are like it, in
    a head, of one of the parallel heads if these are numbered. Where these have names, one stands for all of its width.
    """
    around, shape = path.rpartition(".")[0], _shape(model.modules[path])
    if "ModuleDict" in bases(model.modules.get(around)):
        beside = [p for p in model.layers if p.rpartition(".")[0] == around]
        return any(model.is_output(p) for p in beside if _shape(model.modules[p])[1:] == shape[1:])
    inside = _inside(path, head, model)
    after = inside[inside.index(path) + 1 :]
    own = all(p.startswith(f"{around}.") for p in after)
    return model.is_output(path) and own and all(_shape(model.modules[p]) == shape for p in after if model.is_output(p))


def _inside(path: str, head: str, model: Model) -> list[str]:
    """The layers of the head that a layer is in, of one of the parallel heads if these are numbered."""
    one = re.match(rf"{re.escape(head)}\.\d+\.", f"{path}.")
    start = one.group() if one and "Sequential" not in bases(model.modules.get(head)) else f"{head}."
    return [p for p in model.layers if f"{p}.".startswith(start)]


def _may_end(path: str, shape: tuple[int, ...], layer: Layer, model: Model) -> bool:
    """Whether a layer that changes the width is the last in what is named a head, or in a block that may be one."""
    head, in_layers = _around(path)
    if BLOCK.match(layer.name) and not in_layers:
        return True
    if not head or in_layers or shape[0] == shape[1] or SINGLE.match(layer.name) or _in_attention(path, model):
        return False
    return _inside(path, head, model)[-1] == path


def _is_untaken(at: Place, shape: tuple[int, ...], layer: Layer, model: Model) -> bool:
    """Whether no layer takes in what a convolution outside the numbered layers puts out, and its name is none of a
    matrix's. (Of a linear layer that says little: what two put out is often joined, and small models end in one.)"""
    is_told = TELLING.search(layer.name) or SINGLE.match(layer.name)
    is_numbered = any(part[-1:].isdigit() for part in at.path.split("."))
    is_taken = shape[0] in model.taken and not (shape[0] <= FEW and LAST.match(layer.name))
    if is_told or is_numbered or _in_attention(at.path, model) or is_taken:
        return False
    return not _is_split(at, shape, model)


def _in_attention(path: str, model: Model) -> bool:
    """Whether a module around a layer is an attention, whose scores are no output."""
    parts = path.split(".")
    around = [model.modules.get(".".join(parts[:i])) for i in range(1, len(parts))]
    return any("Attention" in type(module).__name__ for module in around)


def _is_split(at: Place, shape: tuple[int, ...], model: Model) -> bool:
    """Whether the code continues with parts of what a layer puts out, as with a query and a key."""
    told = at.splits(model, shape[0], prod(shape[1:]), len(shape) - 2)
    return any(answer.parts and answer.sure for answer in told)


def _is_table(at: Place, model: Model) -> bool:
    """Whether the module around a linear layer only looks rows of its weight up."""
    path, _, child = at.path.rpartition(".")
    around = class_of(model.modules.get(path))
    return is_never_called(around, child) and use(around, f"{child}.weight").kind == "lookup"


def _is_last(path: str, model: Model) -> bool:
    """Whether a layer called "classifier.6" is the last of its head's numbered ones, or one of heads side by side; True
    without a number."""
    stem = re.sub(r"\.\d+(\.\w+)?$", "", path)
    numbered = [p for p in model.layers if re.fullmatch(re.escape(stem) + r"\.\d+(\.\w+)?", p)]
    if stem == path or path not in numbered:
        return True
    chain = [_shape(model.modules[p]) for p in numbered]
    in_turn = all(len(a) > 2 or a[0] == b[1] for a, b in pairwise(chain))
    return numbered[-1] == path or not (in_turn or "Sequential" in bases(model.modules.get(stem)))


def _convolution(layer: Layer, owner: Any, shape: tuple[int, ...], transposed: bool) -> Layer:
    groups = attribute(owner, "groups")
    if groups is None:  # MLX's own, of which the code may show the groups: (channels, size, 1) is one of each channel
        groups = shape[0] if shape[-1] == 1 and "groups" in keywords(class_of(owner)) else 1
    if not transposed:
        return layer._replace(kind="convolution", groups=groups, doubt="")
    matrices = () if is_torch(owner) else (1, prod(shape[:-1]), shape[-1])  # (in, out, sizes) or (out, sizes, in)
    return layer._replace(kind="transposed convolution", groups=groups, matrices=matrices, doubt="")


def _linear(layer: Layer, at: Place, shape: tuple[int, ...], model: Model) -> Layer:
    groups = next((n for name in GROUPS if type(n := attribute(model.modules[at.path], name)) is int), 1)
    if PER_LAYER.match(layer.name):
        groups = _number(model.modules.get(at.path.rpartition(".")[0]), ("num_hidden_layers",))
    if len(shape) == 2 and groups > 1 and shape[0] % groups == 0:
        return layer._replace(kind="matrix", matrices=(groups, shape[0] // groups, shape[1]), doubt="")
    return layer._replace(kind="matrix", doubt="")


def _bare(layer: Layer, at: Place, model: Model, shape: tuple[int, ...]) -> Layer:
    """Of an array that a module owns directly, and uses in a way that only its code shows."""
    if layer.kind in ("embedding", "norm", "head") or len(shape) < 2:
        return layer._replace(doubt="")
    if POSITIONS.search(at.leaf) or POSITIONS.search(at.path):
        return layer._replace(kind="embedding", doubt="")
    owner, (path, _, child) = model.modules[at.path], at.path.rpartition(".")
    used = use(class_of(owner), at.leaf, len(shape))
    if not used.kind and path in model.modules:
        used = use(class_of(model.modules[path]), f"{child}.{at.leaf}", len(shape))
    if used.kind == "product" and _around(at.path)[0] and model.vocabularies.intersection(shape[-2:]):
        return layer._replace(kind="head", doubt="")
    if used.kind == "product":
        return _product(layer, used, shape)
    if used.kind == "convolution":
        return layer._replace(kind="convolution", groups=attribute(owner, "groups") or 1, doubt="")
    if used.kind:
        return layer._replace(kind="embedding" if used.kind == "lookup" else "entries", doubt="")
    told = (
        TELLING.search(layer.name) or TELLING.search(at.leaf) or type(owner).__module__.partition(".")[0] in LIBRARIES
    )
    if told and layer.kind == "matrix":
        return layer._replace(doubt="")
    return layer._replace(kind="matrix" if layer.kind == "matrix" or len(shape) < 4 else layer.kind, doubt=UNTOLD)


def _product(layer: Layer, used: Use, shape: tuple[int, ...]) -> Layer:
    """A matrix, or a stack of them; of an einsum the one that its letters name: (in, heads, size) is one matrix."""
    plain = layer._replace(kind="matrix", doubt="")
    own, _, rest = used.subscripts.partition(",")
    other, _, output = rest.partition("->")
    if len(own) != len(shape) or len(shape) < 3:
        return plain
    kinds = ["out" if c not in other else "stack" if c in output else "in" for c in own]
    order = [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]]
    if "stack" in order[1:] or len(order) - order.count("stack") != 2:
        return plain._replace(doubt="is multiplied along axes that do not lie side by side")
    sides = [prod(n for n, k in zip(shape, kinds, strict=True) if k == side) for side in ("stack", *order[-2:])]
    return plain._replace(matrices=tuple(sides))
