"""Newton-Schulz for MLX: fewer and larger products, in half precision on a GPU, of blocks on a CPU."""

from itertools import pairwise

import mlx.core as mx

from zeta import core
from zeta import newton_schulz_forms as forms
from zeta.coefficients import Steps
from zeta.core import COEFFICIENTS

# Rows of a block of a symmetric product on the CPU: smaller ones cost more than they save (MLX 0.32, x86-64, AVX2).
BLOCK = 64


def newton_schulz(x: mx.array, coefficients: Steps = COEFFICIENTS["jordan"], dtype: mx.Dtype | None = None) -> mx.array:
    """x (..., rows, cols) with its singular values moved towards one; see `zeta.newton_schulz`.

    Products run in `dtype`, None for `working_dtype`; the norm is taken in float32 or better. The result has x's
    dtype, and the errors given for `zeta.backends.torch.newton_schulz`.
    """
    if not mx.issubdtype(x.dtype, mx.floating):
        raise TypeError(f"x is {x.dtype}, but must be a floating-point array")
    core.check_matrix(x)
    if 0 in x.shape:
        return x
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, coefficients, dtype).mT
    working = dtype or working_dtype(x)
    unit = core.normalize(x.astype(mx.result_type(x, mx.array(0.0)))).reshape(-1, *x.shape[-2:])
    stack: mx.array = unit * forms.size(coefficients, *x.shape[-2:])
    stack = forms.iterate(stack, coefficients, lambda x: x.astype(working), symmetric, multiply)
    return stack.reshape(x.shape).astype(x.dtype)


def working_dtype(x: mx.array) -> mx.Dtype:
    """The dtype of the products: float16 on a GPU (entries lie in [-1, 1] by then), else x's own or float32."""
    if mx.default_device() == mx.gpu:
        return mx.float16
    return mx.result_type(x, mx.array(0.0))


def symmetric(
    a: mx.array, b: mx.array, c: mx.array | None = None, beta: float = 0.0, alpha: float = 1.0, diagonal: float = 0.0
) -> mx.array:
    """alpha a b + beta c + diagonal I (batch, n, n), known to be symmetric: a CPU multiplies only the lower blocks."""
    n = a.shape[-2]
    y = multiply(a, b, c, beta, alpha) if mx.default_device() == mx.gpu else _by_blocks(a, b, c, beta, alpha)
    return y + diagonal * mx.eye(n, dtype=y.dtype) if diagonal else y


def _by_blocks(a: mx.array, b: mx.array, c: mx.array | None, beta: float, alpha: float) -> mx.array:
    n, b = a.shape[-2], mx.contiguous(b)
    blocks = max(1, n // BLOCK)
    y = mx.zeros((len(a), n, n), a.dtype)
    for start, end in pairwise(n * i // blocks for i in range(blocks + 1)):
        below = None if c is None else c[:, start:end, :end]
        row = multiply(a[:, start:end], b[:, :, :end], below, beta, alpha)
        y[:, start:end, :end] = row  # in place, as nothing else holds y
        y[:, :start, start:end] = row[:, :, :start].mT
    return y


def multiply(a: mx.array, b: mx.array, c: mx.array | None = None, beta: float = 0.0, alpha: float = 1.0) -> mx.array:
    """alpha a b + beta c for batches of matrices."""
    if c is None and alpha == 1:
        return a @ b
    if a.dtype == mx.float64:  # addmm takes its factors in float32 (MLX 0.32)
        return alpha * (a @ b) + (0.0 if c is None else beta * c)
    if c is None:
        return mx.addmm(mx.array(0, a.dtype), a, b, alpha=alpha)  # one rounding
    return mx.addmm(c, a, b, alpha=alpha, beta=beta)
