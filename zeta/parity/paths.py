"""Which paths a library's Newton-Schulz takes (bench/README.md has the table), seen from outside while a check runs.

The functions that make up the paths are replaced for that long; a training step carries nothing for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from zeta import core
from zeta import newton_schulz_forms as forms

PATHS = {
    "core": "zeta.newton_schulz, in the library's own operations",
    "direct": "the direct form",
    "gram": "the Gram form",
    "restart": "the Gram form, started again between its steps",
    "1xn": "one row, or one column: no product",
    "blocks": "symmetric products by blocks, on a CPU",
    "kernel": "symmetric products by the Triton kernel, on CUDA",
    "parts": "a stack in parts, one after another, on a CPU",
    "batch": "matrices of several arrays, or a stack of them, in one call",
    "adamw": "AdamW, of what is no matrix",
}
Matrices = tuple[int, ...]  # (count, rows, cols)


class Passage(NamedTuple):
    """A call that took a path, with the (count, rows, cols) that went through it, rows <= cols."""

    path: str
    matrices: Matrices


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """The module with these of its names replaced."""
    before = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@contextmanager
def watch(products: Any = None) -> Iterator[set[Passage]]:
    """A set that grows with every path taken: of the core, and of a backend with this module of products."""
    watcher = Watcher()
    with replaced(core, newton_schulz=watcher.core(core.newton_schulz)):
        if products is None:
            yield watcher.seen
            return
        names = [name for name in ("symmetric", "multiply", "_chunks") if hasattr(products, name)]
        with (
            replaced(forms, **{n: getattr(watcher, n)(getattr(forms, n)) for n in FORMS}),
            replaced(products, **{n: getattr(watcher, n)(getattr(products, n)) for n in names}),
        ):
            yield watcher.seen


FORMS = ("iterate", "direct", "gram", "gram_apart", "segments")


class Watcher:
    """What the watched functions report. Each method wraps the function of its name."""

    def __init__(self) -> None:
        self.seen: set[Passage] = set()
        self.matrices: Matrices = ()  # those that `iterate` is at
        self.products = self.forms = 0  # so far

    def tell(self, path: str) -> None:
        self.seen.add(Passage(path, self.matrices))

    def core(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def newton_schulz(x: Any, *rest: Any) -> Any:
            self.seen.add(Passage("core", ordered(x.shape)))
            return function(x, *rest)

        return newton_schulz

    def iterate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def iterate(x: Any, *rest: Any) -> Any:
            self.matrices = ordered(x.shape)
            self.tell("batch")  # if those are more than a single array's: see `through`
            before = self.forms
            try:
                y = function(x, *rest)
                if self.forms == before:
                    self.tell("1xn")
            finally:
                self.matrices = ()
            return y

        return iterate

    def direct(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._telling("direct", function)

    def gram(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._telling("gram", function)

    def gram_apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._telling("gram", function)

    def segments(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def segments(*arguments: Any) -> Any:
            runs = list(function(*arguments))
            if len(runs) > 1 and self.matrices:  # outside an iteration operations are counted
                self.tell("restart")
            return iter(runs)

        return segments

    def symmetric(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def symmetric(*arguments: Any, **options: Any) -> Any:
            before = self.products
            y = function(*arguments, **options)
            if self.products != before + 1:
                self.tell("blocks" if self.products > before else "kernel")
            return y

        return symmetric

    def multiply(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def multiply(*arguments: Any, **options: Any) -> Any:
            self.products += 1
            return function(*arguments, **options)

        return multiply

    def _chunks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def chunks(stack: Any) -> Any:
            count = function(stack)
            if count > 1:
                self.seen.add(Passage("parts", ordered(stack.shape)))
            return count

        return chunks

    def _telling(self, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def form(*arguments: Any) -> Any:
            self.tell(path)
            self.forms += 1
            return function(*arguments)

        return form


def ordered(shape: tuple[int, ...]) -> Matrices:
    """(count, rows, cols) of (..., rows, cols), the short side first."""
    count = 1
    for n in shape[:-2]:
        count *= int(n)
    return count, *sorted(map(int, shape[-2:]))


def through(seen: set[Passage], matrices: Matrices | None = None) -> tuple[str, ...]:
    """The paths of all passages, in the order of PATHS; or of those that a parameter's matrices (count, rows, cols)
    were in. One that holds none, (), goes to AdamW."""
    if matrices == ():
        return ("adamw",)
    count, *shape = ordered(matrices) if matrices else (1,)
    own = {p for p in seen if not matrices or list(p.matrices[1:]) == shape}
    taken = {p.path for p in own if p.path != "batch" or p.matrices[0] > count}
    return tuple(path for path in PATHS if path in taken)
