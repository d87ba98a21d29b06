"""`optimizer.report()`: what a step did, against float64, on both libraries."""

import numpy as np
import pytest
from conftest import MlxRun, TorchRun

from zeta.parity.checks import TOLERANCE
from zeta.routing.layout import Route
from zeta.step_report import error, signs

SHAPES = {"up.weight": (24, 12), "qkv.weight": (20, 12), "experts.up.weight": (2, 12, 12), "norm.weight": (12,)}
QKV = Route("zeta", (1, 20, 12), "query, key, value", (12, 8))
ROUTES = {
    "up.weight": Route("zeta", (1, 24, 12), "matrix"),
    "qkv.weight": QKV,
    "experts.up.weight": Route("zeta", (2, 12, 12), "stack of matrices"),
    "norm.weight": Route("adamw", (), "vector"),
}
NAMES = ["up.weight", "qkv.weight[0]", "qkv.weight[1]", "experts.up.weight[0]", "experts.up.weight[1]"]
LR = 0.1


def draw(*seed):
    rng = np.random.default_rng([5, *seed])
    return {n: rng.standard_normal(s).astype("float32").astype("float64") for n, s in SHAPES.items()}


def matrices(arrays):
    q = arrays["qkv.weight"]
    return dict(zip(NAMES, [arrays["up.weight"], q[:12], q[12:], *arrays["experts.up.weight"]], strict=True))


def ran(run, kind="Zeta", steps=2, **options):
    options = {"lr": LR, "weight_decay": 0.0, "routes": ROUTES, "ns_dtype": "float32"} | options
    run = run(draw(0), options, kind=kind)
    return run


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["Zeta", "Eta", "NorMuon"])
@pytest.mark.parametrize("make", [TorchRun, MlxRun])
def test_agrees_with_float64(make, kind, exact):
    pytest.importorskip("torch" if make is TorchRun else "mlx.core")
    run = ran(make, kind)
    assert run.optimizer.report(exact).rows == []
    for t in range(2):
        before = matrices(run.read())
        run.step(draw(1, t))
    rows = {row.name: row for row in run.optimizer.report(exact).rows}
    assert list(rows) == [name for name in rows if name in NAMES] and len(rows) == len(NAMES)
    for name, after in matrices(run.read()).items():
        row, u = rows[name], before[name] - after
        bound = 100 * TOLERANCE["float32"].step  # the difference of weights near one has lost a digit and a half
        assert row.lr == pytest.approx(LR)
        assert row.update_rms == pytest.approx(np.sqrt(np.mean(u**2)), rel=bound)
        assert row.weight_rms == pytest.approx(np.sqrt(np.mean(after**2)), rel=1e-6)
        assert row.ratio == pytest.approx(row.update_rms / row.weight_rms)
        s = np.linalg.svd(u, compute_uv=False) ** 2
        want = np.sqrt(np.mean((s / s.mean() - 1) ** 2))
        if not exact:
            a = u if u.shape[0] <= u.shape[1] else u.T
            z = signs(len(a)).astype("float64")
            want = np.sqrt(np.mean((len(a) / (a**2).sum() * (a @ (a.T @ z)) - z) ** 2))
        assert row.orthogonality == pytest.approx(want, rel=bound)


@pytest.mark.parametrize("make", [TorchRun, MlxRun])
def test_large_matrices_are_summed_up_by_rows(make):
    """One float32 sum of so many squares is 8e-5 off in torch 2.13 on a CPU."""
    pytest.importorskip("torch" if make is TorchRun else "mlx.core")
    rng = np.random.default_rng(0)
    run = make({"up.weight": rng.standard_normal((1024, 4096))}, {"lr": LR}, kind="Signum")
    run.optimizer.report()
    run.step({"up.weight": rng.standard_normal((1024, 4096))})
    (row,) = run.optimizer.report().rows
    assert row.update_rms == pytest.approx(0.2 * LR, rel=1e-5)
    assert row.weight_rms == pytest.approx(np.sqrt(np.mean(run.read()["up.weight"] ** 2)), rel=1e-5)


def test_one_random_vector_estimates_the_exact_error():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((200, 16, 40))
    size = (u * u).sum((-2, -1), keepdims=True)
    exact, got = error(u, size, None), error(u, size, signs(16).astype("float64"))
    assert np.sqrt(np.mean(got**2)) == pytest.approx(np.sqrt(np.mean(exact**2)), rel=0.1)


@pytest.mark.parametrize("make", [TorchRun, MlxRun])
def test_a_matrix_that_turned_nan_is_named(make):
    pytest.importorskip("torch" if make is TorchRun else "mlx.core")
    run = ran(make)
    run.optimizer.report()
    grads = draw(1)
    grads["experts.up.weight"][1, 0, 0] = np.nan
    run.step(grads)
    report = run.optimizer.report()
    assert report.not_finite == ["experts.up.weight[1]"]
    (line,) = [line for line in str(report).splitlines() if "not finite" in line]
    assert line.startswith("experts.up.weight[1]")
    assert report.summary()["zeta/not_finite"] == 1


@pytest.mark.parametrize("make", [TorchRun, MlxRun])
def test_measuring_changes_no_step_and_a_still_matrix_has_moved_by_nothing(make):
    pytest.importorskip("torch" if make is TorchRun else "mlx.core")
    runs = ran(make), ran(make)
    runs[0].optimizer.report()
    grads = draw(1)
    grads["experts.up.weight"][0] = 0
    for run in runs:
        run.step(grads)
    assert all(np.array_equal(a, runs[1].read()[n]) for n, a in runs[0].read().items())
    assert [row.name for row in runs[0].optimizer.report().rows if row.update_rms == 0] == ["experts.up.weight[0]"]


def test_a_compiled_mlx_step_is_measured_and_its_state_loads():
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten, tree_unflatten

    from zeta.backends.mlx import Zeta

    params = {n: mx.array(p.astype("float32")) for n, p in draw(0).items()}
    optimizer = Zeta(LR, routes=ROUTES)
    optimizer.report()
    optimizer.init(params)
    state = [params, optimizer.state]

    def step(grads):
        params.update(optimizer.apply_gradients(grads, params))

    compiled = mx.compile(step, inputs=state, outputs=state)
    ratios = []
    for t in range(3):
        compiled({n: mx.array(g.astype("float32")) for n, g in draw(1, t).items()})
        mx.eval(state)
        ratios.append(optimizer.report().summary()["zeta/ratio"])
    assert len(set(ratios)) == 3 and all(0 < ratio < 1 for ratio in ratios)
    other = Zeta(LR, routes=ROUTES)
    other.state = tree_unflatten(tree_flatten(optimizer.state))
    assert "zeta_report" not in other.state
    other.apply_gradients({n: mx.array(g.astype("float32")) for n, g in draw(1, 3).items()}, params)
