"""The scaling law of Newton-Schulz, and the steps chosen from the shape that answer it."""

from importlib.util import module_from_spec, spec_from_file_location
from math import asin, pi, sqrt
from pathlib import Path

import numpy as np
import pytest

from zeta import core
from zeta.coefficients import LONG, auto_coefficients, polynomial, smallest, steps_for
from zeta.core import COEFFICIENTS, Hyper
from zeta.newton_schulz_forms import flops
from zeta.parity.checks import relative_error

JORDAN = COEFFICIENTS["jordan"]
SPEC = spec_from_file_location("scaling", Path(__file__).parent.parent / "bench" / "scaling.py")
scaling = module_from_spec(SPEC)
SPEC.loader.exec_module(scaling)


@pytest.fixture(autouse=True)
def few_matrices(monkeypatch):
    monkeypatch.setattr(scaling, "DIRECTIONS", 1 << 16)


def quarter_circle(t):
    """The share of a large square matrix's singular values below t, as they are over the root of its rows."""
    return (t * sqrt(4 - t * t) / 2 + 2 * asin(t / 2)) / pi


def mean_and_error(counts):
    return counts.mean(-1), counts.std(-1) / sqrt(counts.shape[-1])


def test_values_are_counted_exactly(rng):
    diagonal, below = scaling.bidiagonal(30, 40, 3, rng)
    t = np.linspace(0.1, 13, 50)[:, None] * np.ones(3)
    counts = scaling.count_below(diagonal, below, t)
    for i in range(3):
        s = np.linalg.svd(np.diag(diagonal[:, i]) + np.diag(below[:, i], -1), compute_uv=False)
        assert (counts[:, i] == (s < t[:, i : i + 1]).sum(axis=1)).all()
        assert (counts[:, i] != (1.1 * s < t[:, i : i + 1]).sum(axis=1)).any()
    known = scaling.count_below(np.arange(1.0, 6)[:, None], np.zeros((4, 1)), np.array([[0.5], [3.5], [9]]))
    assert known.ravel().tolist() == [0, 3, 5]


@pytest.mark.parametrize("shape", [(48, 48), (48, 60)])
def test_the_bidiagonal_matrix_has_a_gaussian_one_s_singular_values(rng, shape):
    t = np.array([0.5, 2, 5, 9])[:, None]
    s = np.linalg.svd(rng.standard_normal((400, *shape)), compute_uv=False)
    want, spread = mean_and_error((s[None] < t[..., None]).sum(-1))

    def far(n, m):
        got, error = mean_and_error(scaling.count_below(*scaling.bidiagonal(n, m, 2000, rng), t * np.ones(2000)))
        return np.max(np.abs(got - want) / np.hypot(error, spread + 1e-3))

    assert far(*shape) < 4 < 8 < far(shape[0], shape[1] + 2)


@pytest.mark.parametrize("n", [512, 2048, 8192])
def test_shares_are_those_of_the_quarter_circle_law(n):
    sets = {"jordan x4": JORDAN[:4], "jordan x5": JORDAN}
    for name, (share, error) in scaling.share_left(n, n, sets).items():
        law = quarter_circle(scaling.reach(sets[name]) * sqrt(n))
        assert abs(share - law) < 4 * error + 0.3 / n  # at zero the law has up to 0.3 values too few
        assert abs(share - 1.2 * law) > 4 * error + 0.3 / n


def test_every_set_is_in_the_picture_and_none_hides_another(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", (32,))
    monkeypatch.setattr(scaling, "NEARLY_SQUARE", (1,))
    scaling.draw(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    order, styles = list(scaling.STYLES), scaling.STYLES
    assert sorted(order) == sorted([*scaling.SETS, "auto"])
    for under, over in (("jordan x5", "you"), ("polar_express", "cans")):  # which all but coincide
        assert order.index(under) < order.index(over) and styles[under]["lw"] > 2 * styles[over]["lw"]


def test_a_polynomial_that_falls_again_is_told():
    assert scaling.reach(((2.0, 0, 0),)) == pytest.approx(0.25, rel=1e-3)
    with pytest.raises(ValueError, match="falls below"):
        scaling.reach(((4.0, -4.0, 0),))


SQUARES = [(n, n) for n in scaling.SIZES]
NEARLY = [(128, 131), (128, 133), (300, 302), (512, 515), (1024, 1031), (2048, 2068), (4096, 4100)]


@pytest.mark.parametrize("shape", [*SQUARES, *NEARLY])
def test_auto_leaves_less_than_a_thousandth_behind(shape):
    auto = auto_coefficients(*shape)
    shares = scaling.share_left(*shape, {"auto": auto, "jordan": JORDAN})
    share, error = shares["auto"]
    assert share + 2 * error < 1e-3
    assert share < shares["jordan"][0] or auto == JORDAN
    if shape in SQUARES:
        assert shares["jordan"][0] > 5e-3  # what it is a remedy for


@pytest.mark.parametrize("n", [1, 2, 64, 128, 1000, 8192, 20000])
def test_auto_costs_nothing_where_it_is_not_needed(n):
    for m in (3 * n, 4 * n, 30 * n):
        assert auto_coefficients(n, m) is auto_coefficients(m, n) is JORDAN
        assert flops(n, m, auto_coefficients(n, m)) <= flops(n, m, JORDAN)
    if 64 < n <= 8192:
        assert auto_coefficients(n, round(1.28 * n)) is JORDAN
        assert len(auto_coefficients(n, n)) > len(JORDAN)


def test_only_auto_is_replaced():
    assert steps_for("auto", 256, 256) == auto_coefficients(256, 256) != JORDAN
    assert steps_for(JORDAN, 256, 256) is JORDAN
    with pytest.raises(ValueError, match=r"coefficients is 'jordan', but must be .*: zeta.COEFFICIENTS holds"):
        steps_for("jordan", 256, 256)


@pytest.mark.parametrize("wrong", [(), ((1, 2),), (1, 2, 3), ((1, 2, "c"),), None, "jordan"])
def test_coefficients_are_checked_before_anything_is_done(new_run, wrong):
    with pytest.raises(ValueError, match=r"coefficients is .*, but must be"):
        new_run({"a.weight": np.ones((4, 6))}, {"coefficients": wrong})


# Of the update, by the dtype of the products. Long steps multiply the rounding of the smallest directions, on six draws
# to errors of 1.9e-5, 1.5e-2 and 1.2e-1; five steps in place of them make one of 0.21 and more.
AUTO = {"float32": 6e-5, "float16": 2.5e-2, "bfloat16": 0.16}


def test_auto_in_an_optimizer_is_the_update_with_those_steps(default_run, rng):
    shapes = {"a.weight": (40, 40), "b.weight": (132, 132), "c.weight": (24, 72)}
    params, grads = ({n: rng.standard_normal(s) for n, s in shapes.items()} for _ in range(2))
    bound = AUTO[default_run.dtype]
    settings = {"auto": ("auto", 0.1), "five": (5, 0.1), "rate": ("auto", 0.1 * (1 + 4 * bound))}
    runs = {key: default_run(params, {"lr": lr, "ns_steps": steps}) for key, (steps, lr) in settings.items()}
    for run in runs.values():
        run.step(grads)
    for name, w in params.items():
        steps = auto_coefficients(*w.shape)
        want, _ = core.update(grads[name], core.init(w), w, Hyper(lr=0.1), lambda x: core.newton_schulz(x, steps))  # noqa: B023
        auto, five, rate = (relative_error(run.read()[name], want, w) for run in runs.values())
        assert auto <= bound < rate
        assert (five > bound) == (w.shape != (24, 72))


@pytest.mark.parametrize(
    "options", [{"coefficients": "five"}, {"ns_steps": 6}, {"ns_steps": 0}, {"ns_steps": "many"}, {"ns_steps": True}]
)
def test_steps_that_are_none_are_refused(new_run, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*, but must be"):
        new_run({"a.weight": np.ones((4, 6))}, options)


def test_no_singular_value_of_a_rectangle_is_expected_below_the_edge():
    assert smallest(100, 400) == smallest(400, 100) == pytest.approx(0.85 * 0.5 / 10)
    assert smallest(128, 128) == pytest.approx(9e-4 / sqrt(128))


@pytest.mark.parametrize("k, end", [(6, 8.7e-5), (7, 2.1e-5), (8, 4.9e-6)])
def test_long_steps_reach_as_far_as_they_say_and_stay_in_range(k, end):
    steps, s = (LONG[0], *LONG[1 - k :]), np.geomspace(1e-7, 1.01, 100_001)
    assert scaling.reach(steps) == pytest.approx(end, rel=0.02)
    p = polynomial(s, steps)
    assert p.max() < 1.30 and p[s > 1.5 * end].min() > 0.67
    off = (*steps[:-1], tuple(1.05 * value for value in steps[-1]))
    assert polynomial(s, off).max() > 1.30


def minimax(low, high):
    """(a, b, c) of the odd polynomial of degree five next to one on [low, high], and its distance: Remez' exchange."""
    x, distance = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high]), 0.0
    for _ in range(50):
        a, b, c, distance = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        x[1:3] = np.sqrt((-3 * b + np.array([-1, 1]) * sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return (a, b, c), distance


def compose(low, steps):
    high, found = 1.0, []
    for _ in range(steps):
        step, distance = minimax(low, 1.01 * high)
        found.append(step)
        low, high = 1 - distance, 1 + distance
    return found


def test_long_steps_are_the_composition_that_they_are_said_to_be():
    want = [compose(3e-4, 1)[0], *compose(7.07e-6, 8)[1:]]
    np.testing.assert_allclose(LONG, want, rtol=1e-5)
    assert not np.allclose(LONG[-1], compose(1e-5, 8)[-1], rtol=1e-5)
