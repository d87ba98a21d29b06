"""The checks of `zeta parity`, and proof that each can fail."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from zeta import newton_schulz_forms as forms
from zeta.core import COEFFICIENTS
from zeta.family import COMPARED
from zeta.parity import checks
from zeta.parity.cases import PARAMETERS, gaussian, nearest_to_zero, parameters, ten_steps, trajectory
from zeta.parity.checks import (
    CHECKS,
    TOLERANCE,
    assert_close,
    coefficients,
    device,
    newton_schulz,
    oracle_step,
    relative_error,
    run,
    spectral_polynomial,
    tolerance,
)
from zeta.parity.mistakes import CONTROLS, RED, place, where
from zeta.parity.paths import PATHS, Passage, through, watch
from zeta.parity.targets import Absent, precision_note, tf32_note

SEEN = {}  # results of all checks, by the target's name


def results(target):
    if target.name not in SEEN:
        SEEN[target.name] = {result.check: result for result in run(target)}
    return SEEN[target.name]


def test_holds(target):
    assert [result for result in results(target).values() if not result.ok] == []


def test_every_path_has_three_checks_of_newton_schulz_and_three_of_steps(target):
    counts = Counter(("step" in r.family, path) for r in results(target).values() for path in r.paths)
    for path in set(target.paths) - {"adamw"}:
        assert counts[False, path] >= 3 and counts[True, path] >= 3, path
    assert {path for _, path in counts} == set(target.paths)


def test_every_optimizer_takes_every_path(target):
    for name in COMPARED:
        taken = {path for r in results(target).values() if r.family == f"step: {name}" for path in r.paths}
        core_too = {"core"} if target.steps else set()  # where "core: step" reaches it
        assert taken == set(target.paths) - core_too, name


def test_stacks_of_several_parameters_go_together(target):
    if target.steps is None:
        pytest.skip("no optimizer class")
    for name in COMPARED:
        for parameter in ("layers.0.wide", "layers.1.wide", "layers.0.experts.up", "layers.1.experts.up"):
            assert "batch" in results(target)[f"step: {name} {parameter}.weight"].paths
        assert "batch" not in results(target)[f"step: {name} layers.0.tall.weight"].paths


def fewer(control):
    """The checks in which a mistake must show, of Eta alone; of Newton-Schulz without those that show no more."""
    families = {check: check.__name__ for check in CHECKS if "step" not in check.__name__ or "Eta" in check.__name__}
    families[newton_schulz] = "Newton-Schulz"
    if control == "restart":  # eight steps start again
        families[coefficients] = "Newton-Schulz"
    return [check for check, family in families.items() if family in RED[control]]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_deliberate_mistake_shows_exactly_where_the_table_says(control, target):
    """And nowhere else, by all checks where those are fast; elsewhere by the checks in which it must show."""
    wrong = CONTROLS[control](target)
    if wrong is target:
        assert not set.union(*map(set, RED[control].values())) & set(target.paths)
        return
    full = target.name in ("numpy cpu float32", "torch cpu float32")
    ran = list(run(wrong, None if full else fewer(control)))
    normal, families = results(target), {place(r) for r in ran}
    red = {(place(r), frozenset(normal.get(r.check, r).paths)) for r in ran if not r.ok}
    places = where(control, target)
    assert [(family, paths) for family, paths in red if not paths & places.get(family, frozenset())] == []
    there = [*ran, *(r for r in normal.values() if place(r) in families)]  # left out or not
    could = {(place(r), path) for r in there for path in normal.get(r.check, r).paths}
    must = {(family, path) for family, paths in places.items() for path in paths if (family, path) in could}
    assert must and must <= {(family, path) for family, paths in red for path in paths}


def test_the_controls_fail_by_their_errors_and_not_by_exceptions(target):
    ran = run(CONTROLS["coefficient"](target), [device, newton_schulz])
    assert not any("Error" in r.check or "Warning" in r.check for r in ran)


def test_a_mistake_in_the_backends_own_newton_schulz_is_caught_through_its_optimizer(new_run, monkeypatch):
    """The optimizer must be held to the oracle itself, not to the function that it happens to call."""
    params, grads, hyper = ten_steps()
    wrong = tuple((1.01 * a, b, c) for a, b, c in COEFFICIENTS["jordan"])
    trained = new_run(params, {"lr": hyper.lr, "coefficients": wrong})
    for grad in grads:
        trained.step(grad)
    name = "layers.0.wide.weight"
    want = oracle_step("Zeta", name, PARAMETERS[name])
    assert relative_error(trained.read()[name], want, params[name]) > TOLERANCE["float32"].step


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
    ((name, got, want, rtol, *_),) = device(replace(target, used=lambda x: "elsewhere"))
    assert name == "device: elsewhere" and relative_error(got, want) > rtol


def test_the_ten_steps_move_every_parameter_and_have_an_idle_expert():
    params, grads, _ = ten_steps()
    assert params.keys() == PARAMETERS.keys()
    assert not any(grad["layers.0.experts.up.weight"][1].any() for grad in grads[5:])


def test_no_sign_is_left_to_rounding(target):
    """AdaMuon takes the momentum's signs, Eta a single row's: neither comes near zero, for what the gradients are."""
    for name, shape in parameters(target).items():
        _, grads = trajectory(name, shape)
        given = [g for g in grads.values() if g.any()]
        size = np.maximum(np.max(np.abs(given), axis=0), 1e-30)
        assert (nearest_to_zero([g / size for g in given]) > 1e-3).mean() > 0.999, name
        assert nearest_to_zero([g / size for g in given]).min() > 1e-4, name
    noise = np.random.default_rng(0).standard_normal((10, 100, 100))
    assert nearest_to_zero(list(noise)).min() < 1e-4  # the control


class TestPaths:
    def test_of_a_parameter_are_those_of_its_own_matrices(self):
        seen = {Passage("direct", (2, 4, 8)), Passage("batch", (2, 4, 8)), Passage("gram", (1, 128, 192))}
        assert through(seen, (1, 8, 4)) == ("direct", "batch")
        assert through(seen, (2, 4, 8)) == ("direct",)  # no more than its own
        assert through(seen) == ("direct", "gram", "batch")
        assert through(seen, ()) == ("adamw",)

    def test_are_watched_only_within(self, target):
        before = forms.gram, target.products and target.products.symmetric
        with watch(target.products) as seen:
            target.newton_schulz(target.array(gaussian((128, 192))), COEFFICIENTS["jordan"])
        assert before == (forms.gram, target.products and target.products.symmetric)
        assert {p.path for p in seen} >= ({"gram", "restart"} if target.products else {"core"})

    def test_one_that_no_check_takes_is_a_failure(self, target, monkeypatch):
        monkeypatch.setattr(checks, "CHECKS", [device])
        target = replace(target, paths=("core", "no such path"), steps=None, products=None)
        missed = [r for r in run(target) if r.family == "paths"]
        assert [(r.check, r.ok) for r in missed] == [("paths: no check went through no such path", False)] or (
            {r.paths for r in missed} == {("core",), ("no such path",)}
        )

    def test_are_all_told(self):
        assert all(set(paths) <= set(PATHS) for places in RED.values() for paths in places.values())


def test_auto_is_held_to_the_dtype_that_the_backend_chooses(target):
    chosen = target.chosen or target.dtype
    assert tolerance(target) == TOLERANCE[chosen] and chosen != "auto"


def test_another_setting_in_training_is_told():
    assert precision_note("highest") == "" and "'high'" in precision_note("high")
    assert tf32_note("0") == "" and "not set" in tf32_note(None) and "is 1" in tf32_note("1")


def test_torch_s_precision_is_told_and_full_while_checked():
    torch = pytest.importorskip("torch")
    from zeta.parity.targets import _torch_target

    torch.set_float32_matmul_precision("high")
    try:
        target = _torch_target("cpu", "float32")
        assert "'high'" in target.note
        with target.scope():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
