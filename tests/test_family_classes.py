"""The family's optimizer classes: the pure functions, with Zeta's routing, saved state and half precision."""

import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import TorchRun

import zeta
from zeta import adamw, family, preconditioned
from zeta.parity.checks import TOLERANCE, assert_close, relative_error, spectral_polynomial
from zeta.routing.layout import Route
from zeta.storage import WRITERS, lacked, writers

RULES = {name: kind.rule for name, kind in vars(zeta.backend("auto")).items() if isinstance(kind, type)}
by_class = pytest.mark.parametrize("kind", RULES)
STEP = TOLERANCE["float32"].step
# It divides an entry of u by its own size, and bfloat16 leaves one near zero no digit: up to 4.3e-2 in eight draws.
ADAMUON = 0.06
# Query, key and value of grouped heads side by side, and a stack of experts.
SHAPES = {"qkv.weight": (24, 12), "down.weight": (12, 12), "experts.up.weight": (2, 12, 12), "norm.weight": (12,)}
QKV = Route("zeta", (1, 24, 12), "query, key, value", (12, 8, 4))
OPTIONS = {
    "lr": 1e-2,
    "routes": {
        "qkv.weight": QKV,
        "down.weight": zeta.route("down.weight", (12, 12)),
        "experts.up.weight": zeta.route("experts.up.weight", (2, 12, 12)),
        "norm.weight": zeta.route("norm.weight", (12,)),
    },
}


def draw(count=6):
    rng = np.random.default_rng(7)
    params = {n: rng.standard_normal(s).astype("float32").astype("float64") for n, s in SHAPES.items()}
    drift = {n: rng.standard_normal(s) for n, s in SHAPES.items()}
    grads = [{n: (d + rng.standard_normal(d.shape)).astype("float32") for n, d in drift.items()} for _ in range(count)]
    return params, grads


PARAMS, GRADS = draw()


@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_a_class_has_the_rule_of_its_name(library):
    pytest.importorskip(library)
    kinds = {name: kind for name, kind in vars(zeta.backend(library)).items() if isinstance(kind, type)}
    assert kinds.keys() == RULES.keys() and kinds.pop("Zeta").rule is family.zeta
    for name, kind in kinds.items():
        assert (kind.make or kind.rule.whole).__name__ == name.lower()


def test_messages_know_which_optimizer_keeps_what():
    keys = {kind: rule.keeps for kind, rule in RULES.items()} | {"Zeta": family.zeta.keeps}
    keys["AdamW"] = adamw.init(PARAMS["norm.weight"])
    names = {kind: [name for k, name in WRITERS.items() if kind in re.findall(r"\w+", name)] for kind in keys}
    names["Muon"].remove("torch.optim's SGD or Muon")
    for kind, former in (("Shampoo", "exp_avg left right"), ("SOAP", "exp_avg exp_avg_sq left right steps")):
        assert names[kind].pop(0) == kind and lacked(former.split()) == keys[kind].keys() - set(former.split())
    for kind, kept in keys.items():
        told = writers([*kept, "remainder"])
        if "..." in told:  # some of several
            assert kept.keys() == {"exp_avg"} and names[kind] in ([told], []), kind
        else:
            assert names[kind] == [told], kind
    assert writers([]) == writers(["exp_avg", "max_exp_avg_sq"]) == "an optimizer unknown here"


@by_class
@pytest.mark.parametrize("library, lr", [("torch", "lr"), ("mlx", "learning_rate")])
def test_a_class_starts_from_its_rules_defaults_and_says_so(kind, library, lr):
    pytest.importorskip("torch" if library == "torch" else "mlx.core")
    from importlib import import_module

    make, want = getattr(import_module(f"zeta.backends.{library}"), kind), RULES[kind].defaults
    if library == "torch":
        import torch

        got = make([("up.weight", torch.nn.Parameter(torch.ones(4, 4)))]).param_groups[0]
        assert [got[k] for k in ("lr", "betas", "eps", "weight_decay")] == [want.lr, want.betas, want.eps, 0.1]
    else:
        got = make()
        assert abs(got.learning_rate.item() - want.lr) < 1e-8
        assert (got.betas, got.eps, got.weight_decay) == (want.betas, want.eps, want.weight_decay)
    text = " ".join(make.__doc__.split())
    assert f"{lr}={'1e-3' if kind == 'Zeta' else want.lr}, betas={want.betas}" in text
    assert re.search(r"times AdamW's|twice AdamW's", text) and re.search("help|AdamW's half", text)


@by_class
def test_autocast_changes_no_step(kind):
    torch = pytest.importorskip("torch")
    results = []
    for enabled in (False, True):
        run = TorchRun(PARAMS, OPTIONS, kind=kind)
        with torch.autocast("cpu", enabled=enabled, dtype=torch.bfloat16):
            for grad in GRADS[:3]:
                run.step(grad)
        results.append(run.read())
    assert all((results[0][name] == results[1][name]).all() for name in PARAMS)


def alone(rule, param, grads, hyper):
    state = rule.init(param)
    for g in grads:
        param, state = rule.update(g.astype("float64"), state, param, hyper, spectral_polynomial)
    return param


def expected(kind, grads=GRADS, hyper=None):
    """Every parameter after the pure functions in float64, the fused one piece by piece."""
    rule = RULES[kind]
    hyper = hyper or replace(rule.defaults, lr=1e-2)
    want = {n: alone(rule, PARAMS[n], [g[n] for g in grads], hyper) for n in ("down.weight", "experts.up.weight")}
    cuts = [slice(0, 12), slice(12, 20), slice(20, 24)]
    qkv = [alone(rule, PARAMS["qkv.weight"][c], [g["qkv.weight"][c] for g in grads], hyper) for c in cuts]
    w, state = PARAMS["norm.weight"], adamw.init(PARAMS["norm.weight"])
    for g in grads:
        w, state = adamw.update(g["norm.weight"].astype("float64"), state, w, replace(hyper, weight_decay=0.0))
    return want | {"qkv.weight": np.concatenate(qkv), "norm.weight": w}


def float32(kind):
    """The option of a class that multiplies at all."""
    return {"ns_dtype": "float32"} if RULES[kind].orthogonalizes else {}


def run(new_run, kind, grads=GRADS, dtype="float32", **options):
    run = new_run(PARAMS, OPTIONS | options, dtype, kind=kind)
    for g in grads:
        run.step(g)
    return run


def errors(kind, got):
    """{parameter: its relative error}; of SOAP's fused layer only the square piece: see zeta.preconditioned.soap()."""
    want, rows = expected(kind), {"qkv.weight": slice(0, 12)} if kind == "SOAP" else {}
    parts = {name: rows.get(name, slice(None)) for name in PARAMS}
    return {name: relative_error(got[name][part], want[name][part], PARAMS[name][part]) for name, part in parts.items()}


def bounds(default_run, kind):
    """{parameter: its bound}; AdamW multiplies no matrices."""
    widest = (kind, default_run.dtype) == ("AdaMuon", "bfloat16")
    return dict.fromkeys(PARAMS, ADAMUON if widest else default_run.bound(kind)) | {"norm.weight": STEP}


@by_class
def test_is_the_pure_function_for_every_matrix_and_adamw_for_the_rest(default_run, kind):
    got, most = errors(kind, run(default_run, kind).read()), bounds(default_run, kind)
    assert all(got[name] <= most[name] for name in PARAMS), got


@by_class
def test_a_rate_off_by_four_bounds_is_caught(default_run, kind):
    """The control of each parameter's bound, through the class."""
    most = bounds(default_run, kind)
    for rtol in set(most.values()):
        got = errors(kind, run(default_run, kind, lr=OPTIONS["lr"] * (1 + 4 * rtol)).read())
        assert all(got[name] > rtol for name in PARAMS if most[name] == rtol), got


@by_class
def test_the_fused_layer_taken_as_one_matrix_moves_differently(new_run, kind):
    """The control: other pieces, or theirs in another order, would be caught. Signs do not know of pieces."""
    routes = OPTIONS["routes"] | {"qkv.weight": Route("zeta", (1, 24, 12), "query, key, value", (8, 12, 4))}
    got = run(new_run, kind, routes=routes, **float32(kind)).read()
    error = relative_error(got["qkv.weight"], expected(kind)["qkv.weight"], PARAMS["qkv.weight"])
    assert error > 100 * STEP if kind != "Signum" else error < STEP


@by_class
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_continues_exactly(default_run, kind, dtype, tmp_path):
    whole, first = (run(default_run, kind, GRADS[:3], dtype) for _ in range(2))
    first.save(tmp_path / "state")
    second = default_run(first.read(), OPTIONS, dtype, kind=kind)
    second.load(tmp_path / "state")
    for grad in GRADS[3:]:
        whole.step(grad)
        second.step(grad)
    for name, want in whole.read().items():
        assert_close(second.read()[name], want, 0.0)


@pytest.mark.parametrize("kind", ["Muon", "NorMuon"])
def test_half_precision_parameters_end_where_float32_ones_do(new_run, kind):
    """A step of 2e-4 is lost on bfloat16 numbers near 1, which are 4e-3 apart, unless the remainder keeps it."""
    ends = []
    for dtype in ("float32", "bfloat16"):
        run = new_run({"down.weight": np.ones((12, 12))}, {"lr": 1e-3, "weight_decay": 0.0}, dtype, kind=kind)
        for _ in range(100):
            run.step({"down.weight": np.sign(GRADS[0]["down.weight"])})
        ends.append(run.read()["down.weight"])
    assert np.abs(ends[1] - ends[0]).max() < 1.1 * 2**-8  # half a step of bfloat16, and the remainder's rounding
    assert np.abs(ends[0] - 1).mean() > 2 * 2**-8


@by_class
def test_one_rate_drives_matrices_and_the_rest(new_run, kind):
    moving = run(new_run, kind, GRADS[:2], weight_decay=0.0)
    before = moving.read()
    moving.set_lr(0.0)
    moving.step(GRADS[2])
    for name, want in before.items():
        assert_close(moving.read()[name], want, 1e-7)


@pytest.mark.parametrize("kind, other", [("Muon", "OLion"), ("NorMuon", "Muon"), ("Muon", "Zeta"), ("Zeta", "AdaMuon")])
def test_another_optimizers_state_is_refused(new_run, kind, other, tmp_path):
    run(new_run, other, GRADS[:1]).save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"start anew|the one that wrote it|needs \['exp_avg'"):
        run(new_run, kind, GRADS[:1]).load(tmp_path / "state")


@pytest.mark.parametrize(
    "kind, setting, message",
    [
        ("Schattor", {"p": 0.5}, "p is 0.5"),
        ("Dion2", {"fraction": 2.0}, "fraction is 2.0"),
        ("AdaGO", {"gamma": 0}, "gamma is 0"),
        ("SOAP", {"precondition_frequency": 0}, "precondition_frequency is 0"),
        ("Muon", {"lr": -1.0}, "lr"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(new_run, kind, setting, message):
    with pytest.raises(ValueError, match=message):
        new_run(PARAMS, setting, kind=kind)


@pytest.mark.parametrize("kind, setting", [("Muon", {"p": 2.0}), ("Schattor", {"fraction": 0.5})])
def test_unknown_settings_are_refused(new_run, kind, setting):
    with pytest.raises(TypeError, match=next(iter(setting))):
        new_run(PARAMS, setting, kind=kind)


@pytest.mark.parametrize("kind", ["Signum", "SOAP", "Shampoo", "Schattor"])
@pytest.mark.parametrize(
    "setting", [{"ns_steps": 4}, {"coefficients": zeta.COEFFICIENTS["you"]}, {"ns_dtype": "float16"}]
)
def test_what_runs_no_newton_schulz_takes_no_options_of_it(new_run, kind, setting):
    with pytest.raises(TypeError, match=f"{kind} runs no Newton-Schulz"):
        new_run(PARAMS, setting, kind=kind)


@pytest.mark.parametrize(
    "kind, setting, rule",
    [
        ("Schattor", {"p": 2.0}, preconditioned.schattor(2.0)),
        ("Dion2", {"fraction": 0.5}, family.dion2(0.5)),
        ("AdaGO", {"gamma": 2.0, "floor": 0.1}, family.adago(2.0, 0.1)),
        ("SOAP", {"precondition_frequency": 2}, preconditioned.soap(2)),
        ("Shampoo", {"precondition_frequency": 2}, preconditioned.shampoo(2)),
    ],
)
def test_settings_reach_the_rule(new_run, kind, setting, rule):
    got = run(new_run, kind, **float32(kind), **setting).read()["down.weight"]
    want = alone(rule, PARAMS["down.weight"], [g["down.weight"] for g in GRADS], zeta.Hyper(lr=1e-2))
    assert_close(got, want, STEP, PARAMS["down.weight"])
    assert relative_error(got, expected(kind)["down.weight"], PARAMS["down.weight"]) > 100 * STEP


def test_both_libraries_keep_the_same_state():
    """A checkpoint of either is one of the other: the same keys, and flat arrays in the same order of pieces."""
    torch, mlx = (pytest.importorskip(name) for name in ("torch", "mlx.utils"))
    from conftest import MlxRun, TorchRun

    assert torch and mlx
    for kind in RULES:
        first, second = (run(new, kind, GRADS[:2], **float32(kind)) for new in (TorchRun, MlxRun))
        flat = dict(mlx.tree_flatten(second.optimizer.state))
        for name, p in first.tensors.items():
            for key, value in first.optimizer.state[p].items():
                assert kind == "SOAP" or value.shape == flat[f"{name}.{key}"].shape
                if kind != "SOAP":
                    got = np.array(flat[f"{name}.{key}"]).astype("float64")
                    assert_close(got, value.double().numpy(), STEP)


class TestTorch:
    @pytest.fixture(autouse=True)
    def library(self):
        self.torch = pytest.importorskip("torch")
        self.backend = pytest.importorskip("zeta.backends.torch")

    def weight(self):
        p = self.torch.nn.Parameter(self.torch.ones(12, 12))
        p.grad = self.torch.tensor(GRADS[0]["down.weight"])
        return p

    @by_class
    def test_a_tensor_rate_and_a_copy(self, kind):
        import copy

        ends = []
        for lr in (0.01, self.torch.tensor([0.01])):
            p = self.weight()
            optimizer = getattr(self.backend, kind)([("down.weight", p)], lr=lr)
            optimizer.step()
            twin = copy.deepcopy(optimizer)
            for each in (optimizer, twin):
                (q,) = each.param_groups[0]["params"]
                q.grad = p.grad.clone()
                each.step()
            assert self.torch.equal(p, q)
            ends.append(p.detach().numpy())
        assert_close(ends[0], ends[1], 1e-6)

    def test_a_groups_own_setting(self):
        p, q = self.weight(), self.weight()
        groups = [{"params": [("down.weight", p)], "p": 2.0}, {"params": [("up.weight", q)]}]
        optimizer = self.backend.Schattor(groups, lr=0.1)
        optimizer.step()
        assert [group["p"] for group in optimizer.param_groups] == [2.0, 4.0] and not self.torch.equal(p, q)
        with pytest.raises(ValueError, match=r"p is 0\.1"):
            optimizer.add_param_group({"params": [("a.weight", self.weight())], "p": 0.1})

    @pytest.mark.parametrize("kind, setting, value", [("Dion2", "fraction", 3.0), ("AdaGO", "gamma", 0.0)])
    def test_a_setting_written_into_a_group_is_refused_before_anything_changes(self, kind, setting, value):
        p, q = self.weight(), self.weight()
        groups = [{"params": [("norm.weight", q)], "treatment": "adamw"}, {"params": [("down.weight", p)]}]
        optimizer = getattr(self.backend, kind)(groups)
        optimizer.param_groups[1][setting] = value
        with pytest.raises(ValueError, match=f"{setting} is {value}"):
            optimizer.step()
        assert not optimizer.state and all((x == 1).all() for x in (p, q))

    def test_maximize_walks_the_other_way(self):
        p, q = self.weight(), self.weight()
        q.grad = -p.grad
        self.backend.Muon([("up.weight", p)], maximize=True).step()
        self.backend.Muon([("up.weight", q)]).step()
        assert self.torch.equal(p, q)
