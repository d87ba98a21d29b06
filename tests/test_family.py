"""The family as pure functions: the same numbers on every library, and the closed forms that their papers promise."""

from functools import lru_cache
from math import inf

import numpy as np
import pytest
from conftest import CONDITION, bound

import zeta
from zeta import adamw, core, family, preconditioned
from zeta.core import COEFFICIENTS, Rule
from zeta.parity.checks import TOLERANCE, assert_close, relative_error, spectral_polynomial
from zeta.parity.targets import numpy_target
from zeta.stages import rank_one

RULES = {name: rule for name, rule in {**vars(family), **vars(preconditioned)}.items() if isinstance(rule, Rule)} | {
    "shampoo": preconditioned.shampoo(),
    "shampoo 1": preconditioned.shampoo(1),
    "soap": preconditioned.soap(),
    "soap 1": preconditioned.soap(1),
    "adago": family.adago(),
    "dion2": family.dion2(),
    **{f"schattor {p}": preconditioned.schattor(p) for p in (1, 1.5, 2, 4, inf)},
    **{f"schattor_regularised {p}": preconditioned.schattor_regularised(p) for p in (1, 4, inf)},
}
SHAPES = {"square": (3, 12, 12), "wide": (12, 20), "tall": (20, 12)}
HYPER = zeta.Hyper(lr=1e-2)
LR = zeta.Hyper(lr=1.0, weight_decay=0.0)  # w falls by u

by_rule = pytest.mark.parametrize("name", RULES)


def draw(shape, count=10):
    """(param, gradients): a drift, noise, and scales that differ by row and column; exact in float32."""
    rng = np.random.default_rng([2606, *shape])
    rows, cols = np.exp(0.5 * rng.standard_normal((*shape[:-1], 1))), np.exp(0.5 * rng.standard_normal(shape[-1:]))
    drift, noise = rng.standard_normal(shape), rng.standard_normal((count, *shape))
    return tuple(x.astype("float32").astype("float64") for x in (drift / 8, 1e-2 * rows * cols * (drift + noise)))


def steps(rule, param, grads, hyper=HYPER, orthogonalize=spectral_polynomial, target=None):
    """(param, state) after the steps, from NumPy arrays to NumPy arrays."""
    target = target or numpy_target("float64")
    w = target.wide(param)
    state = rule.init(w)
    for g in grads:
        w, state = rule.update(target.wide(g), state, w, hyper, orthogonalize)
    return target.numpy(w), {key: target.numpy(value) for key, value in state.items()}


def direction(rule, grad, state=None):
    """What a first step, or one from this state, subtracts from the parameter at lr 1."""
    zero = np.zeros(grad.shape)
    return -rule.update(grad, state or rule.init(zero), zero, LR, spectral_polynomial)[0]


def jordan(target):
    return lambda x: target.newton_schulz(x, COEFFICIENTS["jordan"])


@lru_cache
def oracle(name, kind):
    return steps(RULES[name], *draw(SHAPES[kind]))[0]


def kinds(name):
    """SOAP's eigenvectors are unique only where its factors are regular from the first step on."""
    return SHAPES if not name.startswith("soap") else ["square"]


@by_rule
def test_ten_steps_are_those_of_numpy(name, target):
    with target.scope():
        for kind in kinds(name):
            param, grads = draw(SHAPES[kind])
            got, _ = steps(RULES[name], param, grads, orthogonalize=jordan(target), target=target)
            assert_close(got, oracle(name, kind), bound(name, target.dtype), param)


@by_rule
def test_a_rate_off_by_four_bounds_is_caught(name):
    """The control of every bound above."""
    for kind in kinds(name):
        for most in {bound(name, dtype) for dtype in TOLERANCE}:
            param, grads = draw(SHAPES[kind])
            got, _ = steps(RULES[name], param, grads, zeta.Hyper(lr=1e-2 * (1 + 4 * most)))
            assert relative_error(got, oracle(name, kind), param) > 2 * most


def test_soaps_bounds_are_its_conditioning():
    """Every order of rows and columns is another order of summation."""
    param, grads = draw(SHAPES["square"])
    conditions, errors, rng = [], [], np.random.default_rng(0)
    for count in range(1, len(grads)):
        _, state = steps(preconditioned.soap(1), param, grads[:count])
        for factor in (state["left"], state["right"]):
            values = np.linalg.eigvalsh(factor)
            conditions.append(np.max(values[:, -1] / np.diff(values).min(-1)))
    assert max(conditions) == pytest.approx(CONDITION, rel=0.02)
    for _ in range(5):
        rows, cols = rng.permutation(12)[:, None], rng.permutation(12)
        got, _ = steps(preconditioned.soap(1), param[:, rows, cols], grads[:, :, rows, cols])
        errors.append(relative_error(got, oracle("soap 1", "square")[:, rows, cols], param[:, rows, cols]))
    assert TOLERANCE["float64"].step / 10 < max(errors) < bound("soap 1", "float64")


@by_rule
def test_a_momentum_off_by_one_percent_is_caught(name):
    """The control of the test above: so small an error is larger than all of its bounds."""
    for kind in kinds(name):
        param, grads = draw(SHAPES[kind])
        got, _ = steps(RULES[name], param, grads, zeta.Hyper(lr=1e-2, betas=(0.95 * 0.99, 0.99 * 0.99)))
        assert relative_error(got, oracle(name, kind), param) > bound(name, "float32")


@pytest.mark.parametrize("name", ["zeta", "muon", "adamuon", "normuon", "rank1_both", "olion", "adago", "dion2"])
def test_a_coefficient_off_by_one_percent_is_caught(name):
    wrong = tuple((1.01 * a, b, c) for a, b, c in COEFFICIENTS["jordan"])
    param, grads = draw(SHAPES["wide"])
    got, _ = steps(RULES[name], param, grads, orthogonalize=lambda x: spectral_polynomial(x, wrong))
    assert relative_error(got, oracle(name, "wide"), param) > 500 * TOLERANCE["float32"].step


@pytest.mark.parametrize("name", ["normuon", "rank1_after", "shampoo", "dion2", "schattor 4"])
def test_rows_for_columns_matter_where_they_should(name):
    """The control of axes: NorMuon alone distinguishes rows from columns, the others are as good on the transpose."""
    param, grads = draw((12, 20))
    turned, _ = steps(RULES[name], param.T, grads.swapaxes(-1, -2))
    error = relative_error(turned.T, oracle(name, "wide"), param)
    assert error > 0.01 if name == "normuon" else error < 1e-9


@by_rule
def test_state_is_float32_or_better_and_arguments_are_left_alone(name):
    param, grads = (x.astype("float32") for x in draw((2, 12, 8), 3))
    rule, w = RULES[name], param.astype("float16")
    state = rule.init(w)
    assert {key: value.shape for key, value in state.items()} == {
        key: (2, *shape(12, 8)) for key, shape in rule.keeps.items()
    }
    for g in grads:
        before = {key: value.copy() for key, value in state.items()}
        new, after = rule.update(g.astype("float16"), state, w, HYPER)
        assert new.dtype == w.dtype and all(value.dtype == np.float32 for value in after.values())
        assert after.keys() == state.keys() and all((state[key] == before[key]).all() for key in state)
        state = after


@by_rule
def test_a_zero_gradient_decays_and_moves_nothing_at_any_time(name):
    rule, (param, grads) = RULES[name], draw((3, 12, 8), 3)
    grads[2][1] = 0  # an expert that no longer sees a token
    before, _ = steps(rule, param, grads[:2])
    after, _ = steps(rule, param, grads)
    assert_close(after[1], (1 - 1e-2 * 0.1) * before[1], 1e-14)
    assert relative_error(after[0], (1 - 1e-2 * 0.1) * before[0]) > 1e-5
    never, state = steps(rule, param, np.zeros((3, 3, 12, 8)), zeta.Hyper(weight_decay=0.0))
    assert_close(never, param, 0.0)
    assert all(np.isfinite(value).all() for value in state.values())


@by_rule
def test_a_stack_is_its_matrices(name):
    param, grads = draw((2, 3, 12, 12), 4)
    got, _ = steps(RULES[name], param, grads)
    alone, _ = steps(RULES[name], param[1, 2], grads[:, 1, 2])
    assert_close(got[1, 2], alone, 1e-10, param[1, 2])


@pytest.mark.parametrize(
    "name", sorted(RULES.keys() - {"soap", "soap 1", "adago", "dion2"} - {n for n in RULES if "_reg" in n})
)
def test_an_entry_moves_by_a_fifth_of_the_rate(name):
    """RMS: exactly where the rule scales to it, nearly where singular values are near one, less in a ball."""
    _, grads = draw((12, 20), 1)
    u = direction(RULES[name], grads[0])
    rms = np.sqrt(np.mean(u**2))
    exact = not name.startswith(("eta", "muon", "schattor")) or name in ("schattor 2", "schattor inf")
    low, high = (0.2 - 1e-6, 0.2 + 1e-6) if exact else (0.1, 0.24)
    assert low < rms < high if name not in ("schattor 1", "schattor 1.5") else rms > 0.2


class TestSchattor:
    grad = draw((2, 12, 20), 1)[1][0]

    def test_p_2_is_normalised_sgd(self):
        norm = np.linalg.norm(self.grad, axis=(-2, -1), keepdims=True)
        u = direction(preconditioned.schattor(2.0), self.grad)
        assert_close(u, 0.2 * np.sqrt(12 * 20) * self.grad / norm, 1e-12)

    def test_p_inf_is_muon_with_the_exact_polar_factor(self):
        a, _, b = np.linalg.svd(self.grad, full_matrices=False)
        u = direction(preconditioned.schattor(inf), self.grad)
        assert_close(u, 0.2 * np.sqrt(20) * a @ b, 1e-12)
        muon = family.muon.update(self.grad, family.muon.init(self.grad), 0 * self.grad, LR, lambda x: a @ b)[0]
        assert_close(-muon, u, 1e-12)

    @pytest.mark.parametrize("p", [1, 1.2, 2, 3, 10, inf])
    def test_of_its_ball_it_is_the_steepest(self, p):
        """|u|_p is one, and <m, u> reaches the dual norm |m|_q (Hoelder); the control is another p's direction."""
        q = inf if p == 1 else 1 / (1 - 1 / p)
        s = np.linalg.svd(self.grad, compute_uv=False)
        (u, size), (other, _) = preconditioned.dual(self.grad, p), preconditioned.dual(self.grad, 2 * p + 1)
        assert_close(np.linalg.norm(np.linalg.svd(u, compute_uv=False), p, axis=-1), np.ones(2), 1e-12)
        assert_close(size[:, 0, 0], np.linalg.norm(s, q, axis=-1), 1e-12)
        assert_close(np.sum(self.grad * u, axis=(-2, -1)), np.linalg.norm(s, q, axis=-1), 1e-12)
        inner = np.sum(self.grad * other, axis=(-2, -1)) / np.linalg.norm(
            np.linalg.svd(other, compute_uv=False), p, axis=-1
        )
        assert p == inf or (inner < size[:, 0, 0] * (1 - 1e-4)).all()

    def test_regularised_is_the_ball_times_the_dual_norm_and_sgd_for_p_2(self):
        u = direction(preconditioned.schattor_regularised(2.0), self.grad)
        assert_close(u, 0.05 * self.grad, 1e-12)  # 1 - b1 of the gradient: the first average
        u = direction(preconditioned.schattor_regularised(inf), self.grad)
        a, s, b = np.linalg.svd(0.05 * self.grad, full_matrices=False)
        assert_close(u, s.sum(-1)[:, None, None] * a @ b, 1e-12)

    @pytest.mark.parametrize("shape", [(2, 12, 20), (20, 12), (12, 12)])
    def test_svd_is_the_thin_one(self, shape, target):
        x = draw(shape, 1)[1][0]
        with target.scope():
            a, s, b = map(target.numpy, preconditioned.svd(target.wide(x)))
        assert [a.shape[-2:], b.shape[-2:]] == [(shape[-2], 12), (12, shape[-1])]
        assert_close((a * s[..., None, :]) @ b, x, TOLERANCE[target.dtype].step)
        assert_close(s, np.linalg.svd(x, compute_uv=False), TOLERANCE[target.dtype].step)
        assert_close(a.swapaxes(-1, -2) @ a, np.broadcast_to(np.eye(12), (*shape[:-2], 12, 12)), 1e-5)

    def test_directions_without_gradient_stay(self):
        low = np.outer(np.arange(1.0, 13), np.ones(20))
        assert_close(direction(preconditioned.schattor(inf), low), 0.2 * np.sqrt(20) * low / np.linalg.norm(low), 1e-9)


@pytest.mark.parametrize("name", ["shampoo", "soap", "schattor 4", "schattor inf", "schattor_regularised 4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_makes_its_own_matrix_nan_and_no_other(name, bad, target):
    param, grads = draw((3, 12, 12), 2)
    grads[0, 1, 2, 3] = bad
    with target.scope(), np.errstate(invalid="ignore"):
        w, _ = steps(RULES[name], param, grads, target=target)
    assert np.isnan(w[1]).all()
    rest = [0, 2]
    assert_close(w[rest], steps(RULES[name], param[rest], grads[:, rest])[0], bound(name, target.dtype), param[rest])


class TestPreconditioned:
    grad = draw((12, 12), 1)[1][0]

    @pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
    def test_shampoos_first_step_is_the_polar_factor(self, shape):
        g = draw(shape, 1)[1][0]
        a, _, b = np.linalg.svd(g, full_matrices=False)
        assert_close(direction(preconditioned.shampoo(), g), 0.2 * np.sqrt(max(shape)) * a @ b, 1e-6)

    def test_power_is_that_of_the_eigenvalues(self):
        a = self.grad @ self.grad.T
        root = preconditioned.power(a, -1 / 4)
        assert_close(root @ root @ root @ root @ a, np.eye(12), 1e-9)

    def test_power_treats_what_is_all_but_zero_as_the_floor(self):
        assert_close(preconditioned.power(np.diag([0.0, 1, 16]), 1 / 4), np.diag([2 * 1e-6**0.25, 1, 2]), 1e-12)

    def test_soap_gathers_before_it_moves(self):
        assert not direction(preconditioned.soap(), self.grad).any()

    def test_soap_between_coordinates_is_adam(self):
        """Diagonal factors have the coordinates as eigenvectors; the control is a factor that has not."""
        _, grads = draw((12, 12), 6)
        axes = {"left": np.diag(np.arange(1.0, 13)), "right": np.diag(np.arange(1.0, 13))}
        turned = {"left": self.grad @ self.grad.T, "right": np.eye(12)}
        adam, adam_state = np.zeros((12, 12)), adamw.init(self.grad)
        for factors, same in ((axes, True), (turned, False)):
            w, state = np.zeros((12, 12)), preconditioned.soap().init(self.grad)
            state["steps"] = state["steps"] + 1
            adam, adam_state = np.zeros((12, 12)), adamw.init(self.grad)
            for g in grads:
                w, state = preconditioned.soap().update(g, state | factors, w, HYPER)
                adam, adam_state = adamw.update(g, adam_state, adam, HYPER)
            assert (relative_error(w, adam) < 1e-12) == same


class TestClosedForms:
    def test_zeta_is_the_core(self):
        param, grads = draw((12, 20))
        state, w = core.init(param), param
        for g in grads:
            w, state = core.update(g, state, w, HYPER, spectral_polynomial)
        assert_close(oracle("zeta", "wide"), w, 0.0)

    def test_a_rank_one_variance_is_exact_where_scales_are_separable(self):
        rng = np.random.default_rng(0)
        v = rng.random((2, 12, 1)) * rng.random((2, 1, 20))
        r, c = v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)
        assert_close(rank_one(r, c), v, 1e-14)
        v[0, 0, 0] *= 2
        assert relative_error(rank_one(v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)), v) > 1e-3
        assert not rank_one(0 * r, 0 * c).any()

    def test_rank1_before_is_zeta_where_scales_are_separable(self):
        g = np.exp(np.arange(12.0))[:, None] * np.cos(np.arange(20.0)) * np.sign(draw((12, 20), 1)[1][0])
        assert_close(direction(family.rank1_before, g), direction(family.zeta, g), 1e-6)
        g[0, 0] *= 3
        assert relative_error(direction(family.rank1_before, g), direction(family.zeta, g)) > 1e-3

    def test_adamuon_is_whitening_after_of_signs(self):
        """Its first step: the variance is the update's own square, so only signs are left."""
        g = draw((12, 20), 1)[1][0]
        want = 0.2 * np.sign(spectral_polynomial(np.sign(g)))
        assert_close(direction(family.adamuon, g, None), want, 1e-5)
        assert relative_error(direction(family.whiten_after, g), want) > 0.1

    def test_eta_sees_no_scale_of_rows_and_of_columns_where_the_signs_are_all(self):
        """Of a matrix that is a sign matrix scaled by rows and columns only the signs are left."""
        rng = np.random.default_rng(8)
        signs, rows, cols = (
            rng.choice([-1.0, 1.0], (12, 20)),
            rng.uniform(0.01, 9, (12, 1)),
            rng.uniform(0.01, 9, (1, 20)),
        )
        assert relative_error(direction(family.eta, rows * cols * signs), direction(family.eta, signs)) < 1e-12
        assert relative_error(direction(family.muon, rows * cols * signs), direction(family.muon, signs)) > 0.1

    def test_eta_moves_no_row_and_no_column_whose_gradient_is_zero(self):
        """Else a dead unit's fading momentum would be brought to full size; Muon lets it fade (the control)."""
        param, grads = draw((12, 20), 30)
        grads[5:, 0], grads[5:, :, 3] = 0, 0
        for rule, moved in ((family.eta, False), (family.muon, True)):
            before, _ = steps(rule, param, grads[:5], LR)
            after, _ = steps(rule, param, grads, LR)
            for line in ((0,), (slice(None), 3)):
                assert (np.abs(after[line] - before[line]).max() > 1e-9) == moved  # what an SVD rounds is less

    @pytest.mark.parametrize("dtype, size", [("float32", 1e-15), ("float32", 1e15), ("float64", 1e30)])
    def test_eta_sees_no_size(self, dtype, size):
        """Squares of 1e-22 or 1e19 would leave float32, as they do in Zeta's variance."""
        grad = draw((12, 20), 1)[1][0].astype(dtype)
        got = direction(family.eta, grad.dtype.type(size) * grad)
        assert relative_error(got, direction(family.eta, grad)) < (1e-5 if dtype == "float32" else 1e-12)

    def test_soap_waits_for_a_gradient(self):
        grad = draw((12, 12), 1)[1][0]
        state = family_state = preconditioned.soap().init(grad)
        for _ in range(3):
            _, state = preconditioned.soap().update(np.zeros_like(grad), state, grad, LR)
        assert (
            direction(preconditioned.soap(), grad, state) == direction(preconditioned.soap(), grad, family_state)
        ).all()

    @pytest.mark.parametrize("make", [preconditioned.soap, preconditioned.shampoo])
    def test_a_matrix_decomposes_when_it_is_due_whatever_else_is_in_its_stack(self, make):
        """The second begins three steps after the first; decomposing in every step is something else (the control)."""
        param, grads = draw((2, 12, 12), 12)
        grads[:3, 1] = 0
        both, state = steps(make(4), param, grads, LR)
        for i in (0, 1):
            alone, _ = steps(make(4), param[i], grads[:, i], LR)
            assert_close(both[i], alone, 1e-12, param[i])
            assert relative_error(steps(make(1), param[i], grads[:, i], LR)[0], alone, param[i]) > 1e-2
        assert state["steps"].ravel().tolist() == [12, 9]

    @pytest.mark.parametrize("name", ["soap 1", "shampoo 1"])
    def test_a_state_without_what_was_decomposed_decomposes_anew(self, name):
        """As one saved when every step did: with zeros in place of the last, nothing changes."""
        param, grads = draw((12, 12))
        w, state = steps(RULES[name], param, grads[:5])
        kept = [key for key in state if key.endswith(("_basis", "_root"))]
        for rule in (RULES[name], RULES[name.split()[0]]):
            before = state | {key: 0 * state[key] for key in kept}
            after, _ = rule.update(grads[5], before, w, HYPER, spectral_polynomial)
            assert_close(after, steps(RULES[name], param, grads[:6])[0], 1e-12, w)

    @pytest.mark.parametrize("make", [preconditioned.soap, preconditioned.shampoo])
    @pytest.mark.parametrize("every", [0, -1, 2.5, "10", None])
    def test_a_frequency_is_a_number_of_steps(self, make, every):
        with pytest.raises(ValueError, match="precondition_frequency is"):
            make(every)

    def test_normuon_evens_out_the_rows(self):
        u = direction(family.normuon, draw((12, 20), 1)[1][0])
        assert_close(np.mean(u**2, axis=-1), np.full(12, 0.04), 1e-5)

    def test_olion_moves_all_entries_alike(self):
        u = direction(family.olion, draw((12, 20), 1)[1][0])
        assert_close(np.abs(u), np.full((12, 20), 0.2), 1e-12)
        assert (u > 0).any() and (u < 0).any()

    @pytest.mark.parametrize("shape, axis", [((12, 20), 1), ((20, 12), 0), ((2, 9, 16), 2)])
    def test_dion2_moves_the_largest_quarter_of_the_shorter_side_and_its_momentum_decays(self, shape, axis):
        g = draw(shape, 1)[1][0]
        other = tuple(k for k in range(len(shape)) if k == axis)
        size = np.abs(g).sum(axis=other, keepdims=True)
        count = -(-min(shape[-2:]) // 4)
        short = len(shape) - 2 if shape[-2] <= shape[-1] else len(shape) - 1
        chosen = size >= -np.sort(-size, axis=short).take([count - 1], axis=short)
        w, state = family.dion2().update(g, family.dion2().init(g), 0 * g, LR, spectral_polynomial)
        assert ((w != 0).any(axis=other, keepdims=True) == chosen).all()
        assert_close(state["exp_avg"], np.where(chosen, 0.95, 1.0) * g, 1e-14)

    def test_dion2_shows_a_row_of_nan_instead_of_leaving_it_out(self):
        g = draw((12, 20), 1)[1][0]
        g[3, 4] = np.nan
        w, _ = family.dion2().update(g, family.dion2().init(g), 0 * g, LR)
        assert np.isnan(w).any()

    def test_dion2_keeps_its_momentum_while_nothing_moves(self):
        g, rule = draw((12, 20), 1)[1][0], family.dion2()
        w, state = rule.update(g, rule.init(g), 0 * g, LR)
        again, after = rule.update(0 * g, state, w, LR)
        assert_close(again, w, 0.0)
        assert_close(after["exp_avg"], state["exp_avg"], 0.0)

    def test_dion2_of_all_rows_is_muon_on_the_sum(self):
        g = draw((12, 20), 1)[1][0]
        assert_close(direction(family.dion2(fraction=1.0), g), direction(family.muon, g), 1e-12)

    def test_adago_slows_as_the_norms_add_up(self):
        g = draw((12, 20), 1)[1][0]
        g *= 3 / np.linalg.norm(g)
        for gamma, floor in ((1.0, 0.01), (2.0, 0.01), (1.0, 0.5)):
            rule, polar = family.adago(gamma, floor), 0.2 * np.sqrt(20) * spectral_polynomial(g)
            state = rule.init(g)
            for t in range(1, 5):
                w, state = rule.update(g, state, 0 * g, LR, spectral_polynomial)
                assert_close(-w, max(floor, gamma / np.sqrt(1 + t * gamma**2)) * polar, 1e-12)


class TestErrors:
    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: preconditioned.schattor(0.5), "p is 0.5"),
            (lambda: preconditioned.schattor_regularised(float("nan")), "p is nan"),
            (lambda: family.dion2(0.0), "fraction is 0.0"),
            (lambda: family.dion2(1.5), "fraction is 1.5"),
            (lambda: family.adago(gamma=0.0), "gamma is 0.0"),
            (lambda: family.adago(floor=-1.0), "floor -1.0"),
        ],
    )
    def test_settings_out_of_range(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_another_rules_state(self):
        w = np.ones((4, 6))
        with pytest.raises(ValueError, match=r"needs \{'exp_avg': \(4, 6\), 'row_sq': \(4, 1\)\}"):
            family.normuon.update(w, family.muon.init(w), w, HYPER)

    def test_a_vector(self):
        with pytest.raises(ValueError, match=r"zeta\.adamw"):
            family.muon.update(np.ones(4), {}, np.ones(4), HYPER)

    def test_another_shape_of_gradient(self):
        with pytest.raises(ValueError, match="they must agree"):
            family.muon.update(np.ones((6, 4)), family.muon.init(np.ones((4, 6))), np.ones((4, 6)), HYPER)
