"""The products and forms under the fused Newton-Schulz, each against float64."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from zeta import COEFFICIENTS, core
from zeta import newton_schulz_forms as forms

SIZES = [(1, 64, 64), (2, 65, 70), (3, 130, 33), (2, 512, 96), (1, 600, 40)]  # (batch, n, k): both sides of every block


def product(a, b, c=None, beta=0.0, alpha=1.0, diagonal=0.0, d=None, delta=0.0):
    """What `symmetric` and `multiply` of every backend stand for, in NumPy."""
    y = alpha * (a @ b) + (0 if c is None else beta * c) + (0 if d is None else delta * d)
    return y + diagonal * np.eye(y.shape[-2]) if diagonal else y


def operands(batch, n, k):
    rng = np.random.default_rng(n)
    x, c = rng.standard_normal((batch, n, k)), rng.standard_normal((batch, n, n))
    return x, c + c.mT


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def torch_symmetric(x, c, dtype):
    torch = pytest.importorskip("torch")
    from zeta.backends.torch import orthogonalize as backend

    x, c = (torch.tensor(array, dtype=getattr(torch, dtype)) for array in (x, c))
    return backend.symmetric(x, x.mT, c, 0.5, 2.0, 1.5).double().numpy()


def mlx_symmetric(x, c, dtype):
    mx = pytest.importorskip("mlx.core")
    from zeta.backends.mlx import orthogonalize as backend

    x, c = (mx.array(array.astype(np.float32)).astype(getattr(mx, dtype)) for array in (x, c))
    return np.array(backend.symmetric(x, x.mT, c, 0.5, 2.0, 1.5).astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 6e-3)])
@pytest.mark.parametrize("symmetric", [torch_symmetric, mlx_symmetric])
def test_symmetric_is_the_product(symmetric, dtype, bound, size):
    x, c = operands(*size)
    got = symmetric(x, c, dtype)
    assert error(got, product(x, x.mT, c, 0.5, 2.0, 1.5)) < bound
    assert error(got, product(x, x.mT, c, 0.5, 2.0 * 1.01, 1.5)) > bound  # a coefficient off by 1 % would be seen


@pytest.mark.parametrize("n", [64, 512, 600])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_a_product_on_a_cpu_begins_with_two_addends_and_a_diagonal(dtype, bound, n):
    torch = pytest.importorskip("torch")
    from zeta.backends.torch import orthogonalize as backend

    (x, c), (_, d) = operands(1, n, 96), operands(1, n + 1, 8)
    x, c, d = x[0], c[0], d[0, :n, :n]
    xt, ct, dt = (torch.tensor(array, dtype=getattr(torch, dtype)) for array in (x, c, d))
    for beta, delta in [(0.5, 3.0), (3.0, 0.5), (0.0, 2.0)]:
        got = backend.symmetric(xt, xt.mT, ct, beta, 2.0, 1.5, dt, delta).double().numpy()
        assert error(got, product(x, x.mT, c, beta, 2.0, 1.5, d, delta)) < bound
        assert error(got, product(x, x.mT, c, beta, 2.0, 1.5, d, delta + 1)) > bound
    got = backend.symmetric(xt, xt.mT, diagonal=-40.0).double().numpy()  # rounded once, after the subtraction
    assert error(got, product(x, x.mT, diagonal=-40.0)) < bound


def test_a_batch_is_written_by_rows_however_its_factor_lies():
    """Into one by columns torch 2.13 multiplies bfloat16 a thousand times as slowly."""
    torch = pytest.importorskip("torch")
    from zeta.backends.torch import orthogonalize as backend

    gram, x = torch.randn(3, 16, 16).bfloat16(), torch.randn(3, 24, 16).bfloat16().mT
    for c in (None, x):
        assert backend.multiply(gram, x, c, 2.0, 3.0).is_contiguous()
        assert backend.multiply(gram[0], x[0], c if c is None else c[0], 2.0, 3.0).mT.is_contiguous()


@pytest.mark.parametrize("shape", [(512, 2048), (256, 2048), (128, 256)])
@pytest.mark.parametrize("kind", ["gaussian", "rank 4"])
def test_in_bfloat16_the_gram_form_is_as_exact_as_the_plain_iteration(kind, shape):
    """By `gram`, the control, it is less so on Gaussian matrices."""
    torch = pytest.importorskip("torch")
    from zeta.backends.torch import orthogonalize as backend

    steps, rng = COEFFICIENTS["jordan"], np.random.default_rng(0)
    x = rng.standard_normal(shape)
    if kind == "rank 4":
        x = rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1]))
    want = core.newton_schulz(x)
    unit = torch.tensor(x / np.linalg.norm(x))

    def off(form, size=1.0):
        y = form((size * unit).bfloat16(), steps, backend.symmetric, backend.multiply)
        return error(y.double().numpy(), want)

    plain = core.newton_schulz(torch.tensor(x).bfloat16(), steps)
    apart = off(forms.gram_apart)
    assert apart <= 1.05 * error(plain.double().numpy(), want)
    if kind == "gaussian":
        assert off(forms.gram, forms.gram_steps(steps)[0]) > 1.2 * apart


def test_torch_records_no_gradient_rather_than_a_wrong_one():
    torch = pytest.importorskip("torch")
    from zeta.backends.torch import newton_schulz

    x = torch.randn(8, 16, requires_grad=True)
    assert not newton_schulz(x).requires_grad and not newton_schulz(x * 1.0).requires_grad


def test_norms_of_large_matrices_are_exact_to_rounding():
    """Sums of millions of float32 terms: one long sum loses 8e-5 in torch and 2e-3 in MLX at this size."""
    torch, mx = pytest.importorskip("torch"), pytest.importorskip("mlx.core")
    from zeta.backends.torch.orthogonalize import matrix_norm

    x = np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32)
    want = np.linalg.norm(x.astype(np.float64))
    for got in (core.frobenius(x), core.frobenius(mx.array(x)), matrix_norm(torch.tensor(x))):
        assert float(got.item()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(2, 32, 48), (1, 24, 96)])
def test_gram_and_direct_form_agree_in_exact_arithmetic(name, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    x /= np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    steps = COEFFICIENTS[name]
    direct = forms.direct(x * forms.direct_steps(steps)[0], steps, product, product)
    gram = forms.gram(x * forms.gram_steps(steps)[0], steps, product, product)
    assert error(gram, direct) < 1e-11
    assert error(forms.gram_apart(x, steps, product, product), direct) < 1e-11


def test_restarts_keep_every_run_of_steps_below_the_slope():
    for name, coefficients in COEFFICIENTS.items():
        runs = list(forms.segments(coefficients))
        assert tuple(step for run in runs for step in run) == coefficients
        assert all(len(run) == 1 or np.prod([a for a, _, _ in run]) <= forms.RESTART_SLOPE for run in runs)
        assert len(runs) == 2, name
    assert [len(run) for run in forms.segments(COEFFICIENTS["jordan"])] == [3, 2]


def test_without_a_restart_rank_one_is_lost(monkeypatch):
    """The control of the restart: float32, five steps on one Gram matrix."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 128, 1)) @ rng.standard_normal((1, 1, 512))).astype(np.float32)
    x *= forms.size(COEFFICIENTS["jordan"], 128, 512) / np.linalg.norm(x)

    def gram(array):
        return forms.gram(array, COEFFICIENTS["jordan"], single, single)

    def single(*args, **kwargs):
        return product(*args, **kwargs).astype(np.float32)

    want = forms.gram(x.astype(np.float64), COEFFICIENTS["jordan"], product, product)
    with_restart = error(gram(x), want)
    monkeypatch.setattr(forms, "RESTART_SLOPE", float("inf"))
    assert error(gram(x), want) > 2 * with_restart


KERNEL = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from test_forms import operands, product, error
from zeta.backends.torch.symmetric_kernel import symmetric
for size in [(1, 64, 64), (2, 65, 70), (3, 128, 96), (2, 130, 33)]:
    for dtype, bound in [(torch.float32, 1e-6), (torch.float16, 1e-3)]:  # its interpreter has no bfloat16 products
        x, c = operands(*size)
        want = product(x, x.mT, c, 0.5, 2.0, 1.5)
        xt, ct = torch.tensor(x, dtype=dtype), torch.tensor(c, dtype=dtype)
        spread = torch.zeros(size[0], size[1], 2 * size[2], dtype=dtype)[:, :, ::2].copy_(xt)  # every other column
        turned = xt.mT.contiguous().mT  # stored by columns
        for left in (xt, spread, turned):
            y = symmetric(left, left.mT, ct.mT, 0.5, 2.0, 1.5)
            assert torch.equal(y, y.mT)
            assert error(y.double().numpy(), want) < bound, (size, dtype)
        wrong = symmetric(xt, xt.mT, ct.mT, 0.5, 2.0 * 1.01, 1.5)
        assert error(wrong.double().numpy(), want) > bound, "the control was not caught"
        plain = symmetric(xt, xt.mT).double().numpy()
        assert error(plain, product(x, x.mT)) < bound
assert symmetric(torch.empty(0, 8, 8), torch.empty(0, 8, 8)).shape == (0, 8, 8)

from zeta.backends.torch import symmetric_kernel

class Recorder:  # in the kernel's place: 70,000 matrices, interpreted, would take minutes
    def __getitem__(self, grid):
        self.grid = grid({"TILE": 64})
        return lambda *arguments, **options: None

symmetric_kernel._symmetric = recorder = Recorder()
symmetric(torch.empty(70_000, 2, 3), torch.empty(70_000, 3, 2))
assert recorder.grid == (70_000,), recorder.grid  # CUDA's limits: 2^31 - 1, and 65535 for the other axes
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_in_its_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-c", KERNEL, os.path.dirname(__file__)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
