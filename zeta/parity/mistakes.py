"""Negative controls: targets with one deliberate mistake each, to prove that the parity suite can fail.

RED says where each must show. A target without the path that a control breaks is returned as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from zeta import newton_schulz_forms as forms
from zeta.core import Array, Coefficients, Hyper, normalize
from zeta.family import COMPARED
from zeta.parity.checks import Result, tolerance
from zeta.parity.paths import PATHS, replaced
from zeta.parity.targets import Arrays, Target, steps_of


def coefficient(target: Target) -> Target:
    """Every step's `a` is 1 % too large."""

    def wrong(coefficients: Coefficients) -> Coefficients:
        return tuple((1.01 * a, b, c) for a, b, c in coefficients)

    def steps(name: str, params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        assert target.steps
        return target.steps(name, params, grads, hyper, wrong(coefficients))

    fused = target.newton_schulz
    return replace(target, newton_schulz=lambda x, c: fused(x, wrong(c)), steps=target.steps and steps)


def transpose(target: Target) -> Target:
    """Tall matrices are transposed, and not transposed back."""

    def newton_schulz(x: Array, coefficients: Coefficients) -> Array:
        if x.shape[-2] <= x.shape[-1]:
            return target.newton_schulz(x, coefficients)
        return array_namespace(x).reshape(target.newton_schulz(x.mT, coefficients), x.shape)

    return replace(target, newton_schulz=newton_schulz)


def axis(target: Target) -> Target:
    """The norm is taken of every row instead of the whole matrix."""

    def newton_schulz(x: Array, coefficients: Coefficients) -> Array:
        xp, x = array_namespace(x), normalize(x)
        norm = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
        return target.newton_schulz(x / xp.where(norm == 0, xp.ones_like(norm), norm), coefficients)

    return replace(target, newton_schulz=newton_schulz)


def bias(target: Target) -> Target:
    """Newton-Schulz and the optimizers' steps are too long, by four times what is allowed."""
    allowed = tolerance(target)

    def newton_schulz(x: Array, coefficients: Coefficients) -> Array:
        return target.newton_schulz(x, coefficients) * (1 + 4 * allowed.newton_schulz)

    def steps(name: str, params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        longer = replace(hyper, lr=hyper.lr * (1 + 4 * allowed.step))
        return steps_of(target)(name, params, grads, longer, coefficients)

    return replace(target, newton_schulz=newton_schulz, steps=steps)


def restart(target: Target) -> Target:
    """The Gram form does not start again."""
    return _broken(target, "restart", forms, RESTART_SLOPE=inf)


def blocks(target: Target) -> Target:
    """One block of a symmetric product, or one tile of the kernel's, is not mirrored."""
    path = "blocks" if "blocks" in target.paths else "kernel"
    if path not in target.paths:
        return target
    least, right = target.shapes[path][-1], target.products.symmetric

    def symmetric(a: Array, *rest: Any, **options: Any) -> Array:
        y, rows = right(a, *rest, **options), a.shape[-2]
        mask = np.ones((rows, rows))
        mask[: rows // 4, -(rows // 4) :] = 0
        return y if rows < least else y * array_namespace(y).astype(target.wide(mask), y.dtype)

    return _broken(target, path, target.products, symmetric=symmetric)


def parts(target: Target) -> Target:
    """Where a stack is taken in parts, each matrix is another's."""
    if "parts" not in target.paths:
        return target
    right = target.products._chunks

    def chunks(stack: Array) -> int:
        count: int = right(stack)
        if count > 1:
            stack.copy_(array_namespace(stack).roll(stack, 1, axis=0))
        return count

    return _broken(target, "parts", target.products, _chunks=chunks)


def batch(target: Target) -> Target:
    """Of several matrices in one call, each is another's."""
    right = forms.iterate

    def iterate(x: Array, *rest: Any) -> Array:
        y = right(x, *rest)
        return array_namespace(y).roll(y, 1, axis=0) if y.ndim > 2 else y

    return _broken(target, "batch", forms, iterate=iterate)


def rule(target: Target) -> Target:
    """Eta does not equilibrate: it is Muon."""

    def steps(name: str, *rest: Any) -> Arrays:
        assert target.steps
        return target.steps("Muon" if name == "Eta" else name, *rest)

    return replace(target, rules={**COMPARED, "Eta": COMPARED["Muon"]}, steps=target.steps and steps)


def _broken(target: Target, path: str, module: Any, **wrong: Any) -> Target:
    if path not in target.paths:
        return target

    @contextmanager
    def scope() -> Iterator[None]:
        with target.scope(), replaced(module, **wrong):
            yield

    return replace(target, scope=scope)


CONTROLS: dict[str, Callable[[Target], Target]] = {
    control.__name__: control for control in (coefficient, transpose, axis, bias, restart, blocks, parts, batch, rule)
}

EVERY = frozenset(PATHS)
MATRICES = EVERY - {"adamw"}
STEPS = tuple(f"step: {name}" for name in COMPARED)
# Where each must show: {family of checks: paths}. What is red went through one of them, and on each of them something
# is. A single row has one singular value, so that its rounding is the same whatever is left out of its spectrum; and
# of the five, only Eta and Muon show the size of what Newton-Schulz makes of it.
RED: dict[str, dict[str, frozenset[str]]] = {
    "coefficient": {"Newton-Schulz": MATRICES}
    | dict.fromkeys(STEPS, MATRICES - {"1xn"})
    | dict.fromkeys(("step: Eta", "step: Muon"), MATRICES),
    "transpose": {
        "Newton-Schulz": frozenset(("core", "direct", "gram", "restart")),
        "invariance": frozenset(("core", "direct", "gram", "restart", "parts")),
    }
    | dict.fromkeys(STEPS, frozenset(["core"])),
    "axis": {"Newton-Schulz": MATRICES - {"blocks"}, "invariance": MATRICES}
    | dict.fromkeys(set(STEPS) - {"step: AdaMuon"}, frozenset(["core"])),  # signs have rows of one norm
    "bias": {"Newton-Schulz": MATRICES} | dict.fromkeys(STEPS, EVERY),
    "restart": dict.fromkeys(("Newton-Schulz", "paths"), frozenset(["restart"])),
    "blocks": dict.fromkeys(("Newton-Schulz", "invariance", *STEPS), frozenset(["blocks", "kernel"])),
    "parts": dict.fromkeys(("Newton-Schulz", "invariance", *STEPS), frozenset(["parts"])),
    "batch": dict.fromkeys(("Newton-Schulz", "invariance"), frozenset(["batch"]))
    | dict.fromkeys(STEPS, frozenset(["batch", "parts"])),  # the parts of a stack are stacks themselves
    "rule": {"step: Eta": MATRICES, "core: step Eta": MATRICES},
}


def where(control: str, target: Target) -> dict[str, frozenset[str]]:
    """RED for a target: in float64 two more show a single row's size, through the eps beside it."""
    places = RED[control]
    if control == "axis" and target.dtype == "bfloat16":  # as large as the kernel's, rows have one norm to 3 %
        places = places | {"Newton-Schulz": places["Newton-Schulz"] - {"kernel"}}
    if control == "coefficient" and target.dtype == "float64":
        places = places | dict.fromkeys(("step: Zeta", "step: NorMuon"), MATRICES)
    return places


def place(result: Result) -> str:
    """The key of RED for a check."""
    return "Newton-Schulz" if result.family in ("newton-schulz", "coefficients") else result.family
