"""Newton-Schulz for torch: the forms of `zeta.newton_schulz_forms` on products that fit the device."""

from itertools import pairwise
from math import inf
from typing import cast

import torch
from torch import Tensor

from zeta import newton_schulz_forms as forms
from zeta.coefficients import Steps
from zeta.core import COEFFICIENTS, check_matrix

from .kernel_gate import kernel_rows

BLOCK = 256  # rows of a block of a symmetric product; smaller blocks cost more in launches than they save
# Asked for here, once: torch.compile, torch 2.13, cannot trace the question.
CPU_HAS_BFLOAT16 = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
PADDING = 64  # entries between rows of a matrix of blocks: rows 2048 bytes apart fall into the same places of a cache
CACHE_BYTES = 1 << 20  # float32 bytes above which a CPU takes a stack in parts


@torch.no_grad()
def newton_schulz(x: Tensor, coefficients: Steps = COEFFICIENTS["jordan"], dtype: torch.dtype | None = None) -> Tensor:
    """x (..., rows, cols) with its singular values moved towards one; see `zeta.newton_schulz`.

    Products run in `dtype`, None for `working_dtype`; the norm is taken in float32 or better. The result has x's dtype.
    No gradient is recorded: `zeta.newton_schulz` is the one to differentiate.
    Relative error against float64, on Gaussian and on rank-4 input: float32 4e-6 and 7e-5, float16 2e-3 and 7e-2,
    bfloat16 2e-2 and 6e-1 (5 `jordan` steps multiply the rounding of the smallest directions by 485).
    """
    check_matrix(x)
    return newton_schulz_(x.clone(memory_format=torch.contiguous_format), coefficients, dtype)


def newton_schulz_(x: Tensor, coefficients: Steps, dtype: torch.dtype | None = None) -> Tensor:
    """x (contiguous), overwritten by `newton_schulz(x)`."""
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, but must be a floating-point tensor")
    if x.numel():
        working = dtype or working_dtype(x)
        apart = working == torch.bfloat16 and on_cpu(x)
        size = forms.size(coefficients, *x.shape[-2:], apart=apart)
        stack = x.view(-1, *x.shape[-2:])
        for part in torch.tensor_split(stack, _chunks(stack)):
            part = part[0] if in_place(x) and len(part) == 1 else part  # whose products are written in place
            unit = normalize_(part.to(torch.promote_types(x.dtype, torch.float32)), size)
            wide, part = (unit.mT, part.mT) if x.shape[-2] > x.shape[-1] else (unit, part)
            with torch.autocast(x.device.type, enabled=False):  # it would round the products silently
                part.copy_(forms.iterate(wide, coefficients, lambda x: x.to(working), symmetric, multiply, apart))
    return x


def normalize_(x: Tensor, size: float = 1.0) -> Tensor:
    """x, overwritten by `size * zeta.core.normalize(x)`, in five passes."""
    x.div_(nonzero_(largest(x)))
    return x.div_(nonzero_(matrix_norm(x)).div_(size))


def largest(x: Tensor, axes: tuple[int, ...] = (-2, -1)) -> Tensor:
    """The largest size of an entry along these axes, kept: on a CPU torch 2.13's vector_norm takes ten times as long,
    on CUDA it is one kernel of four."""
    if x.is_cuda:
        return cast(Tensor, torch.linalg.vector_norm(x, inf, axes, keepdim=True))
    return torch.maximum(x.amax(axes, keepdim=True), x.amin(axes, keepdim=True).neg_())


def nonzero_(x: Tensor) -> Tensor:
    """x (>= 0) to divide by, in one kernel: no less than the smallest normal number, by which zero stays zero."""
    return x.clamp_min_(torch.finfo(x.dtype).tiny)


def matrix_norm(x: Tensor) -> Tensor:
    """The Frobenius norm (..., 1, 1) of each matrix of x (..., rows, cols): no copy of x, no host read.

    Rows first: the norm of 1024x4096 float32 entries at once is 8e-5 off (torch 2.13 on CPU), this 1e-7.
    """
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=-2, keepdim=True))


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: float64 for float64; on a CPU bfloat16 if it multiplies that natively, else float32;
    float32 on MPS (see `multiply`), as fast there but on an M5; elsewhere float16.

    After the normalisation all entries lie in [-1, 1], where float16 is as safe as bfloat16 and eight times as exact.
    """
    if x.dtype == torch.float64:
        return x.dtype
    if x.device.type == "cpu":
        return torch.bfloat16 if CPU_HAS_BFLOAT16 else torch.float32
    return torch.float32 if x.device.type == "mps" else torch.float16


def on_cpu(x: Tensor) -> bool:
    """Whether paths are a CPU's: matrices one by one, by blocks, bfloat16 in the Gram form that keeps numbers apart."""
    return x.device.type == "cpu"


def in_place(x: Tensor) -> bool:
    """Whether products are written into views: torch.compile, torch 2.13, takes no `out` with gaps between rows."""
    return on_cpu(x) and not torch.compiler.is_compiling()


def _chunks(stack: Tensor) -> int:
    """How many parts of the stack are taken one after another: on a CPU small ones up to 4, for its caches, matrices
    of 2 BLOCK rows one by one; elsewhere one."""
    if not on_cpu(stack):
        return 1
    if min(stack.shape[-2:]) >= 2 * BLOCK:
        return len(stack)
    return max(1, min(4 * stack.numel() // CACHE_BYTES, len(stack), 4))


def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    diagonal: float = 0.0,
    d: Tensor | None = None,
    delta: float = 0.0,
) -> Tensor:
    """alpha a b + beta c + delta d + diagonal I (..., n, n), known to be symmetric.

    Large ones are multiplied in their lower half alone: on a CPU by blocks, from 2 BLOCK rows; on CUDA by tiles of a
    Triton kernel, in half precision from `kernel_rows`.
    """
    n = a.shape[-2]
    if not on_cpu(a):
        if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and n >= kernel_rows(a.device):
            from .symmetric_kernel import symmetric as kernel

            return kernel(a, b, c, beta, alpha, diagonal)
        y = multiply(a, b, c, beta, alpha)
        if diagonal:
            y.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return y
    blocks = max(1, n // BLOCK) if a.ndim == 2 else 1
    ends = [n * i // blocks for i in range(blocks + 1)]
    y = a.new_empty(*a.shape[:-1], n + (PADDING if blocks > 1 else 0))[..., :n]
    if diagonal or d is not None:
        beta, c = start_with(y, c, beta, d, delta, diagonal), y
    if blocks == 1:
        return multiply(a, b, c, beta, alpha, y if in_place(y) else None)
    squares = [slice(*pair) for pair in pairwise(ends)]
    for k, rows in enumerate(squares):
        out = y[rows, : rows.stop]
        given = out if c is y else None if c is None else c[rows, : rows.stop]
        multiply(a[rows], b[:, : rows.stop], given, beta, alpha, out)
        for cols in squares[:k]:
            y[cols, rows] = y[rows, cols].mT
    return y


def start_with(y: Tensor, c: Tensor | None, beta: float, d: Tensor | None, delta: float, diagonal: float) -> float:
    """beta, and y overwritten so that beta y = beta c + delta d + diagonal I: a product added to it rounds once."""
    if c is None:
        beta, y = 1.0, y.zero_()
    elif d is None:
        beta, y = 1.0, torch.mul(c, beta, out=y)
    else:
        (delta, d), (beta, c) = sorted([(delta, d), (beta, c)], key=lambda term: abs(term[0]))
        y = torch.add(c, d, alpha=delta / beta, out=y)
    y.diagonal(dim1=-2, dim2=-1).add_(diagonal / beta)
    return beta


def multiply(
    a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """alpha a b + beta c for matrices or batches of them, written to `out` if given."""
    if out is None and in_place(a) and a.ndim == 2 and a.shape[-2] == a.shape[-1]:
        # By columns where b is, so that it is copied back as it lies. Into a batch that lies so torch 2.13 multiplies
        # bfloat16 a thousand times as slowly as by rows.
        out = torch.empty_like(b)
    if c is None and alpha == 1:
        return torch.matmul(a, b, out=out)
    if rounds_scalars(a):
        wide = multiply(a.float(), b.float(), None if c is None else c.float(), beta, alpha)
        return wide.to(a.dtype)
    if c is None:
        new = a.new_empty if a.is_cuda else a.new_zeros  # times 0 it is not read, and zeros are a kernel more
        c, beta = new((1,) * a.ndim), 0.0
    add = torch.addmm if a.ndim == 2 else torch.baddbmm
    return add(c, a, b, beta=beta, alpha=alpha, out=out)


def rounds_scalars(x: Tensor) -> bool:
    """Whether baddbmm rounds alpha, beta and the product they multiply to x's dtype: for half on MPS (torch 2.13)."""
    return x.device.type == "mps" and x.dtype in (torch.float16, torch.bfloat16)


def stack(arrays: list[Tensor], shapes: list[tuple[int, ...]], out: Tensor | None = None) -> Tensor:
    """(count, rows, cols) of all arrays together, each seen as (count, rows, cols)."""
    return torch.cat([a.reshape(shape) for a, shape in zip(arrays, shapes, strict=True)], out=out)


def unstack(stacked: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The stack in pieces of the shapes of `like`."""
    size = stacked[0].numel()
    parts = torch.split(stacked, [a.numel() // size for a in like])
    return [part.reshape(a.shape) for part, a in zip(parts, like, strict=True)]
