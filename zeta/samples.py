"""The inputs of the parity suite: shapes and spectra that break careless kernels, and ten steps of gradients."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from zeta.core import Array, Hyper
from zeta.machine import Arrays, Target

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
    u, _, vt = np.linalg.svd(_rng(shape).standard_normal(shape), full_matrices=False)
    return (u * condition ** -np.linspace(0, 1, vt.shape[-2])) @ vt


def inputs(target: Target) -> Iterator[tuple[str, Array]]:
    shapes = SHAPES | (GPU_SHAPES if target.device != "cpu" else {})
    yield from ((f"gaussian {kind}", gaussian(shape)) for kind, shape in shapes.items())
    yield from ((f"rank 4 {kind}", low_rank(shapes[kind])) for kind in ("square", "tall", "long", "large"))
    yield from ((f"condition {k:.0e}", conditioned(shapes["wide"], k)) for k in (1e3, 1e6))
    yield "condition 1e+06 long", conditioned(shapes["tall long"], 1e6)
    down, up = (2.0**-10, 2.0**12) if target.dtype == "float16" else (2.0**-100, 2.0**100)  # float16 ends at 65504
    yield f"norm {down:.0e}", gaussian(shapes["wide"]) * down
    yield f"norm {up:.0e}", gaussian(shapes["tall"]) * up
    yield "zeros", np.zeros(shapes["wide"])
    yield "zeros in a stack", gaussian((3, 24, 40)) * np.array([1, 0, 1])[:, None, None]


PARAMETERS: dict[str, tuple[int, ...]] = {
    "layers.0.wide.weight": (48, 80),
    "layers.0.tall.weight": (80, 48),
    "layers.1.wide.weight": (48, 80),  # goes in one batch with the first
    "layers.0.long.weight": (64, 256),
    "layers.0.conv.weight": (16, 8, 3, 3),
    "layers.0.experts.up.weight": (4, 24, 40),
    "layers.0.norm.weight": (64,),
    "layers.0.wide.bias": (48,),
    "embed_tokens.weight": (50, 16),
}


@lru_cache
def ten_steps() -> tuple[Arrays, list[Arrays], Hyper]:
    """Parameters and their next ten gradients: a drift, noise, and scales that differ by row and column."""
    params, grads = {}, [dict[str, Array]() for _ in range(10)]
    for name, shape in PARAMETERS.items():
        rng = _rng(shape)
        params[name] = rng.standard_normal(shape).astype("float32").astype("float64") / 8
        rows, cols = (
            np.exp(rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))),
            np.exp(rng.standard_normal(shape[-1:])),
        )
        drift = rng.standard_normal(shape)
        for t, grad in enumerate(grads):
            g = 1e-2 * rows * cols * (drift + rng.standard_normal(shape))
            if "experts" in name and t > 4:
                g[1] = 0  # an expert that no longer sees a token
            grad[name] = g.astype("float32").astype("float64")
    return params, grads, Hyper(lr=1e-2)


def _rng(shape: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng([2606, 14187, *shape])
