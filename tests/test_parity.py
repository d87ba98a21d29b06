"""The checks of `zeta parity`, one test a check, and proof that each can fail."""

from dataclasses import replace

import numpy as np
import pytest

from zeta.controls import CONTROLS
from zeta.core import COEFFICIENTS
from zeta.machine import Absent
from zeta.parity import (
    CHECKS,
    TOLERANCE,
    assert_close,
    device,
    oracle_steps,
    relative_error,
    run,
    spectral_polynomial,
    step,
)
from zeta.samples import PARAMETERS, ten_steps


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds(check, target):
    for name, got, want, rtol, origin in check(target):
        try:
            assert_close(got, want, rtol, origin)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_a_deliberate_mistake_is_caught_on_every_target(control, target):
    first = next(result for result in run(control(target)) if not result.ok)
    assert "Error" not in first.check, "caught by an exception, not by its error"


def test_a_wrong_coefficient_is_caught_in_the_step_alone(target):
    for name, got, want, rtol, origin in step(CONTROLS["coefficient"](target)):
        if name.endswith(("wide.weight", "conv.weight")):
            assert relative_error(got, want, origin) > rtol


def test_a_mistake_in_the_backends_own_newton_schulz_is_caught_through_its_optimizer(new_run, monkeypatch):
    """The optimizer must be held to the oracle itself, not to the function that it happens to call."""
    params, grads, hyper = ten_steps()
    wrong = tuple((1.01 * a, b, c) for a, b, c in COEFFICIENTS["jordan"])
    trained = new_run(params, {"lr": hyper.lr, "coefficients": wrong})
    for grad in grads:
        trained.step(grad)
    name = "layers.0.wide.weight"
    assert relative_error(trained.read()[name], oracle_steps()[name], params[name]) > TOLERANCE["float32"].step


class TestComparison:
    def test_raises_on_a_small_difference(self):
        assert_close(np.full(3, 1.0 + 1e-9), np.ones(3), 1e-8)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(np.full(3, 1.0 + 1e-7), np.ones(3), 1e-8)

    @pytest.mark.parametrize("got", [np.ones((3, 1)), np.array([1, 1, np.nan]), np.array([1, 1, np.inf]), np.ones(2)])
    def test_raises_on_another_shape_and_on_what_is_not_finite(self, got):
        with pytest.raises(AssertionError):
            assert_close(got, np.ones(3), 1e9)

    def test_is_relative_to_the_distance_moved(self):
        assert relative_error(np.array([1.02]), np.array([1.01]), np.array([1.0])) == pytest.approx(1.0)

    def test_of_zeros_is_absolute(self):
        assert relative_error(np.zeros(2), np.zeros(2)) == 0
        with pytest.raises(AssertionError):
            assert_close(np.full(2, 1e-3), np.zeros(2), 1e-6)


def test_the_oracle_is_the_polynomial_of_a_diagonal_matrix():
    s = np.array([3.0, 2.0, 0.5])
    p = s / np.linalg.norm(s)
    for a, b, c in COEFFICIENTS["jordan"]:
        p = a * p + b * p**3 + c * p**5
    assert_close(spectral_polynomial(np.diag(s)), np.diag(p), 1e-13)


def test_an_absent_device_that_belongs_to_the_machine_is_a_failure():
    (result,) = run(Absent("mlx", "gpu", "this is an Apple machine, but MLX would run on its CPU", expected=True))
    assert not result.ok
    assert list(run(Absent("torch", "cuda", "none"))) == []


def test_a_device_other_than_the_one_asked_for_is_a_failure(target):
    ((name, got, want, rtol, _),) = device(replace(target, used=lambda x: "elsewhere"))
    assert name == "device: elsewhere" and relative_error(got, want) > rtol


def test_the_ten_steps_move_every_parameter_and_have_an_idle_expert():
    params, grads, _ = ten_steps()
    assert params.keys() == PARAMETERS.keys()
    assert not any(grad["layers.0.experts.up.weight"][1].any() for grad in grads[5:])
