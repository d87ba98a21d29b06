"""Newton-Schulz under the roundings of Apple's GPUs, emulated on a CPU: parity's bounds hold in half precision.

As read in the sources of MLX 0.32 and torch 2.13. The worst is assumed: the limits of an Ultra, where most products
are split, and that no subnormal number survives. Worst error over its bound, of all coefficients on all inputs: in
float16 0.58 for both libraries, in bfloat16 0.94 (MLX 0.93), by `polar_express` on "gaussian large".
"""

from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import pytest
from conftest import FOUND, need

from zeta import COEFFICIENTS
from zeta import newton_schulz_forms as forms
from zeta.coefficients import auto_coefficients, steps_for
from zeta.parity import cases
from zeta.parity import checks as parity

mx, torch = need("mlx.core"), need("torch")
from zeta.backends.mlx import orthogonalize as mlx_orthogonalize  # noqa: E402
from zeta.backends.torch import orthogonalize as torch_orthogonalize  # noqa: E402

MARGIN = {"float16": 0.7, "bfloat16": 1.0}  # of the bounds; another BLAS sums in another order
HALF = pytest.mark.parametrize("dtype", MARGIN)


def flushed(x):
    """x without its subnormal numbers."""
    return mx.where(mx.abs(x) < mx.finfo(x.dtype).smallest_normal, mx.zeros_like(x), x)


def wide(x):
    return np.array(x.astype(mx.float32))


def rounded(x, dtype):
    return flushed(mx.array(x).astype(dtype))


def metal_addmm(c, a, b, alpha=1.0, beta=1.0):
    """alpha a b + beta c, a (batch, rows, k), b (batch, k, cols), as Metal's kernels round it."""
    if a.dtype == mx.float32:
        return REAL_ADDMM(c, a, b, alpha=alpha, beta=beta)
    (batch, rows, k), cols, dtype = a.shape, b.shape[-1], a.dtype
    total = wide(a) @ wide(b)
    half = partial(rounded, dtype=dtype)
    scaled = wide(half(wide(half(beta)) * wide(c)))
    if min(rows, cols) == 1:  # a vector's product: its epilogue is in half precision
        return half(wide(half(wide(half(alpha)) * wide(half(total)))) + scaled)
    if batch == 1 and ceil(rows / 16) * ceil(cols / 16) <= 2048 and k // 16 >= 8 and k >= max(rows, cols):
        return half(np.float32(alpha) * total + scaled)  # sums over k are split: half precision for beta c alone
    return half(np.float32(alpha) * total + np.float32(beta) * wide(c))


REAL_ADDMM, REAL_MULTIPLY = mx.addmm, mlx_orthogonalize.multiply


@pytest.fixture
def metal(monkeypatch):
    """MLX's Newton-Schulz as a GPU runs it: no blocks, Metal's roundings, subnormal numbers flushed on the way."""

    def multiply(a, b, c=None, beta=0.0, alpha=1.0):
        a, b, c = (None if x is None else flushed(x) for x in (a, b, c))
        return flushed(REAL_MULTIPLY(a, b, c, beta, alpha))

    monkeypatch.setattr(mlx_orthogonalize, "BLOCK", 1 << 30)
    monkeypatch.setattr(mlx_orthogonalize, "multiply", multiply)
    monkeypatch.setattr(mx, "addmm", metal_addmm)


@pytest.fixture
def mps(monkeypatch):
    """torch's Newton-Schulz with alpha, beta and each term rounded to half precision, as a graph of MPS may do."""
    real = torch.baddbmm

    def baddbmm(c, a, b, *, beta=1.0, alpha=1.0, out=None):
        if a.dtype == torch.float32:
            return real(c, a, b, beta=beta, alpha=alpha)
        return torch.bmm(a, b) * torch.tensor(alpha, dtype=a.dtype) + c * torch.tensor(beta, dtype=a.dtype)

    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    monkeypatch.setattr(torch_orthogonalize, "rounds_scalars", lambda x: x.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(torch_orthogonalize, "on_cpu", lambda x: False)


@pytest.fixture
def plain(monkeypatch):
    """The control: betas as the polynomials have them, iterates of norm one, and a product for one row, too."""

    def iterate(x, coefficients, narrow, symmetric, multiply, *_):
        x = narrow(x)
        for a, b, c in steps_for(coefficients, *x.shape[-2:]):
            s = symmetric(x, x.mT)
            x = multiply(symmetric(s, s, s, b, c), x, x, a)
        return x

    monkeypatch.setattr(forms, "size", lambda *_, **__: 1.0)
    monkeypatch.setattr(forms, "iterate", iterate)


def on(library, dtype):
    """The parity target of this library's CPU, without the blocks that a GPU does not have."""
    known = {target.name: target for target in FOUND if hasattr(target, "dtype")}
    target = known[f"{library} cpu {dtype}"]
    return replace(target, paths=tuple(path for path in target.paths if path != "blocks"))


def ratios(comparisons):
    """{check: its error over its bound}."""
    return {c.check: parity.relative_error(c.got, c.want, c.origin) / c.rtol for c in comparisons if c.rtol}


def checks(target):
    return ratios([*parity.newton_schulz(target), *parity.coefficients(target), *parity.invariance(target)])


@HALF
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("library, gpu", [("mlx", "metal"), ("torch", "mps")])
def test_all_coefficients_hold_on_all_inputs(library, gpu, name, dtype, request, monkeypatch):
    request.getfixturevalue(gpu)
    monkeypatch.setitem(COEFFICIENTS, "jordan", COEFFICIENTS[name])  # what parity shows all of its inputs
    monkeypatch.setitem(cases.SHAPES, "square", (128, 128))  # in place of 64: the smallest of which sums are split
    worst = checks(on(library, dtype))
    assert len(worst) > 30 and max(worst.values()) < MARGIN[dtype], max(worst.items(), key=lambda item: item[1])


@HALF
def test_the_optimizer_holds_on_metal(metal, dtype):
    results = list(parity.run(on("mlx", dtype)))
    assert any(result.check.startswith("step") for result in results)
    assert [result for result in results if not result.ok] == []


@HALF
def test_betas_as_they_are_written_would_fail(plain, dtype, request, monkeypatch):
    """The control: without the emulation they hold, under it one row and split sums are off by more than the bound."""
    assert max(checks(on("mlx", dtype)).values()) < 1
    request.getfixturevalue("metal")
    monkeypatch.setitem(cases.SHAPES, "square", (128, 128))
    failed = {name for name, ratio in checks(on("mlx", dtype)).items() if ratio > 1}
    assert failed >= {"coefficients: you 1xn", "newton-schulz: gaussian square"}


@HALF
def test_half_precision_products_of_mps_would_fail(mps, dtype, monkeypatch):
    monkeypatch.setattr(torch_orthogonalize, "rounds_scalars", lambda x: False)
    assert ratios(parity.coefficients(on("torch", dtype)))["coefficients: cans tall"] > 1


def test_iterates_of_norm_one_would_lose_what_is_small(metal, monkeypatch):
    target, x = on("mlx", "float16"), cases.gaussian((640, 768))
    want = parity.spectral_polynomial(x)

    def error():
        return parity.relative_error(target.numpy(target.newton_schulz(target.array(x), COEFFICIENTS["jordan"])), want)

    bound = parity.TOLERANCE["float16"].newton_schulz
    assert error() < MARGIN["float16"] * bound
    monkeypatch.setattr(forms, "LIFT", 1.0)
    assert error() > bound


@pytest.mark.parametrize("name", ["auto", *COEFFICIENTS])
@pytest.mark.parametrize("shape", [(1, 33), (33, 1), (5, 1, 257), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", *MARGIN])
def test_one_row_is_exact_in_float32_whatever_the_products_run_in(shape, name, dtype):
    steps = COEFFICIENTS.get(name, name)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[1:2] = 0  # of a stack or a column
    n, m = sorted(shape[-2:])
    want = parity.spectral_polynomial(x.astype(float), auto_coefficients(n, m) if name == "auto" else steps)
    ours = (
        torch_orthogonalize.newton_schulz(torch.tensor(x), steps, getattr(torch, dtype)).numpy(),
        np.array(mlx_orthogonalize.newton_schulz(mx.array(x), steps, getattr(mx, dtype))),
    )
    for got in ours:
        assert got.dtype == np.float32
        assert parity.relative_error(got, want) < 1e-6
        assert not got[1:2].any()


def test_all_that_is_added_to_a_product_is_multiplied_by_a_power_of_two():
    for name, coefficients in (
        COEFFICIENTS | {"auto": auto_coefficients(4096, 4096), "cubic": ((1.5, -0.5, 0.0),)}
    ).items():
        size, steps = forms.direct_steps(coefficients)
        assert 0.7 < size / forms.LIFT < 1.5
        betas = [beta for power, _, beta, _ in steps for beta in (power, beta)]
        betas += [beta for _, beta, _ in forms.gram_steps(coefficients)[1]]
        assert all(abs(np.frexp(beta)[0]) == 0.5 for beta in betas), name
