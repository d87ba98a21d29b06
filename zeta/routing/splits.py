"""How a module's own code takes apart what one of its layers puts out: the matrices that the layer holds.

A layer of (query, key, value), of gate and up, of a state-space model's z, x, B, C and dt is one product whose result
the module splits, slices or reshapes. Its class is read, not run; sizes are looked up in the module and its config.
"""

import ast
import re
from itertools import pairwise
from operator import add, floordiv, mod, mul, sub, truediv
from typing import Any, NamedTuple

from zeta.routing.pieces import Axis, Cut, Piece, Shape
from zeta.routing.source import PRODUCTS, class_of, definitions, mentions, methods

SPLITS = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "unstack"}
COUNTS = ("chunks", "split_size_or_sections", "split_size", "indices_or_sections", "split_sizes")
OPERATORS: dict[type, Any] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.FloorDiv: floordiv, ast.Mod: mod}
OPERATORS |= {ast.Div: truediv}
GATED = {"glu", "GLU"}  # split what they get in two
GATING = re.compile(r"glu$|gelu$")  # functions of a model's own that do so in a way that their text shows
SUMS = {"sum", "mean", "amax", "amin", "prod", "logsumexp"}
ITSELF = {"int", "tuple", "list", "tensor", "as_tensor", "IntTensor", "LongTensor"}  # of a number or a list
ORDERS = re.compile(r"arg|top_?k|sort")  # give places, or rows in another order
# A query's (or key's) rotated and other half are put together again, and are one projection.
ROTATED = re.compile(r"_(pe|rot|rope|nope|pass|rotary|ro)$")
ONE = {"q", "k", "v", "query", "key", "value"}
# Names of layers that are one projection.
SINGLE = re.compile(r"^(to_|w)?(q|k|v|query|key|value)(_(proj|lin|[ab]_proj|b|head|projection))?$")


class Split(NamedTuple):
    """Lengths of a layer's matrices in the order of its rows, over and over where they alternate; () if it is one."""

    parts: tuple[int, ...]
    repeats: int
    sure: bool  # false where the code takes out some rows, and what it does with the rest was not understood
    missed: bool = False  # the code takes rows apart, but which could not be told


class Owner(NamedTuple):
    """The module or its config, whose numbers are looked up."""

    value: Any


class Pieces(list[Any]):
    cut: Cut | None = None


def split(module: Any, child: str, rows: int, cols: int, sizes: int = 0) -> Split | None:
    """How the code of `module` splits the output (..., rows) of its layer `child`, or of each layer in a list `child`;
    of torch's convolution over so many `sizes` (batch, rows, *sizes). None where nothing could be read."""
    reader = _Reader(module, child, rows, cols, sizes)
    for method in mentions(class_of(module)).get(child, []):
        reader.read(method, [], {})
    cuts = [cut for cut in reader.cuts if not _is_one_projection(cut, child)]
    alike = [cut for cut in cuts if cut.period == cuts[0].period]
    bounds = sorted({0}.union(*({cut.period, *cut.bounds} for cut in alike)))
    parts = tuple(b - a for a, b in pairwise(bounds))
    if len(parts) < 2 or max(parts) == 1 == rows // sum(parts):  # one matrix, or single numbers
        missed = reader.missed and not SINGLE.match(child)
        return Split((), 1, not (reader.lost or missed), missed) if reader.reached else None
    return Split(parts, rows // alike[0].period, all(cut.is_complete() for cut in alike))


def _is_one_projection(cut: Cut, child: str) -> bool:
    """Whether the pieces are of one query, key or value: its halves for the rotation, blocks of its heads."""
    stems = {re.split(r"_|\d", name)[0] for name in cut.names}
    numbered = stems <= ONE and len({name.rstrip("0123456789") for name in cut.names}) == 1
    one = len(stems) == 1 and (numbered or all(ROTATED.search(name) for name in cut.names))
    return one or bool(SINGLE.match(child) and (cut.slices is not None or len(stems) < 2))


def is_torch(module: Any) -> bool:
    """Whether a module is torch's, and not MLX's, whose layers lie otherwise."""
    return hasattr(module, "named_parameters")


def attribute(owner: Any, name: str) -> Any:
    """An attribute, or None: configs whose layers differ raise errors of their own for what has no single value."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


class _Reader:
    """Follows the layer's output through the methods of its owner, from one statement to the next."""

    def __init__(self, module: Any, child: str, rows: int, cols: int, sizes: int) -> None:
        self.module, self.child, self.cols, self.layer = module, child, cols, attribute(module, child)
        self.rows, self.reached = rows, False
        self.torch = is_torch(module)
        self.dims, self.place = (2 + sizes, 1) if sizes and self.torch else (3, 2)
        self.cuts: list[Cut] = []
        self.names: dict[str, Any] = {}
        self.depth = 0
        self.lost = False  # a reshape was not understood
        self.missed = False  # a cut does not fit the rows as they were read

    @property
    def output(self) -> Piece:
        self.reached = True
        return Piece((Axis(self.rows, 1, self.place),), dims=self.dims)

    def is_layer(self, value: Any) -> bool:
        """Whether a value is the layer, or the list that holds it: one layer of a list stands for all."""
        return isinstance(value, Owner) and value.value is self.layer

    def read(self, method: ast.FunctionDef, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """What a method returns, as far as it is known."""
        outer, self.depth = self.names, self.depth + 1
        parameters = [a.arg for a in method.args.args if a.arg != "self"]
        self.names = dict(zip(parameters, arguments, strict=False)) | keywords
        returned: list[Any] = []
        self.run(method.body, returned)
        self.names, self.depth = outer, self.depth - 1
        return next((value for value in returned if value is not None), None)

    def run(self, body: list[ast.stmt], returned: list[Any]) -> None:
        for statement in body:
            match statement:
                case ast.Assign(targets=targets, value=node):
                    value = self.value(node)
                    for target in targets:
                        self.bind(target, value)
                case ast.AnnAssign(target=target, value=node):
                    self.bind(target, self.value(node))
                case ast.If(test=test, body=yes, orelse=no):
                    known = self.value(test)
                    self.branch([yes, no] if known is None else [yes] if known else [no], returned)
                case ast.Return(value=node):
                    returned.append(self.value(node))
                case ast.Expr(value=node):
                    self.value(node)
                case ast.For(target=target, iter=iterated, body=inner):
                    self.bind(target, self.element(iterated))
                    self.run(inner, returned)
                case ast.While(body=inner) | ast.With(body=inner) | ast.Try(body=inner):
                    self.run(inner, returned)

    def branch(self, branches: list[list[ast.stmt]], returned: list[Any]) -> None:
        """Runs each by itself; afterwards a name has what the first branch that knows it gives to it."""
        before, after = self.names, dict[str, Any]()
        for body in branches:
            self.names = dict(before)
            self.run(body, returned)
            after |= {name: value for name, value in self.names.items() if after.get(name) is None}
        self.names = after

    def element(self, node: ast.expr) -> Any:
        """What a loop gives to its target: of the layer's list the layer, of anything else nothing known."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "zip"):
            each = [self.element(argument) for argument in node.args]
            return [None, *each] if node.func.id == "enumerate" else each
        value = self.value(node)
        return value if self.is_layer(value) else None

    def bind(self, target: ast.AST, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
            if isinstance(value, Piece) and value.cut:
                value.cut.names.append(target.id)
        if not isinstance(target, ast.Tuple):
            return
        if isinstance(value, Pieces) and value.cut:
            value.cut.names += [getattr(name, "id", "_") for name in target.elts]
        if isinstance(value, Shape):
            value = [None] * (len(target.elts) - 1) + [value.last]
        known = isinstance(value, list) and len(value) == len(target.elts)
        for name, one in zip(target.elts, value if known else [None] * len(target.elts), strict=True):
            self.bind(name, one)

    def value(self, node: ast.AST | None) -> Any:
        """What an expression is: a number, a list, a Piece, an Owner or a Shape; None if unknown."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return Owner(self.module) if name == "self" else self.names.get(name)
            case ast.Attribute():
                return self.attribute(node)
            case ast.Starred(value=inner):
                return self.value(inner)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return self.items(parts)
            case ast.IfExp(test=test, body=yes, orelse=no):
                known = self.value(test)
                values = [self.value(branch) for branch in ([yes, no] if known is None else [yes] if known else [no])]
                return next((value for value in values if value is not None), None)
            case ast.UnaryOp(op=op, operand=inner):
                return _unary(op, self.value(inner))
            case ast.BoolOp(op=op, values=parts):
                return _either(isinstance(op, ast.Or), [self.value(part) for part in parts])
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compared(op, self.value(left), self.value(right))
            case ast.BinOp():
                return self.operation(node)
            case ast.ListComp() | ast.GeneratorExp():
                return self.comprehension(node)
            case ast.Subscript(value=inner, slice=index):
                return self.subscript(self.value(inner), index)
            case ast.Call():
                return self.call(node)
        return None

    def items(self, parts: list[ast.expr]) -> list[Any]:
        values: list[Any] = []
        for part in parts:
            value = self.value(part)
            values += value if isinstance(part, ast.Starred) and isinstance(value, list) else [value]
        return values

    def attribute(self, node: ast.Attribute) -> Any:
        owner = self.value(node.value)
        if node.attr == "shape":
            known = isinstance(owner, Piece) and len(owner.axes) == 1 and owner.is_last(owner.axes[0].place)
            return Shape(owner.axes[0].size if known else None if isinstance(owner, Piece) else self.cols)
        if isinstance(owner, Owner):
            value = attribute(owner.value, node.attr)
            if value is self.layer and value is not None:
                return Owner(value)
            if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
                return [*value]
            return value if isinstance(value, int | float | str) else None if value is None else Owner(value)
        return owner if isinstance(owner, Piece) else None

    def operation(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        pieces = [x for x in (left, right) if isinstance(x, Piece)]
        if isinstance(node.op, ast.MatMult):
            return self.output if self.is_weight(node.left) or self.is_weight(node.right) else None
        if pieces:  # scaled, or with a bias
            return pieces[0].plain() if len(pieces) == 1 else None
        if isinstance(node.op, ast.Add) and (isinstance(left, Shape) or isinstance(right, list)):
            return [*(left if isinstance(left, list) else [left]), *(right if isinstance(right, list) else [right])]
        try:
            return OPERATORS[type(node.op)](left, right)
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    def comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> Any:
        values = self.value(node.generators[0].iter)
        if not isinstance(values, list):
            return None
        results = Pieces()
        results.cut = getattr(values, "cut", None)
        for value in values:
            self.bind(node.generators[0].target, value)
            results.append(self.value(node.elt))
        return results

    def subscript(self, value: Any, index: ast.expr) -> Any:
        if isinstance(value, Piece):
            return self.sliced(value, index)
        if self.is_layer(value):
            return value
        if isinstance(value, Shape) and isinstance(index, ast.Slice):
            return Shape(None)
        at = self.value(index)
        if isinstance(value, Shape):
            return value.last if at == -1 else None
        fits = isinstance(value, list) and type(at) is int and -len(value) <= at < len(value)
        return value[at] if fits else None

    def call(self, node: ast.Call) -> Any:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else None
        arguments = self.items(node.args)
        keywords = {k.arg: self.value(k.value) for k in node.keywords if k.arg}
        if isinstance(owner, Piece):
            return self.method(owner, name, arguments, keywords)
        if self.is_layer(self.value(node.func)):
            return self.output
        if isinstance(owner, Owner) and owner.value is self.module:
            text = methods(class_of(self.module)).get(name)
            if text and self.depth < 4:
                return self.read(text, arguments, keywords)
        if name == "size" and owner is None:
            return Shape(self.cols) if not arguments else None
        if name in PRODUCTS:
            return self.output if any(self.is_weight(argument) for argument in node.args) else None
        if name in SPLITS and arguments and isinstance(arguments[0], Piece):
            return self.method(arguments[0], name, arguments[1:], keywords)
        return self.passed(name, arguments, keywords)

    def passed(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """What a function or another layer makes of its arguments: a single piece goes through, unless that is a layer
        with rows of its own."""
        if name == "map" and len(arguments) == 2:
            return arguments[1]
        if (name in ITSELF and len(arguments) == 1) or name.endswith("_like"):
            return None if name.endswith("_like") else arguments[0]
        lists = [value if isinstance(value, list) else [value] for value in (*arguments, *keywords.values())]
        pieces = [x for values in lists for x in values if isinstance(x, Piece)]
        layer = attribute(self.module, name)
        if len(pieces) != 1 or _changes_rows(layer) or ORDERS.search(name):
            return None
        text = definitions(class_of(self.module).__module__).get(name)
        if isinstance(text, ast.FunctionDef) and GATING.search(name):
            return self.read(text, arguments, keywords)
        if name in GATED or type(layer).__name__ in GATED:
            return self.cut(pieces[0], 2, -1, name)
        return pieces[0].plain()

    def is_weight(self, node: ast.AST) -> bool:
        """Whether an expression is the array itself, which its module multiplies with its own hands."""
        while isinstance(node, ast.Subscript | ast.Call | ast.Attribute):
            if isinstance(node, ast.Attribute) and node.attr == self.child and isinstance(node.value, ast.Name):
                return node.value.id == "self"
            node = node.func if isinstance(node, ast.Call) else node.value
        return False

    def method(self, piece: Piece, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        flat = arguments[0] if arguments and isinstance(arguments[0], list) else arguments
        numbers = [x for x in flat if type(x) is int]
        if name in SPLITS:
            axis = next((keywords[k] for k in ("dim", "axis") if k in keywords), None)
            sizes = next((keywords[k] for k in COUNTS if k in keywords), None)
            rest = [*arguments]
            if sizes is None and name not in ("unbind", "unstack"):
                sizes = rest.pop(0) if rest else None
            return self.cut(piece, sizes, rest[0] if axis is None and rest else axis or 0, name)
        if name in ("view", "reshape"):
            return self.reshaped(piece, flat)
        if name == "unflatten" and isinstance(arguments[-1], list):
            return self.reshaped(piece, [None, None, *arguments[-1]])
        if name == "permute" or (name == "transpose" and not self.torch):
            whole = len(numbers) == piece.dims
            return piece.moved([n % piece.dims for n in numbers]) if whole else piece.plain()
        if name in ("transpose", "swapaxes") and len(numbers) == 2:
            order = [*range(piece.dims)]
            a, b = (n % piece.dims for n in numbers)
            order[a], order[b] = b, a
            return piece.moved(order)
        if name == "flatten" and len(numbers) == 1 and all(axis.place < numbers[0] for axis in piece.axes):
            return piece.plain(dims=numbers[0] + 1)
        if name in SUMS:
            place = next((keywords[k] for k in ("dim", "axis") if k in keywords), numbers[0] if numbers else None)
            return piece.reduced(place % piece.dims, bool(keywords.get("keepdim"))) if type(place) is int else None
        if name == "unsqueeze" and numbers:
            at = numbers[0] % (piece.dims + 1)
            axes = tuple(axis._replace(place=axis.place + (axis.place >= at)) for axis in piece.axes)
            return piece.plain(axes=axes, dims=piece.dims + 1)
        if name == "size":
            return Shape(None) if not arguments else None
        return None if ORDERS.search(name) else piece.plain()

    def reshaped(self, piece: Piece, sizes: list[Any]) -> Piece:
        result = piece.reshaped(sizes)
        self.lost |= not result.axes and not piece.period
        return result

    def cut(self, piece: Piece, sizes: Any, place: Any, name: str) -> Any:
        """The pieces of a split, which is noted."""
        lengths = self.lengths(piece, sizes, place, name)
        if sum(lengths) == self.rows and type(place) is int and not (piece.axes or piece.period or piece.offset):
            piece = piece.plain(axes=(Axis(self.rows, 1, place % piece.dims),))  # all rows lie side by side again
        i = piece.axis(sum(lengths), len(lengths), place) if lengths else -1
        if i < 0 or sum(lengths) != piece.axes[i].size:
            self.missed |= piece.is_last(place) and (bool(lengths) or not piece.axes)
            return None
        starts = [sum(lengths[:j]) for j in range(len(lengths))]
        drop = name in ("unbind", "unstack")
        pieces = Pieces(piece.part(i, a, n, drop) for a, n in zip(starts, lengths, strict=True))
        pieces.cut = piece.cut_along(i, {*starts, sum(lengths)})
        self.cuts += [pieces.cut] if pieces.cut else []
        return pieces

    def lengths(self, piece: Piece, sizes: Any, place: Any, name: str) -> list[int]:
        """Of the pieces along their axis: torch's split takes sizes, MLX's and tensor_split a count or where to cut."""
        i = piece.axis(None, sizes if type(sizes) is int else None, place)
        size = piece.axes[i].size if i >= 0 else 0
        if name in ("unbind", "unstack"):
            return [1] * size
        by_size = self.torch and name in ("split", "split_with_sizes")
        if type(sizes) is int and sizes > 0:
            length = sizes if by_size else -(-size // sizes)
            return [length] * (size // length) if size and size % length == 0 else []
        if not isinstance(sizes, list) or not all(type(n) is int for n in sizes):
            return []
        return sizes if by_size else [b - a for a, b in zip([0, *sizes], [*sizes, size], strict=True)]

    def sliced(self, piece: Piece, index: ast.expr) -> Any:
        """What a subscript takes out, counted from the last axis after "...", from the first otherwise."""
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        dotted = [isinstance(part, ast.Constant) and part.value is Ellipsis for part in parts]
        for j, part in enumerate(parts):
            place = piece.dims - len(parts) + j if any(dotted[:j]) else j
            i = next((i for i, axis in enumerate(piece.axes) if axis.place == place), -1)
            whole = isinstance(part, ast.Slice) and not (part.lower or part.upper or part.step)
            if i >= 0 and not dotted[j] and not whole:
                return self.taken(piece, i, part)
            if not piece.axes and piece.is_last(place) and isinstance(part, ast.Slice) and not whole:
                self.missed |= any(type(self.value(end)) is int for end in (part.lower, part.upper))
        return piece.plain()

    def taken(self, piece: Piece, i: int, index: ast.expr) -> Any:
        at, step = piece.axes[i], 1
        if isinstance(index, ast.Slice):
            start = self.value(index.lower) if index.lower else 0
            stop = self.value(index.upper) if index.upper else at.size
            step = self.value(index.step) if index.step else 1
        else:
            start = self.value(index)
            start = start[0] if isinstance(start, list) and len(start) == 1 else start
            stop = start + 1 if type(start) is int and start != -1 else at.size
        if not all(type(n) is int for n in (start, stop, step)):
            return piece.plain()
        if step > 1 and at.size % step == 0:  # x[..., ::2] and x[..., 1::2]: in turns
            self.cuts.append(Cut(step * at.stride, {n * at.stride for n in range(step)}, (0, step * at.stride)))
            return None
        self.missed |= max(start, stop) > at.size
        start, stop = (n + at.size if n < 0 else min(n, at.size) for n in (start, stop))
        if start >= stop or (start, stop) == (0, at.size):
            return piece.plain()
        drop = not isinstance(index, ast.Slice | ast.List)
        return piece.part(i, start, stop - start, drop, self.slice_of(piece, i, start, stop))

    def slice_of(self, piece: Piece, i: int, start: int, stop: int) -> Cut | None:
        """The cut that this slice belongs to: others may take the rest of the same rows."""
        new = piece.cut_along(i, {start, stop})
        if new is None:
            return None
        same = [c for c in self.cuts if c.slices is not None and (c.period, c.span) == (new.period, new.span)]
        cut = same[0] if same else new
        self.cuts += [] if same else [cut]
        stride, base = piece.axes[i].stride, new.span[0]
        cut.bounds |= new.bounds
        cut.slices = [*(cut.slices or []), (base + start * stride, base + stop * stride)]
        return cut


def _changes_rows(layer: Any) -> bool:
    """Whether a module is a layer that mixes its inputs: a product, or a convolution that is not depthwise."""
    shape = tuple(getattr(attribute(layer, "weight"), "shape", ()))
    return len(shape) == 2 or (len(shape) > 2 and attribute(layer, "groups") != shape[0])


def _unary(op: ast.unaryop, value: Any) -> Any:
    if isinstance(op, ast.Not):
        return None if value is None else not value
    return -value if isinstance(op, ast.USub) and isinstance(value, int | float) else value


def _either(decisive: bool, values: list[Any]) -> bool | None:
    """The value of `or` (decisive True) or `and` (decisive False); None if it hangs on something unknown."""
    known = [bool(value) for value in values if value is not None]
    return decisive if decisive in known else None if len(known) < len(values) else not decisive


def _compared(op: ast.cmpop, left: Any, right: Any) -> bool | None:
    if not all(isinstance(x, int | str) for x in (left, right)):
        return None
    return left == right if isinstance(op, ast.Eq) else left != right if isinstance(op, ast.NotEq) else None
