"""What the code of a module's class does with an array that the module owns.

An array that is multiplied as a matrix is one; what is added, multiplied entry by entry, expanded or looked up is none.
Only the text of the class is read, with `ast`: nothing is run, and no library is imported.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "tensordot", "einsum", "gather_mm", "dot"}
PRODUCTS |= {
    "grouped_mm",
    "gather_qmm",
    "quantized_matmul",
    "_grouped_mm",
    "_grouped_linear",
    "multi_head_attention_forward",
}
CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)} | {"conv_general", "lightconv"}
LOOKUPS = {"embedding", "embedding_bag", "take", "index_select", "gather"}
ENTRIES = {"exp", "log", "softplus", "sigmoid", "softmax", "tanh", "abs", "mul", "multiply", "add", "where", "norm"}
ENTRIES |= {"expand", "expand_as", "repeat", "tile", "broadcast_to", "repeat_interleave", "interpolate", "sum", "mean"}
ENTRIES |= {"cat", "concat", "concatenate", "stack", "pad", "rms_norm", "layer_norm", "fast_rms_norm", "lerp", "clamp"}
ENTRIES |= {"addcmul", "masked_fill", "clip", "subtract", "divide", "normalize", "index_copy", "masked_scatter", "exp2"}
UNCHANGED = {"to", "float", "type", "type_as", "astype", "half", "bfloat16", "contiguous", "detach", "clone"}
UNCHANGED |= {"t", "transpose", "swapaxes", "permute", "unsqueeze", "squeeze", "view", "reshape", "flatten"}
UNCHANGED |= {
    "dequantize",
    "unflatten",
    "expand_dims",
    "Parameter",
    "as_tensor",
    "chunk",
    "split",
    "unbind",
    "stop_gradient",
    "full_tensor",
}
PASSIVE = {"__init__", "_init_weights", "reset_parameters", "sanitize", "shard", "extra_repr", "init_weights"}
LIBRARIES = ("torch", "mlx", "numpy", "builtins")
STRENGTH = ("product", "convolution", "lookup", "entries")


class Use(NamedTuple):
    """How an array is used: "product", "convolution", "lookup", "entries", or "" if the code does not say."""

    kind: str = ""
    subscripts: str = ""  # of an einsum, this array's first: "hnd,ibh->ibnd"


def class_of(module: Any) -> Any:
    """Its type, as a key of the caches here: mypy takes no type[Any] for one."""
    return type(module)


@cache
def definitions(module: str) -> dict[str, ast.AST]:
    """The classes and functions of a module's file, by name, of which an outer one hides an inner one; none if its text
    cannot be read."""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        tree = ast.parse(Path(file or "").read_text())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    return {node.name: node for node in reversed([*_defined([tree])])}


def _defined(nodes: list[ast.AST]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Those in these nodes and in their statements, the outer ones first; expressions, most of a text, hold none."""
    while nodes:
        yield from (node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef))
        within = (child for node in nodes for child in ast.iter_child_nodes(node))
        nodes = [child for child in within if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)]


@cache
def methods(cls: type) -> dict[str, ast.FunctionDef]:
    """The methods that run: the class's own and those it inherits, but for what a library's base class brings."""
    texts: dict[str, ast.FunctionDef] = {}
    for base in cls.__mro__:
        node = definitions(base.__module__).get(base.__name__)
        if not isinstance(node, ast.ClassDef) or (base is not cls and base.__module__.partition(".")[0] in LIBRARIES):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name not in PASSIVE:
                texts.setdefault(method.name, method)
    return texts


@cache
def attributes(method: ast.FunctionDef) -> dict[str, list[ast.Attribute]]:
    """Where a method reads or sets an attribute, of whatever, by its name: once for all classes that inherit it."""
    by_name: dict[str, list[ast.Attribute]] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute):
            by_name.setdefault(node.attr, []).append(node)
    return by_name


@cache
def mentions(cls: type) -> dict[str, list[ast.FunctionDef]]:
    """The methods that name an attribute, by its name."""
    by_name: dict[str, list[ast.FunctionDef]] = {}
    for method in methods(cls).values():
        for name in attributes(method):
            by_name.setdefault(name, []).append(method)
    return by_name


@cache
def keywords(cls: type) -> set[str]:
    """The keywords of all calls in the methods of a class."""
    calls = (node for method in methods(cls).values() for node in ast.walk(method) if isinstance(node, ast.Call))
    return {str(keyword.arg) for call in calls for keyword in call.keywords}


@cache
def is_never_called(cls: type, name: str) -> bool:
    """Whether the methods of a class read `self.name.weight`, and `self.name` in no other way."""
    named = [attributes(method) for method in mentions(cls).get(name, [])]
    layers = [node for nodes in named for node in nodes[name] if _dotted(node) == f"self.{name}"]
    weights = [node for nodes in named for node in nodes.get("weight", []) if _dotted(node) == f"self.{name}.weight"]
    return 0 < len(layers) == len(weights)


@cache
def use(cls: type, name: str, axes: int = 2) -> Use:
    """How the methods of a class use `self.name` (or `self.child.name`), an array of so many axes: as a matrix, if any
    does."""
    uses: list[Use] = []
    for method in mentions(cls).get(name.rpartition(".")[2], []):
        uses += _Uses(method, cls, axes).of_attribute(name)
    return min(uses, key=lambda one: STRENGTH.index(one.kind), default=Use())


class _Uses:
    """Follows an array through one function: from where it is read, outwards and on to the names it is given."""

    def __init__(self, function: ast.FunctionDef, cls: type, axes: int, depth: int = 3) -> None:
        self.function, self.cls, self.axes, self.depth = function, cls, axes, depth
        self.parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        self.followed: set[str] = set()
        self.of_layer = False

    def of_attribute(self, name: str) -> Iterator[Use]:
        self.of_layer = "." in name
        for node in attributes(self.function)[name.rpartition(".")[2]]:
            if isinstance(node.ctx, ast.Load) and _dotted(node) == f"self.{name}":
                yield from self.of(node)

    def of_name(self, name: str) -> Iterator[Use]:
        if name in self.followed:
            return
        self.followed.add(name)
        for node in ast.walk(self.function):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                yield from self.of(node)

    def of(self, node: ast.AST) -> Iterator[Use]:
        outer = self.parents[node]
        if isinstance(outer, ast.BinOp):
            yield Use("product" if isinstance(outer.op, ast.MatMult) else "entries")
        elif isinstance(outer, ast.Attribute):
            call = self.parents[outer]
            if isinstance(call, ast.Call) and call.func is outer:
                yield from self.of_call(call, node, outer.attr)
            elif outer.attr in ("T", "mT", "data"):
                yield from self.of(outer)
        elif isinstance(outer, ast.Call) and outer.func is not node:
            yield from self.of_call(outer, node, _last(outer.func))
        elif isinstance(outer, ast.Subscript) and outer.value is node and _is_lookup(outer.slice, self.of_layer):
            yield from [*self.of(outer), Use("lookup")]
        elif isinstance(outer, ast.Subscript) and _adds_a_column(outer.slice, self.axes):
            yield Use("entries")  # each row by itself: a vector
        elif isinstance(outer, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.For | ast.comprehension):
            for name in _names(outer, node):
                yield from self.of_name(name)
        elif isinstance(outer, ast.keyword) and "embed" in str(outer.arg):  # handed on as inputs
            yield Use("entries")
        elif isinstance(outer, ast.Subscript | ast.UnaryOp | ast.keyword | ast.IfExp | ast.List | ast.Tuple):
            yield from self.of(outer)

    def of_call(self, call: ast.Call, node: ast.AST, function: str) -> Iterator[Use]:
        if function == "einsum":
            yield Use("product", _subscripts(call, node))
        elif function in PRODUCTS:
            yield Use("product")
        elif function in CONVOLUTIONS:
            yield Use("convolution")
        elif function in LOOKUPS:
            yield Use("lookup")
        elif function in ENTRIES:
            yield Use("entries")
        elif function in UNCHANGED:
            yield from self.of(call)
        elif self.depth and (callee := self.callee(call)):
            for name in _parameter(callee, call, node):
                yield from _Uses(callee, self.cls, self.axes, self.depth - 1).of_name(name)

    def callee(self, call: ast.Call) -> ast.FunctionDef | None:
        """The text of a method or of a function of the class's own file."""
        owner, _, name = _dotted(call.func).rpartition(".")
        if owner == "self":
            return methods(self.cls).get(name)
        text = definitions(self.cls.__module__).get(_last(call.func)) if isinstance(call.func, ast.Name) else None
        return text if isinstance(text, ast.FunctionDef) else None


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _last(function: ast.AST) -> str:
    return _dotted(function).rpartition(".")[2]


def _is_lookup(index: ast.AST, of_layer: bool) -> bool:
    """Whether an index picks rows by an array of numbers, rather than a slice or a place: of a layer's weight any."""
    if isinstance(index, ast.Tuple):
        return any(_is_lookup(part, False) for part in index.elts)
    is_name = isinstance(index, ast.Name) and (of_layer or index.id.endswith("ids"))
    return is_name or isinstance(index, ast.Call | ast.Attribute)


def _adds_a_column(index: ast.AST, axes: int) -> bool:
    """Whether an index makes columns of an array's rows: w[:, None] or w[:, None, :] of two axes."""
    parts = index.elts if isinstance(index, ast.Tuple) else []
    new = [i for i, part in enumerate(parts) if isinstance(part, ast.Constant) and part.value is None]
    return new == [axes] or (axes == 2 and new == [1])


def _names(statement: Any, value: ast.AST) -> Iterator[str]:
    """The names that a statement gives to a value."""
    for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
        if isinstance(target, ast.Name):
            yield target.id
        elif isinstance(target, ast.Tuple):
            yield from (name.id for name in target.elts if isinstance(name, ast.Name))


def _parameter(callee: ast.FunctionDef, call: ast.Call, node: ast.AST) -> Iterator[str]:
    """The name under which a function receives the argument."""
    parameters = [a.arg for a in callee.args.args if a.arg != "self"]
    for keyword in call.keywords:
        if keyword is node or keyword.value is node:
            yield str(keyword.arg)
    yield from (name for name, argument in zip(parameters, call.args, strict=False) if argument is node)


def _subscripts(call: ast.Call, node: ast.AST) -> str:
    """An einsum's subscripts with this operand's first; "" if they are not written there."""
    text = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    operands, _, output = str(text).replace(" ", "").replace("...", "").partition("->")
    terms = operands.split(",")
    place = next((i for i, argument in enumerate(call.args[1:]) if argument is node), -1)
    if not 0 <= place < len(terms) or not output:
        return ""
    return f"{terms[place]},{''.join(t for i, t in enumerate(terms) if i != place)}->{output}"
