"""The symmetric product of Newton-Schulz on CUDA: only tiles on and below the diagonal, each stored twice.

Imported only where a kernel is to run.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # runs the kernels on a CPU, to test them
CONFIGS = [  # a small space: the tuning of one (n, k, dtype) takes well under a second and is kept on disk
    triton.Config({"TILE": 128, "DEPTH": 64}, num_warps=8, num_stages=3),
    triton.Config({"TILE": 128, "DEPTH": 64}, num_warps=4, num_stages=3),
    triton.Config({"TILE": 128, "DEPTH": 32}, num_warps=4, num_stages=4),
    triton.Config({"TILE": 64, "DEPTH": 64}, num_warps=4, num_stages=4),
]


def symmetric(
    a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0, diagonal: float = 0.0
) -> Tensor:
    """alpha a b + beta c + diagonal I (batch, n, n), known to be symmetric, summed in float32 and rounded once.

    a (batch, n, k), b (batch, k, n), c (batch, n, n), any strides, n and k need not divide by the tile.
    """
    batch, n, k = a.shape
    y = torch.empty(batch, n, n, dtype=a.dtype, device=a.device)
    if not y.numel():
        return y

    def grid(config: dict[str, int]) -> tuple[int]:  # its other axes end at 65535, and a batch may be larger
        tiles = triton.cdiv(n, config["TILE"])
        return (batch * (tiles * (tiles + 1) // 2),)

    given = y if c is None else c
    strides = (*a.stride(), *b.stride(), *given.stride(), *y.stride())
    _symmetric[grid](a, b, given, y, n, k, *strides, alpha, beta, diagonal, HAS_C=c is not None)
    return y


@triton.autotune(CONFIGS[-1:] if INTERPRETED else CONFIGS, key=["n", "k"], cache_results=True)
@triton.heuristics({"WHOLE": lambda x: x["n"] % x["TILE"] == 0 and x["k"] % x["DEPTH"] == 0})  # needs no masks
@triton.jit
def _symmetric(
    a, b, c, y, n, k,
    a_batch, a_row, a_col, b_batch, b_row, b_col, c_batch, c_row, c_col, y_batch, y_row, y_col,
    alpha, beta, diagonal,
    HAS_C: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # A matrix's t-th program has tile (i, j), j <= i, of the lower triangle by rows: i the largest with i (i+1)/2 <= t.
    across = tl.cdiv(n, TILE)
    tiles = across * (across + 1) // 2
    t = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root was rounded up,
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)  # or down
    j = t - i * (i + 1) // 2

    which = (tl.program_id(0) // tiles).to(tl.int64)  # 64-bit offsets: a batch may hold more than 2^31 entries
    a += which * a_batch
    b += which * b_batch
    c += which * c_batch
    y += which * y_batch
    rows = i * TILE + tl.arange(0, TILE)
    cols = j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    a_tile = a + rows[:, None].to(tl.int64) * a_row + depth[None, :] * a_col
    b_tile = b + depth[:, None] * b_row + cols[None, :].to(tl.int64) * b_col
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        if WHOLE:
            left, right = tl.load(a_tile), tl.load(b_tile)
        else:
            inside = depth < k - start
            left = tl.load(a_tile, mask=(rows[:, None] < n) & inside[None, :], other=0.0)
            right = tl.load(b_tile, mask=inside[:, None] & (cols[None, :] < n), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        a_tile += DEPTH * a_col
        b_tile += DEPTH * b_row

    row, col = rows[:, None].to(tl.int64), cols[None, :].to(tl.int64)
    lower = (row < n) & (row >= col)
    total *= alpha
    if HAS_C:
        old = tl.load(c + row * c_row + col * c_col, mask=lower, other=0.0)
        total += beta * old.to(tl.float32)
    total += tl.where(row == col, diagonal, 0.0)

    value = total.to(y.dtype.element_ty)
    tl.store(y + row * y_row + col * y_col, value, mask=lower)
    # Turned first, so that neighbours are stored together; no entry is stored twice, so the order of stores is free.
    row, col = cols[:, None].to(tl.int64), rows[None, :].to(tl.int64)
    tl.store(y + row * y_row + col * y_col, tl.trans(value), mask=(col < n) & (col > row))
