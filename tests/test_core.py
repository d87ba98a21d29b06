"""What the paper's update implies, and a second implementation of it that shares no code with `zeta.core`."""

import subprocess
import sys

import numpy as np
import pytest

import zeta
from zeta import adamw
from zeta.core import COEFFICIENTS
from zeta.parity.cases import gaussian
from zeta.parity.checks import assert_close, relative_error, spectral_polynomial

DEFAULT = zeta.Hyper()
JORDAN = (3.4445, -4.7750, 2.0315)


def steps(param, grads, hyper=DEFAULT, **options):
    state = zeta.init(param)
    for grad in grads:
        param, state = zeta.update(grad, state, param, hyper, **options)
    return param, state


def second_implementation(w, grads, lr, b1, b2, eps, decay):
    """The paper's algorithm in plain NumPy, for one matrix."""
    m, v = np.zeros(w.shape), np.zeros(w.shape)
    for g in grads:
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        x = m / (np.sqrt(v) + eps)
        y = x.T if x.shape[0] > x.shape[1] else x
        y = y / np.sqrt(np.sum(y**2))
        for _ in range(5):
            gram = y.dot(y.T)
            y = JORDAN[0] * y + (JORDAN[1] * gram + JORDAN[2] * gram.dot(gram)).dot(y)
        u = y.T if x.shape[0] > x.shape[1] else y
        w = (1 - lr * decay) * w - lr * 0.2 * np.sqrt(w.size) / (np.sqrt(np.sum(u**2)) + eps) * u
    return w


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize("setting", [(1e-3, 0.95, 0.99, 1e-8, 0.1), (0.05, 0.9, 0.95, 1e-4, 0.0)])
def test_is_the_papers_algorithm(shape, setting, rng):
    w = rng.standard_normal(shape)
    grads = rng.standard_normal((10, *shape)) * np.exp(rng.standard_normal(shape))
    lr, b1, b2, eps, decay = setting
    got, _ = steps(w, grads, zeta.Hyper(lr, (b1, b2), eps, decay))
    assert_close(got, second_implementation(w, grads, *setting), 1e-12, origin=w)
    wrong = second_implementation(w, grads, lr, b1 * 0.999, b2, eps, decay)
    assert relative_error(got, wrong, origin=w) > 1e-6  # the comparison can fail


def test_defaults_are_the_papers():
    hyper = zeta.Hyper()
    assert (hyper.betas, hyper.eps, hyper.weight_decay) == ((0.95, 0.99), 1e-8, 0.1)
    assert COEFFICIENTS["jordan"] == (JORDAN,) * 5


class TestUpdate:
    hyper = zeta.Hyper(lr=1e-2, weight_decay=0.0)

    def test_first_step_is_newton_schulz_of_the_sign(self, rng):
        w, g = rng.standard_normal((2, 24, 36))
        got = (w - steps(w, [g], self.hyper)[0]) / self.hyper.lr
        u = zeta.newton_schulz(np.sign(g))
        assert_close(got, 0.2 * u * np.sqrt(g.size) / np.linalg.norm(u), 1e-5)  # eps / |g| is what is left

    def test_rescaling_all_gradients_changes_nothing(self, rng):
        w, grads = rng.standard_normal((24, 36)), rng.standard_normal((5, 24, 36))
        hyper = zeta.Hyper(lr=1e-2, eps=1e-20)
        assert_close(steps(w, 1e3 * grads, hyper)[0], steps(w, grads, hyper)[0], 1e-12, origin=w)

    def test_bias_correction_cancels(self, rng):
        """The corrections are scalars of a step, and Newton-Schulz does not see a scale."""
        w, grads = rng.standard_normal((24, 36)), rng.standard_normal((5, 24, 36))
        (b1, b2), state = self.hyper.betas, zeta.init(w)
        plain = corrected = w
        for t, g in enumerate(grads, 1):

            def correct(x, t=t):
                return zeta.newton_schulz(x / (1 - b1**t) * np.sqrt(1 - b2**t))

            corrected, _ = zeta.update(g, state, corrected, self.hyper, orthogonalize=correct)
            plain, state = zeta.update(g, state, plain, self.hyper)
        assert_close(corrected, plain, 1e-12, origin=w)

    @pytest.mark.parametrize("shape", [(24, 36), (36, 24), (1, 7), (5, 8, 12)])
    def test_rms_is_a_fifth_of_the_rate_for_every_matrix(self, shape, rng):
        w, grads = rng.standard_normal(shape), rng.standard_normal((3, *shape))
        before, state = steps(w, grads[:2], self.hyper)
        after, _ = zeta.update(grads[2], state, before, self.hyper)
        rms = np.sqrt(np.mean((after - before) ** 2, axis=(-2, -1)))
        assert_close(rms, np.full(rms.shape, 0.2 * self.hyper.lr), 1e-7)

    def test_decay_is_decoupled(self, rng):
        w, g = rng.standard_normal((2, 24, 36))
        plain, decayed = steps(w, [g], self.hyper)[0], steps(w, [g], zeta.Hyper(lr=1e-2, weight_decay=0.5))[0]
        assert_close(decayed, plain - 1e-2 * 0.5 * w, 1e-14)

    def test_zero_gradient_from_the_start_is_no_update(self, rng):
        w = rng.standard_normal((24, 36))
        got, _ = steps(w, np.zeros((3, 24, 36)), self.hyper)
        assert_close(got, w, 0.0)

    def test_a_matrix_without_gradient_is_decayed_but_not_moved(self, rng):
        """Ours: the published form moves an expert that saw no token at full size along its last direction."""
        w, g = rng.standard_normal((2, 3, 8, 12))
        hyper = zeta.Hyper(lr=1e-2, weight_decay=0.5)
        before, state = steps(w, [g], hyper)
        g[1] = 0
        after, _ = zeta.update(g, state, before, hyper)
        assert_close(after[1], (1 - 1e-2 * 0.5) * before[1], 1e-14)
        assert np.linalg.norm(after[0] - (1 - 1e-2 * 0.5) * before[0]) > 0.01

    def test_a_stack_is_its_matrices(self, rng):
        w, g = rng.standard_normal((2, 2, 3, 8, 12))
        got, _ = steps(w, [g], self.hyper)
        assert_close(got[1, 2], steps(w[1, 2], [g[1, 2]], self.hyper)[0], 1e-13)

    def test_orthogonalize_is_used(self, rng):
        w, g = rng.standard_normal((2, 8, 12))
        got, _ = steps(w, [g], self.hyper, orthogonalize=np.sign)
        assert_close(got, w - 1e-2 * 0.2 * np.sign(g), 1e-9)

    def test_rate_and_decay_may_be_arrays(self, rng):
        w, g = rng.standard_normal((2, 8, 12))
        got, _ = steps(w, [g], zeta.Hyper(lr=np.asarray(1e-2), weight_decay=np.asarray(0.0)))
        assert_close(got, steps(w, [g], self.hyper)[0], 0.0)


class TestOnEveryLibrary:
    def test_arguments_are_left_as_they_were(self, target):
        arrays = [target.wide(gaussian((8, 12))) for _ in range(2)]
        param, grad = arrays
        for module in (zeta, adamw):
            _, state = module.update(grad, module.init(param), param, zeta.Hyper(lr=1.0))
            before = {name: target.numpy(array).copy() for name, array in state.items()}
            module.update(grad, state, param, zeta.Hyper(lr=1.0))
            for name, array in state.items():
                assert_close(target.numpy(array), before[name], 0.0)
        zeta.newton_schulz(param)
        for array in arrays:
            assert_close(target.numpy(array), gaussian((8, 12)), 0.0)

    def test_moments_are_float32_or_better(self, target):
        param = target.array(gaussian((8, 12)))  # in half precision, where the target has it
        new, state = zeta.update(param, zeta.init(param), param, zeta.Hyper())
        wide = target.wide(gaussian((8, 12))).dtype
        assert new.dtype == param.dtype
        assert all(array.dtype == wide for array in state.values())

    def test_newton_schulz_keeps_shape_and_dtype(self, target):
        x = target.array(gaussian((2, 3, 8, 12)))
        y = target.newton_schulz(x, COEFFICIENTS["jordan"])
        assert y.shape == x.shape and y.dtype == x.dtype

    def test_adamw_first_step_is_the_sign(self, target):
        param, grad = target.wide(np.ones(6)), target.wide(np.array([3.0, -2, 1e3, -1e-3, 0, 1]))
        after, state = adamw.update(grad, adamw.init(param), param, zeta.Hyper(lr=0.5, weight_decay=0.0))
        assert_close(target.numpy(after), 1 - 0.5 * np.array([1.0, -1, 1, -1, 0, 1]), 1e-5)
        assert float(state["step"]) == 1


class TestNewtonSchulz:
    @pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30])
    def test_the_inputs_size_does_not_matter(self, size, rng):
        x = rng.standard_normal((8, 12))
        assert_close(zeta.newton_schulz(size * x), zeta.newton_schulz(x), 1e-12)

    def test_zero_stays_zero(self):
        assert not zeta.newton_schulz(np.zeros((2, 3, 4))).any()

    @pytest.mark.parametrize(
        "name, smallest, low, high",  # singular values from `smallest` of the norm up end between low and high
        [
            ("jordan", 0.01, 0.68, 1.14),
            ("you", 0.01, 0.977, 1.032),
            ("polar_express", 0.002, 0.870, 1.124),
            ("cans", 0.002, 0.836, 1.120),
        ],
    )
    def test_coefficients_keep_their_documented_range(self, name, smallest, low, high):
        s = np.geomspace(smallest, 1, 20001)
        for a, b, c in COEFFICIENTS[name]:
            s = a * s + b * s**3 + c * s**5
        assert low <= s.min() and s.max() <= high
        assert s.min() < low + 0.01 and s.max() > high - 0.01  # and the range is a tight one

    def test_every_coefficient_set_is_documented(self):
        assert set(COEFFICIENTS) == {"jordan", "you", "polar_express", "cans"}

    @pytest.mark.parametrize("name", COEFFICIENTS)
    def test_no_set_is_thrown_out_of_its_range_by_half_precision(self, name):
        """A singular value of exactly one, rounded up by one unit of bfloat16 in every step."""
        s = 1.0
        for a, b, c in COEFFICIENTS[name]:
            s = (a * s + b * s**3 + c * s**5) * (1 + 2**-8)
        assert 0.6 < s < 1.3

    def test_a_slice_of_the_coefficients_is_fewer_steps(self, rng):
        x = rng.standard_normal((8, 12))
        four = COEFFICIENTS["jordan"][:4]
        assert_close(zeta.newton_schulz(x, four), spectral_polynomial(x, four), 1e-12)


class TestErrors:
    param = np.ones((4, 6))

    @pytest.mark.parametrize(
        "setting, message",
        [
            ({"lr": -1.0}, "lr is -1.0"),
            ({"lr": float("nan")}, "lr is nan"),
            ({"eps": -1e-8}, "eps is -1e-08"),
            ({"weight_decay": float("inf")}, "weight_decay is inf"),
            ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
            ({"betas": (-0.1, 0.9)}, "betas"),
            ({"betas": (0.9,)}, "betas"),
            ({"betas": 0.9}, "betas is 0.9"),
            ({"betas": (0.9, "0.99")}, "betas is"),
            ({"lr": "1e-3"}, "lr is '1e-3', but must be a number"),
            ({"weight_decay": None}, "weight_decay is None"),
            ({"eps": 0}, "eps is 0.0, but must be at least"),
            ({"eps": 1e-50}, "eps is 1e-50"),
        ],
    )
    def test_values_out_of_range(self, setting, message):
        with pytest.raises(ValueError, match=message):
            zeta.Hyper(**setting)

    def test_scalars_of_numpy_do_not_widen_the_state(self):
        hyper = zeta.Hyper(np.float64(1e-3), [np.float64(0.9), np.float32(0.99)], np.float64(1e-8), np.int64(0))
        param = self.param.astype("float32")
        for module in (zeta, adamw):
            after, state = module.update(param, module.init(param), param, hyper)
            assert all(array.dtype == "float32" for array in (after, *state.values()))

    def test_hyper_is_immutable(self):
        with pytest.raises(AttributeError):
            zeta.Hyper().lr = 1.0

    def test_shapes_that_do_not_fit(self):
        state = zeta.init(self.param)
        with pytest.raises(ValueError, match=r"grad has shape \(6, 4\), but its parameter has \(4, 6\)"):
            zeta.update(np.ones((6, 4)), state, self.param, zeta.Hyper())
        with pytest.raises(ValueError, match=r"the state is \{'exp_avg': \(4, 6\), .* needs \{'exp_avg': \(2, 3\)"):
            zeta.update(np.ones((2, 3)), state, np.ones((2, 3)), zeta.Hyper())
        assert not any(array.any() for array in state.values())

    @pytest.mark.parametrize("shape", [(4, 1), (1,), ()])
    def test_a_vectors_gradient_is_not_broadcast(self, shape):
        w = np.ones(4)
        with pytest.raises(ValueError, match="they must agree"):
            adamw.update(np.ones(shape), adamw.init(w), w, zeta.Hyper())

    def test_another_optimizers_state(self):
        for update, state in (
            (adamw.update, zeta.init(self.param)),
            (zeta.update, adamw.init(self.param)),
            (zeta.update, {"exp_avg": self.param}),
        ):
            with pytest.raises(ValueError, match="make it with this optimizer's init"):
                update(self.param, state, self.param, zeta.Hyper())

    def test_integers(self):
        for call in (zeta.newton_schulz, zeta.init):
            with pytest.raises(TypeError, match=r"array of int64 .* convert it"):
                call(np.arange(6).reshape(2, 3))
        with pytest.raises(TypeError, match="complex64"):
            zeta.newton_schulz(np.ones((2, 3), "complex64"))

    def test_a_vector_is_not_a_matrix(self):
        with pytest.raises(ValueError, match="use zeta"):
            steps(np.ones(4), [np.ones(4)])

    def test_a_backend_that_is_not_there(self):
        with pytest.raises(ValueError, match="no backend 'jax'"):
            zeta.backend("jax")


def test_import_brings_in_no_array_library():
    code = "import sys, zeta, zeta.adamw, zeta.cli; print([m for m in ('numpy', 'torch', 'mlx') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
