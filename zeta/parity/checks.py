"""Is it the same algorithm everywhere? The checks that every library, device and dtype of this machine has to pass.

Two oracles, both NumPy float64. Newton-Schulz: the scalar polynomial applied to the singular values, which is exact
("close to U V^T" would need a tolerance of 0.1). The optimizer: `zeta.core.update` around that Newton-Schulz.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from zeta import core
from zeta import newton_schulz_forms as forms
from zeta.coefficients import LONG
from zeta.core import COEFFICIENTS, Array, Coefficients
from zeta.family import COMPARED
from zeta.parity.cases import SHAPES, coefficient_inputs, gaussian, hyper, inputs, parameters, ten_steps
from zeta.parity.paths import through, watch
from zeta.parity.targets import Absent, Target, numpy_target, pure_steps, steps_of
from zeta.routing.by_name import route


class Tolerance(NamedTuple):
    """Bounds on relative Frobenius errors."""

    newton_schulz: float
    noise: float  # times the condition number, where that is more: rounding that the polynomial itself amplifies
    step: float  # after ten steps, relative to the distance that the parameter moved


# By dtype of Newton-Schulz's products. A coefficient wrong by 1 % is an error of 6.5e-2, by 0.1 % of 7e-3.
TOLERANCE = {
    "float64": Tolerance(1e-12, 0.0, 1e-12),  # 485-fold noise of 2**-53: measured up to 8e-13, on rank 1
    "float32": Tolerance(6e-5, 5e-7, 6e-5),  # measured 2e-7 to 5e-5; noise 2.8e-7, 4.7 roundings: MLX's CPU, rank 4
    "float16": Tolerance(6e-3, 5e-4, 4e-3),  # measured up to 3.3e-3; noise up to 2.9e-4
    "bfloat16": Tolerance(3e-2, 3.5e-3, 2e-2),  # measured 1.1e-2 to 2.2e-2; noise up to 2.5e-3
    "auto": Tolerance(3e-2, 3.5e-3, 2e-2),  # whatever a backend chooses for speed, it is never worse than bfloat16
}


def tolerance(target: Target) -> Tolerance:
    """By the dtype that the target's products have: for "auto" the one that the backend chooses here."""
    return TOLERANCE[target.chosen or target.dtype]


class Result(NamedTuple):
    library: str
    device: str
    dtype: str
    check: str  # "family: case"
    error: float
    bound: float
    paths: tuple[str, ...] = ()  # of `zeta.parity.paths.PATHS`, those that it went through

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    @property
    def family(self) -> str:
        """The check without its case; of a step with the optimizer's name: "step: Eta"."""
        head, _, case = self.check.partition(": ")
        return self.check.rpartition(" ")[0] if head == "step" or case.startswith("step ") else head


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
    """p(x), and the relative condition number of x -> p(x) against independent noise and a wrong norm."""
    u, s, vt = _svd(x.tobytes(), x.shape)
    norm = np.linalg.norm(s, axis=-1, keepdims=True)
    s = s / np.where(norm == 0, 1, norm)
    p, slope = s, np.ones_like(s)
    for a, b, c in coefficients:
        p, slope = a * p + b * p**3 + c * p**5, slope * (a + 3 * b * p**2 + 5 * c * p**4)
    size = np.where(norm == 0, np.inf, np.linalg.norm(p, axis=-1, keepdims=True))
    noise = np.sqrt(np.mean(slope**2, -1, keepdims=True) + np.sum((s * slope) ** 2, -1, keepdims=True))
    return (u * p[..., None, :]) @ vt, float((noise / size).max(initial=0))


@lru_cache(maxsize=512)  # all libraries are shown the same inputs
def _cached_oracle(data: bytes, shape: tuple[int, ...], coefficients: Coefficients) -> tuple[Array, float]:
    return _oracle(np.frombuffer(data).reshape(shape), coefficients)


@lru_cache(maxsize=256)  # and with one more than one set of coefficients
def _svd(data: bytes, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    x = np.frombuffer(data).reshape(shape)
    u, s, vt = np.linalg.svd(x / max(1e-300, float(np.abs(x).max(initial=0))), full_matrices=False)
    return u, s, vt


class Comparison(NamedTuple):
    """What one check got and should have got, in NumPy float64; a step's `origin` is where the parameter started."""

    check: str  # "family: case"
    got: Array
    want: Array
    rtol: float
    origin: Array = 0.0
    matrices: tuple[int, ...] | None = None  # a parameter's, of those stepped together: () for none


def run(target: Target | Absent, checks: "Sequence[Check] | None" = None) -> Iterator[Result]:
    """Every check's result, or those of some checks.

    Failed are also a check that raises, named with its error, the absence of what should be here, and a path that the
    target has and no check went through.
    """
    if isinstance(target, Absent):
        if target.expected:
            yield Result(target.library, target.device, "", f"device: {target.reason}", float("inf"), 0.0)
        return
    labels, missed = (target.library, target.device, target.dtype), set(target.paths)
    for check in CHECKS if checks is None else checks:
        try:
            with target.scope(), watch(target.products) as seen, np.errstate(over="ignore", invalid="ignore"):
                for name, got, want, rtol, origin, matrices in check(target):
                    paths = through(seen, matrices)
                    if matrices is None:
                        seen.clear()
                    missed -= set(paths)
                    yield Result(*labels, name, relative_error(got, want, origin), rtol, paths)
        except Exception as error:
            yield Result(*labels, f"{check.__name__}: {type(error).__name__}: {error}", float("inf"), 0.0)
    for path in () if checks else sorted(missed):
        yield Result(*labels, f"paths: no check went through {path}", float("inf"), 0.0, (path,))


def device(target: Target) -> Iterator[Comparison]:
    """The library must have computed where it was asked to."""
    x = target.newton_schulz(target.array(gaussian(SHAPES["wide"])), COEFFICIENTS["jordan"])
    used = target.used(x)
    yield Comparison(f"device: {used}", np.array(float(used == target.device)), np.array(1.0), 0.0)


def newton_schulz(target: Target) -> Iterator[Comparison]:
    for name, x in inputs(target):
        yield _spectral(target, f"newton-schulz: {name}", x, COEFFICIENTS["jordan"])


def coefficients(target: Target) -> Iterator[Comparison]:
    for name, steps, kind, x in coefficient_inputs(target):
        yield _spectral(target, f"coefficients: {name} {kind}", x, steps)


def core_itself(target: Target) -> Iterator[Comparison]:
    """`zeta.newton_schulz` and the rules on the arrays of a library that has a backend of its own."""
    if target.steps is None or "core" not in target.paths:
        return
    plain = replace(target, newton_schulz=core.newton_schulz, steps=None)
    for kind in ("square", "wide", "tall", "nx1", "stack", "empty stack"):
        yield _spectral(plain, f"core: newton-schulz {kind}", gaussian(SHAPES[kind]), COEFFICIENTS["jordan"])


def core_step(name: str) -> "Check":
    def check(target: Target) -> Iterator[Comparison]:
        if target.steps is None or "core" not in target.paths:
            return
        plain = replace(target, newton_schulz=core.newton_schulz, steps=None, paths=("core",), shapes={})
        for comparison in step(name)(plain):
            yield comparison._replace(check=f"core: {comparison.check.replace(':', '')}")

    check.__name__ = f"core: step {name}"
    return check


def invariance(target: Target) -> Iterator[Comparison]:
    """A stack is its matrices one by one, and the transpose's result is the result's transpose."""
    rtol, jordan = tolerance(target).newton_schulz, COEFFICIENTS["jordan"]
    shapes = {kind: (5, *SHAPES[kind]) for kind in ("wide", "tall", "1xn")}
    shapes |= {kind: (2, *SHAPES[kind]) for kind in ("long", "gram")}
    shapes |= {kind: shape if len(shape) > 2 else (2, *shape) for kind, shape in target.shapes.items()}
    for kind, shape in shapes.items():
        sizes = np.array([1, 2, 1 / 16, 8, 1])[np.arange(shape[0]) % 5, None, None]
        x = target.array(gaussian(shape) * sizes)
        got = target.numpy(target.newton_schulz(x, jordan))
        alone = np.stack([target.numpy(target.newton_schulz(x[i, :, :], jordan)) for i in range(shape[0])])
        yield Comparison(f"invariance: batched = one by one, {kind}", got, alone, rtol)
        transposed = target.numpy(target.newton_schulz(x.mT, jordan)).swapaxes(-2, -1)
        yield Comparison(f"invariance: transposed = not, {kind}", transposed, got, rtol)


def step(name: str) -> "Check":
    """Ten steps with given gradients by the library's class of this name; by the rule itself where it has none."""

    def check(target: Target) -> Iterator[Comparison]:
        shapes, rtol = parameters(target), tolerance(target).step
        params, grads, _ = ten_steps(shapes)
        after = steps_of(target)(name, params, grads, hyper(name), COEFFICIENTS["jordan"])
        for path, origin in params.items():
            want, matrices = oracle_step(name, path, shapes[path]), route(path, origin.shape).matrices
            yield Comparison(f"step: {name} {path}", after[path], want, rtol, origin, matrices)

    check.__name__ = f"step: {name}"
    return check


Check = Callable[[Target], Iterator[Comparison]]
CHECKS: list[Check] = [
    *(device, newton_schulz, coefficients, invariance),
    *map(step, COMPARED),
    *(core_itself, *map(core_step, COMPARED)),
]


@lru_cache
def oracle_step(name: str, path: str, shape: tuple[int, ...]) -> Array:
    """The parameter after the ten steps of an optimizer's rule on NumPy float64 around `spectral_polynomial`."""
    params, grads, _ = ten_steps({path: shape})
    return pure_steps(numpy_target("float64"), params, grads, hyper(name), spectral_polynomial, name)[path]


def _spectral(target: Target, check: str, x: Array, coefficients: Coefficients) -> Comparison:
    given = target.array(x)
    got = target.numpy(target.newton_schulz(given, coefficients))
    rounded = target.numpy(given)
    want, condition = _cached_oracle(rounded.tobytes(), rounded.shape, coefficients)
    floor, noise, _ = tolerance(target)
    large = min(x.shape[-2:]) >= forms.GRAM_ROWS and not forms.is_long(*x.shape[-2:])
    if floor == TOLERANCE["float32"].newton_schulz and coefficients != LONG and not large:
        noise = 0.0  # float32 needs it for large matrices in the direct form, and the eight steps of "auto", alone
    return Comparison(check, got, want, max(floor, noise * condition))
