"""Negative controls: targets with one deliberate mistake each, to prove that the parity suite can fail."""

from collections.abc import Callable
from dataclasses import replace

from array_api_compat import array_namespace

from zeta.core import Array, Coefficients, Hyper, normalize
from zeta.machine import Arrays, Target
from zeta.parity import TOLERANCE


def coefficient(target: Target) -> Target:
    """Every step's `a` is 1 % too large."""

    def wrong(coefficients: Coefficients) -> Coefficients:
        return tuple((1.01 * a, b, c) for a, b, c in coefficients)

    def steps(params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        assert target.steps
        return target.steps(params, grads, hyper, wrong(coefficients))

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
    """Newton-Schulz and the optimizer's steps are too long, by four times what is allowed."""
    tolerance = TOLERANCE[target.dtype]

    def newton_schulz(x: Array, coefficients: Coefficients) -> Array:
        return target.newton_schulz(x, coefficients) * (1 + 4 * tolerance.newton_schulz)

    def steps(params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        assert target.steps
        longer = replace(hyper, lr=hyper.lr * (1 + 4 * tolerance.step))
        return target.steps(params, grads, longer, coefficients)

    return replace(target, newton_schulz=newton_schulz, steps=target.steps and steps)


CONTROLS: dict[str, Callable[[Target], Target]] = {
    control.__name__: control for control in (coefficient, transpose, axis, bias)
}
