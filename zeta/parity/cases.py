"""The inputs of the parity suite: shapes and spectra that break careless kernels, and ten steps of gradients."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from zlib import crc32

import numpy as np

from zeta.coefficients import LONG
from zeta.core import COEFFICIENTS, Array, Coefficients, Hyper
from zeta.parity.targets import Arrays, Target

SHAPES = {  # aspect ratios below and above 1.5; of all only "large" has the 128 rows that the Gram form takes as well
    "square": (64, 64),
    "wide": (48, 80),
    "tall": (80, 48),
    "1xn": (1, 33),
    "nx1": (33, 1),
    "stack": (3, 24, 40),
    "empty stack": (0, 8, 12),
    "long": (64, 256),
    "tall long": (2, 256, 64),
    "gram": (128, 192),
    "tall gram": (192, 128),
    "large": (128, 512),
}
GPU_SHAPES = {"large square": (1024, 1024), "large wide": (768, 3072)}  # what kernels are made for


def gaussian(shape: tuple[int, ...]) -> Array:
    """Normal numbers on a grid of 1/64: exact in every dtype, so one oracle serves all."""
    return np.clip(np.round(_rng(shape).standard_normal(shape) * 64), -255, 255) / 64


def low_rank(shape: tuple[int, ...], rank: int = 4) -> Array:
    """Matrices (..., rows, cols) of at most this rank, in small integers."""
    rng = _rng(shape)
    return (rng.integers(-3, 4, (*shape[:-1], rank)) @ rng.integers(-3, 4, (*shape[:-2], rank, shape[-1]))) * 1.0


def conditioned(shape: tuple[int, ...], condition: float) -> Array:
    """Singular values falling geometrically from 1 to 1 / condition."""
    return _with_values(shape, lambda n: condition ** -np.linspace(0, 1, n))


def spiked(shape: tuple[int, ...], small: float = 1e-3) -> Array:
    """One singular value of 1, all others `small`: what a Gram matrix of all steps, without a restart, loses."""
    return _with_values(shape, lambda n: np.where(np.arange(n) == 0, 1, small))


def _with_values(shape: tuple[int, ...], values: Callable[[int], Array]) -> Array:
    u, _, vt = np.linalg.svd(_rng(shape).standard_normal(shape), full_matrices=False)
    return (u * values(vt.shape[-2])) @ vt


def inputs(target: Target) -> Iterator[tuple[str, Array]]:
    shapes = SHAPES | (GPU_SHAPES if target.device != "cpu" else {}) | target.shapes
    yield from ((f"gaussian {kind}", gaussian(shape)) for kind, shape in shapes.items())
    low = ("square", "tall", "long", "large", *target.shapes)
    yield from ((f"rank 4 {kind}", low_rank(shapes[kind])) for kind in low)
    yield from ((f"condition {k:.0e}", conditioned(shapes["wide"], k)) for k in (1e3, 1e6))
    yield "condition 1e+06 long", conditioned(shapes["tall long"], 1e6)
    yield from ((f"one large value {kind}", spiked(shapes[kind])) for kind in ("gram", "tall gram"))
    down, up = (2.0**-10, 2.0**12) if target.dtype == "float16" else (2.0**-100, 2.0**100)  # float16 ends at 65504
    yield f"norm {down:.0e}", gaussian(shapes["wide"]) * down
    yield f"norm {up:.0e}", gaussian(shapes["tall"]) * up
    yield f"norm {down:.0e} 1xn", gaussian(shapes["1xn"]) * down
    yield "zeros", np.zeros(shapes["wide"])
    yield "zeros in a stack", gaussian((3, 24, 40)) * np.array([1, 0, 1])[:, None, None]


# Eight steps are what "auto" takes of the longest, and the Gram form of them needs its restarts even in float64.
ALL_COEFFICIENTS: dict[str, Coefficients] = {**COEFFICIENTS, "auto": LONG}


def coefficient_inputs(target: Target) -> Iterator[tuple[str, Coefficients, str, Array]]:
    """(name, coefficients, kind, x): all coefficients on every path, and the longest on what needs its restarts."""
    shapes = SHAPES | target.shapes
    for name, steps in ALL_COEFFICIENTS.items():
        for kind in ("square", "tall", "1xn", "gram", *target.shapes):
            yield name, steps, kind, gaussian(shapes[kind])
    yield "auto", LONG, "one large value gram", spiked(shapes["gram"])


PARAMETERS: dict[str, tuple[int, ...]] = {
    "layers.0.wide.weight": (48, 80),
    "layers.0.tall.weight": (96, 48),
    "layers.1.wide.weight": (48, 80),  # goes in one batch with the first
    "layers.0.long.weight": (32, 128),
    "layers.0.conv.weight": (16, 8, 3, 3),
    "layers.0.experts.up.weight": (4, 24, 40),
    "layers.0.norm.weight": (64,),
    "layers.0.wide.bias": (48,),
    "embed_tokens.weight": (50, 16),
}


FURTHER: dict[str, tuple[int, ...]] = {  # for the parity suite alone
    "layers.0.row.weight": (1, 33),
    "layers.0.column.weight": (33, 1),
    "layers.1.experts.up.weight": (2, 24, 40),  # a stack in one batch with a stack
}


def gradient_steps(shape: tuple[int, ...]) -> Sequence[int]:
    """In which of the ten steps a parameter has a gradient: in few where a step takes long."""
    size = prod(shape)
    return range(10) if size < 10_000 else (2, 7) if size < 200_000 else (2,)


def parameters(target: Target) -> dict[str, tuple[int, ...]]:
    """Parameters whose steps take every path of the target."""
    large = target.shapes | ({"gram": SHAPES["gram"]} if "gram" in target.paths else {})
    names = {kind: f"experts.{kind}" if len(shape) > 2 else kind for kind, shape in large.items()}
    return PARAMETERS | FURTHER | {f"layers.0.{names[kind]}.weight": shape for kind, shape in large.items()}


def hyper(name: str = "Zeta") -> Hyper:
    """An optimizer's settings in the ten steps.

    AdaMuon divides u by the root of an average of u^2, so that its first step is sign(u): with an eps of 1e-8 rounding
    would decide on the signs of entries near zero (an error of 1e-3 in u became 4e-3 of the step, by luck). An eps of
    that root's usual size, 1e-2, makes u / (root + eps) smooth there, and the step errs as u does.
    """
    return Hyper(lr=1e-2, eps=1e-2) if name == "AdaMuon" else Hyper(lr=1e-2)


def ten_steps(shapes: dict[str, tuple[int, ...]] = PARAMETERS) -> tuple[Arrays, list[Arrays], Hyper]:
    """Parameters and their next ten gradients. Large parameters have few of them."""
    params, grads = {}, [dict[str, Array]() for _ in range(10)]
    for name, shape in shapes.items():
        params[name], given = trajectory(name, shape)
        for t, g in given.items():
            grads[t][name] = g
    return params, grads, hyper()


@lru_cache
def trajectory(name: str, shape: tuple[int, ...]) -> tuple[Array, dict[int, Array]]:
    """A parameter and {step: gradient}: a drift, noise, and scales that differ by row and column.

    Not so where the Gram form serves: on such spectra the restart shows in some precisions and not in others, and what
    it is worth is tested elsewhere, where it always does.
    No average of the gradients comes near zero, where two libraries would round it to different signs (AdaMuon takes
    them; Eta does, of a single row).
    """
    rng = np.random.default_rng([*map(int, shape), crc32(name.encode())])
    param = _float32(rng.standard_normal(shape) / 8)
    rows = np.exp(rng.standard_normal((shape[0], *[1] * (len(shape) - 1))))
    scale = 1e-2 * rows * np.exp(rng.standard_normal(shape[-1:])) if shape != SHAPES["gram"] else 1e-2
    drift = rng.standard_normal(shape)
    drift = np.copysign(np.maximum(np.abs(drift), 0.1), drift)
    steps = gradient_steps(shape)
    noise = {t: rng.standard_normal(shape) for t in steps}
    steady = nearest_to_zero([drift + noise[t] for t in steps]) < 1e-2
    grads = {t: _float32(scale * np.where(steady, drift, drift + noise[t])) for t in steps}
    if "experts" in name:
        for t in steps[5:]:
            grads[t][1] = 0  # an expert that no longer sees a token
    return param, grads


def nearest_to_zero(grads: list[Array], beta: float = Hyper.betas[0]) -> Array:
    """The least size of the gradients' average, with Nesterov's step and without, over the steps taken so far."""
    m, least = 0.0 * grads[0], np.full(grads[0].shape, np.inf)
    for t, g in enumerate(grads, start=1):
        m = beta * m + (1 - beta) * g
        for average in (m, beta * m + (1 - beta) * g):
            least = np.minimum(least, np.abs(average) / (1 - beta**t))
    return least


def _float32(x: Array) -> Array:
    return x.astype("float32").astype("float64")


def _rng(shape: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng([2606, 14187, *shape])
