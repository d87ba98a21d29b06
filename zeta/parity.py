"""Is it the same algorithm everywhere? The checks that every library, device and dtype of this machine has to pass.

Two oracles, both NumPy float64. Newton-Schulz: the scalar polynomial applied to the singular values, which is exact
("close to U V^T" would need a tolerance of 0.1). The optimizer: `zeta.core.update` around that Newton-Schulz.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from zeta import core
from zeta.core import COEFFICIENTS, Array, Coefficients
from zeta.machine import Absent, Arrays, Target, numpy_target, pure_steps
from zeta.samples import SHAPES, gaussian, inputs, ten_steps


class Tolerance(NamedTuple):
    """Bounds on relative Frobenius errors."""

    newton_schulz: float
    noise: float  # times the condition number, where that is more: rounding that the polynomial itself amplifies
    step: float  # after ten steps, relative to the distance that the parameter moved


# By dtype of Newton-Schulz's products. A coefficient wrong by 1 % is an error of 6.5e-2, by 0.1 % of 7e-3.
TOLERANCE = {
    "float64": Tolerance(1e-12, 0.0, 1e-12),  # 485-fold noise of 2**-53: measured up to 8e-13, on rank 1
    "float32": Tolerance(6e-5, 0.0, 6e-5),  # measured 2e-7 to 5e-5, the most on rank 4 with MLX's summation on CPU
    "float16": Tolerance(6e-3, 5e-4, 4e-3),  # measured up to 3.3e-3; noise up to 2.9e-4
    "bfloat16": Tolerance(3e-2, 3.5e-3, 2e-2),  # measured 1.1e-2 to 2.0e-2; noise up to 1.8e-3
    "auto": Tolerance(3e-2, 3.5e-3, 2e-2),  # whatever a backend chooses for speed, it is never worse than bfloat16
}


class Result(NamedTuple):
    library: str
    device: str
    dtype: str
    check: str  # "family: case"
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


def relative_error(got: Array, want: Array, origin: Array = 0.0) -> float:
    """|got - want| / |want - origin|, Frobenius; infinite where shapes differ or a number is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    error, size = np.linalg.norm((got - want).ravel()), np.linalg.norm((want - origin).ravel())
    return float(error / size) if size else float(error)


def assert_close(got: Array, want: Array, rtol: float, origin: Array = 0.0) -> None:
    """Raises AssertionError unless `relative_error` is at most rtol. All are NumPy arrays."""
    error = relative_error(got, want, origin)
    if not error <= rtol:
        raise AssertionError(f"relative error {error:.2g}, but at most {rtol:.2g} is allowed")


def spectral_polynomial(x: Array, coefficients: Coefficients = COEFFICIENTS["jordan"]) -> Array:
    """What Newton-Schulz must give for x (..., rows, cols): its singular values s replaced by p(s / |x|_F)."""
    return _oracle(x, coefficients)[0]


def _oracle(x: Array, coefficients: Coefficients) -> tuple[Array, float]:
    return _cached_oracle(x.tobytes(), x.shape, coefficients)


@lru_cache(maxsize=256)  # all libraries are shown the same inputs
def _cached_oracle(data: bytes, shape: tuple[int, ...], coefficients: Coefficients) -> tuple[Array, float]:
    """p(x), and the relative condition number of x -> p(x) against independent noise and a wrong norm."""
    x = np.frombuffer(data).reshape(shape)
    u, s, vt = np.linalg.svd(x / max(1e-300, float(np.abs(x).max(initial=0))), full_matrices=False)
    norm = np.linalg.norm(s, axis=-1, keepdims=True)
    s = s / np.where(norm == 0, 1, norm)
    p, slope = s, np.ones_like(s)
    for a, b, c in coefficients:
        p, slope = a * p + b * p**3 + c * p**5, slope * (a + 3 * b * p**2 + 5 * c * p**4)
    size = np.where(norm == 0, np.inf, np.linalg.norm(p, axis=-1, keepdims=True))
    noise = np.sqrt(np.mean(slope**2, -1, keepdims=True) + np.sum((s * slope) ** 2, -1, keepdims=True))
    return (u * p[..., None, :]) @ vt, float((noise / size).max(initial=0))


class Comparison(NamedTuple):
    """What one check got and should have got, in NumPy float64; a step's `origin` is where the parameter started."""

    check: str  # "family: case"
    got: Array
    want: Array
    rtol: float
    origin: Array = 0.0


def run(target: Target | Absent) -> Iterator[Result]:
    """Every check's result. A check that raises is a failed one, named with its error; so is an expected absence."""
    if isinstance(target, Absent):
        if target.expected:
            yield Result(target.library, target.device, "", f"device: {target.reason}", float("inf"), 0.0)
        return
    labels = target.library, target.device, target.dtype
    for check in CHECKS:
        try:
            with target.scope():
                for name, got, want, rtol, origin in check(target):
                    yield Result(*labels, name, relative_error(got, want, origin), rtol)
        except Exception as error:
            yield Result(*labels, f"{check.__name__}: {type(error).__name__}: {error}", float("inf"), 0.0)


def device(target: Target) -> Iterator[Comparison]:
    """The library must have computed where it was asked to."""
    x = target.newton_schulz(target.array(gaussian(SHAPES["wide"])), COEFFICIENTS["jordan"])
    used = target.used(x)
    yield Comparison(f"device: {used}", np.array(float(used == target.device)), np.array(1.0), 0.0)


def newton_schulz(target: Target) -> Iterator[Comparison]:
    for name, x in inputs(target):
        yield _spectral(target, f"newton-schulz: {name}", x, COEFFICIENTS["jordan"])


def coefficients(target: Target) -> Iterator[Comparison]:
    for name, steps in COEFFICIENTS.items():
        for kind in ("square", "tall", "1xn", "long"):
            yield _spectral(target, f"coefficients: {name} {kind}", gaussian(SHAPES[kind]), steps)


def core_itself(target: Target) -> Iterator[Comparison]:
    """`zeta.newton_schulz` and `zeta.update` on the arrays of a library that has a backend of its own."""
    if target.steps is None or target.dtype not in ("float64", "float32"):
        return
    plain = replace(target, newton_schulz=core.newton_schulz, steps=None)
    for kind in ("square", "wide", "tall", "nx1", "stack", "empty stack"):
        yield _spectral(plain, f"core: newton-schulz {kind}", gaussian(SHAPES[kind]), COEFFICIENTS["jordan"])
    for comparison in step(plain):
        yield comparison._replace(check=comparison.check.replace("step:", "core: step"))


def invariance(target: Target) -> Iterator[Comparison]:
    """A stack is its matrices one by one, and the transpose's result is the result's transpose."""
    rtol, jordan = TOLERANCE[target.dtype].newton_schulz, COEFFICIENTS["jordan"]
    for kind, rows, cols in (("wide", 48, 80), ("tall", 80, 48), ("long", 64, 256)):
        x = target.array(gaussian((5, rows, cols)) * np.array([1, 2, 1 / 16, 8, 1])[:, None, None])
        got = target.numpy(target.newton_schulz(x, jordan))
        alone = np.stack([target.numpy(target.newton_schulz(x[i, :, :], jordan)) for i in range(5)])
        yield Comparison(f"invariance: batched = one by one, {kind}", got, alone, rtol)
        transposed = target.numpy(target.newton_schulz(x.mT, jordan)).swapaxes(-2, -1)
        yield Comparison(f"invariance: transposed = not, {kind}", transposed, got, rtol)


def step(target: Target) -> Iterator[Comparison]:
    """Ten steps with given gradients, by the library's optimizer class where there is one."""
    params, grads, hyper = ten_steps()
    jordan = COEFFICIENTS["jordan"]
    if target.steps:
        after = target.steps(params, grads, hyper, jordan)
    else:
        after = pure_steps(target, params, grads, hyper, lambda x: target.newton_schulz(x, jordan))
    for name, origin in params.items():
        yield Comparison(f"step: {name}", after[name], oracle_steps()[name], TOLERANCE[target.dtype].step, origin)


def class_is_update(target: Target) -> Iterator[Comparison]:
    """The optimizer class, with its batches, is `zeta.update` around the fused Newton-Schulz, matrix by matrix."""
    if target.steps is None:
        return
    params, grads, hyper = ten_steps()
    jordan = COEFFICIENTS["jordan"]
    got = target.steps(params, grads, hyper, jordan)
    want = pure_steps(target, params, grads, hyper, lambda x: target.newton_schulz(x, jordan))
    for name, origin in params.items():
        yield Comparison(f"class = update: {name}", got[name], want[name], TOLERANCE[target.dtype].step, origin)


Check = Callable[[Target], Iterator[Comparison]]
CHECKS: list[Check] = [device, newton_schulz, coefficients, invariance, step, class_is_update, core_itself]


@lru_cache
def oracle_steps() -> Arrays:
    params, grads, hyper = ten_steps()
    return pure_steps(numpy_target("float64"), params, grads, hyper, spectral_polynomial)


def _spectral(target: Target, check: str, x: Array, coefficients: Coefficients) -> Comparison:
    given = target.array(x)
    got = target.numpy(target.newton_schulz(given, coefficients))
    want, condition = _oracle(target.numpy(given), coefficients)  # of the input as the dtype rounds it
    floor, noise, _ = TOLERANCE[target.dtype]
    return Comparison(check, got, want, max(floor, noise * condition))
