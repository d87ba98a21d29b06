"""Both optimizer classes, driven alike: schedules, saved state, missing gradients, half-precision parameters."""

import numpy as np
import pytest

import zeta
from zeta.parity.cases import ten_steps
from zeta.parity.checks import TOLERANCE, assert_close, relative_error, spectral_polynomial
from zeta.parity.targets import numpy_target, pure_steps

PARAMS, GRADS, HYPER = ten_steps()
STEP = TOLERANCE["float32"].step
MATRICES = [name for name, p in PARAMS.items() if zeta.route(name, p.shape).treatment == "zeta"]


def expected(params, grads, hyper=HYPER):
    return pure_steps(numpy_target("float64"), params, grads, hyper, spectral_polynomial)


def assert_moved_alike(got, want, origin, rtol=STEP):
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], rtol, origin[name])


def assert_steps(default_run, options, grads, hyper):
    """Every matrix within the bound of the products, everything else within float32's."""
    run, want = default_run(PARAMS, options), expected(PARAMS, grads, hyper)
    for grad in grads:
        run.step(grad)
    got = run.read()
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], default_run.bound() if name in MATRICES else STEP, PARAMS[name])


def test_zetas_defaults_are_those_of_hyper(default_run):
    assert_steps(default_run, {}, GRADS[:1], zeta.Hyper())


SETTINGS = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}


def test_settings_reach_both_treatments(default_run):
    assert_steps(default_run, SETTINGS, GRADS, zeta.Hyper(**SETTINGS))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_off_is_caught(default_run, setting):
    """The rate by four bounds, the others by as much as that takes."""
    off = {"lr": 0.02 * (1 + 4 * default_run.bound()), "betas": (0.75, 0.9), "eps": 1e-2, "weight_decay": 3.0}
    with pytest.raises(AssertionError, match="relative error"):
        assert_steps(default_run, SETTINGS | {setting: off[setting]}, GRADS, zeta.Hyper(**SETTINGS))


def test_one_rate_drives_matrices_and_the_rest(new_run):
    """A peer's scheduler drives only one of its two optimizers."""
    run = new_run(PARAMS, {"lr": 1.0, "weight_decay": 0.0})
    run.set_lr(0.0)
    run.step(GRADS[0])
    assert_moved_alike(run.read(), PARAMS, {name: 0.0 for name in PARAMS}, rtol=1e-7)
    run.set_lr(1e-2)
    run.step(GRADS[1])
    for name, before in PARAMS.items():
        assert relative_error(run.read()[name], before) > 1e-3


def test_saved_and_loaded_continues_exactly(default_run, tmp_path):
    options = {"lr": 1e-2}
    whole, first = default_run(PARAMS, options), default_run(PARAMS, options)
    for grad in GRADS[:5]:
        whole.step(grad)
        first.step(grad)
    first.save(tmp_path / "state")
    second = default_run(first.read(), options)
    second.load(tmp_path / "state")
    for grad in GRADS[5:]:
        whole.step(grad)
        second.step(grad)
    for name, want in whole.read().items():
        assert_close(second.read()[name], want, 0.0)


def test_a_parameter_without_a_gradient_stays(new_run):
    missing = ("layers.0.wide.weight", "layers.0.norm.weight")
    run = new_run(PARAMS, {"lr": 1e-2, "ns_dtype": "float32"})
    some = [{name: g for name, g in grad.items() if name not in missing} for grad in GRADS[:3]]
    for grad in [GRADS[0], *some]:
        run.step(grad)
    once, rest = expected(PARAMS, GRADS[:1]), expected(PARAMS, [GRADS[0], *GRADS[:3]])
    assert_moved_alike(run.read(), {n: (once if n in missing else rest)[n] for n in PARAMS}, PARAMS, rtol=1e-4)


def test_no_gradient_at_all_is_no_step(new_run):
    run = new_run(PARAMS)
    run.step({})
    assert_moved_alike(run.read(), PARAMS, {name: 0.0 for name in PARAMS}, rtol=0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters_keep_float32_moments(new_run, dtype):
    """Moments in bfloat16 would put the update off by 0.7 after ten steps."""
    run = new_run(PARAMS, {"lr": 0.1}, dtype)
    start = run.read()
    for grad in GRADS:
        run.step(grad)
    for name in ("layers.0.wide.weight", "layers.0.norm.weight"):
        assert all("float32" in str(moment.dtype) for moment in run.moments(name))
        assert dtype in str(run.array(start[name]).dtype)
    want = expected(start, GRADS, zeta.Hyper(lr=0.1))
    for name in ("layers.0.wide.weight", "layers.0.long.weight", "layers.0.experts.up.weight"):
        assert_close(run.read()[name], want[name], 0.05, start[name])  # rounding ten times to the parameter's dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_thousand_small_steps_in_half_precision_end_where_float32_does(new_run, dtype):
    """Each step alone is below half of what bfloat16 can show: rounded away, the loss would not fall at all."""
    rng = np.random.default_rng(0)
    x, goal = rng.standard_normal((64, 16)), rng.standard_normal((24, 16))
    params = {"up.weight": goal + 0.5 * rng.standard_normal(goal.shape), "up.bias": np.ones(24)}
    start = new_run(params, {}, "bfloat16").read()  # so that all begin at the same numbers

    def error(now):
        return x @ (now["up.weight"] - goal).T + now["up.bias"]

    losses = {}
    for kind in ("float32", dtype):
        run = new_run(start, {"lr": 3e-4, "weight_decay": 0.0}, kind)
        for _ in range(1000):
            e = error(run.read()) / len(x)
            run.step({"up.weight": e.T @ x, "up.bias": e.sum(0)})
        losses[kind] = np.mean(error(run.read()) ** 2)
    assert losses["float32"] < 0.9 * np.mean(error(start) ** 2)
    assert_close(losses[dtype], losses["float32"], 0.02)


def test_steps_below_rounding_are_kept_until_they_show(new_run):
    weight = 1 + np.random.default_rng(0).random((24, 16))
    run = new_run({"up.weight": weight}, {"lr": 3e-4, "weight_decay": 0.0}, "bfloat16")
    start = run.read()
    run.step({"up.weight": np.ones_like(weight)})
    assert_close(run.read()["up.weight"], start["up.weight"], 0.0)  # 6e-5 from 1 to 2, where bfloat16's step is 8e-3
    for _ in range(199):
        run.step({"up.weight": np.ones_like(weight)})
    moved = (start["up.weight"] - run.read()["up.weight"]).mean()
    assert abs(moved - 200 * 3e-4 * 0.2) < 2**-8  # half a step of bfloat16


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20])
def test_gradients_of_any_size_move_a_matrix_alike(new_run, size):
    """Where eps is larger than a gradient, or its square is zero in float32, the momentum alone gives the direction."""
    name = "layers.0.wide.weight"
    run = new_run({name: PARAMS[name]}, {"lr": 1e-2, "weight_decay": 0.0})
    start = run.read()[name]
    run.step({name: GRADS[0][name] * size})
    assert_close(np.sqrt(np.mean((run.read()[name] - start) ** 2)), np.float64(0.2 * 1e-2), 1e-3)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": float("nan")}]
)
def test_values_out_of_range_are_refused_at_once(new_run, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        new_run(PARAMS, options)


def test_unknown_options_are_refused(new_run):
    with pytest.raises(TypeError, match="momentum"):
        new_run(PARAMS, {"momentum": 0.9})


def test_one_matrix_alone_and_many_batches_agree(default_run):
    """Batches are an optimisation: a parameter's step does not depend on its neighbours."""
    together, name = default_run(PARAMS, {"lr": 1e-2}), "layers.1.wide.weight"
    alone = default_run({name: PARAMS[name]}, {"lr": 1e-2})
    for grad in GRADS[:3]:
        together.step(grad)
        alone.step({name: grad[name]})
    assert_close(together.read()[name], alone.read()[name], default_run.bound(), PARAMS[name])


def test_embeddings_and_head_are_not_orthogonalized(new_run):
    """A peer sends both to Newton-Schulz; under AdamW the first step of every entry is lr."""
    params = {name: np.ones((6, 4)) for name in ("embed_tokens.weight", "lm_head.weight")}
    grad = np.random.default_rng(0).standard_normal((6, 4))
    run = new_run(params, {"lr": 0.5, "weight_decay": 0.0})
    run.step(dict.fromkeys(params, grad))
    for after in run.read().values():
        assert_close(after, 1 - 0.5 * np.sign(grad), 1e-5)


class TestTorch:
    """What only torch users ask for."""

    @pytest.fixture(autouse=True)
    def library(self):
        self.torch = pytest.importorskip("torch")
        from zeta.backends.torch import Zeta

        self.Zeta = Zeta

    def weight(self, shape=(8, 12), **options):
        return self.torch.nn.Parameter(self.torch.ones(shape, **options))

    def test_is_an_optimizer_that_a_scheduler_drives(self):
        p = self.weight()
        optimizer = self.Zeta([("up.weight", p)], lr=1.0, weight_decay=0.0)
        schedule = self.torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            before, p.grad = p.detach().clone(), self.torch.randn(p.shape)
            optimizer.step()
            schedule.step()
            rms = (p.detach() - before).pow(2).mean().sqrt()
            assert_close(rms.numpy(), np.float32(0.2 * 0.5**step), 1e-5)
        assert isinstance(optimizer, self.torch.optim.Optimizer)

    def test_closure_is_called_with_gradients_and_its_loss_returned(self):
        p = self.weight()
        optimizer = self.Zeta([("up.weight", p)], lr=1e-2)

        def closure():
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 96.0
        assert not self.torch.equal(p, self.torch.ones_like(p))

    def test_a_tensor_rate(self):
        p, q = self.weight(), self.weight()
        p.grad = q.grad = self.torch.randn(p.shape)
        self.Zeta([("up.weight", p)], lr=self.torch.tensor(0.1)).step()
        self.Zeta([("up.weight", q)], lr=0.1).step()
        assert_close(p.detach().numpy(), q.detach().numpy(), 1e-6)

    @pytest.mark.parametrize("kind", ["sparse", "complex"])
    def test_gradients_it_cannot_take_are_refused_before_anything_changes(self, kind):
        torch, good = self.torch, self.weight()
        good.grad = torch.randn(good.shape)
        bad = self.weight(dtype=torch.complex64 if kind == "complex" else torch.float32).requires_grad_(False)
        optimizer = self.Zeta([("a.weight", good), ("b.weight", bad)], lr=0.1)
        bad.requires_grad_(True)
        bad.grad = torch.ones_like(bad) if kind == "complex" else torch.ones_like(bad).to_sparse()
        with pytest.raises(TypeError, match=kind):
            optimizer.step()
        assert torch.equal(good, torch.ones_like(good)) and not optimizer.state

    def test_a_groups_own_keys_are_kept(self):
        group = {"params": [("up.weight", self.weight())], "rho": 0.9}
        assert self.Zeta([group]).param_groups[0]["rho"] == 0.9

    def test_parameters_without_names_are_warned_about(self):
        with pytest.warns(UserWarning, match="named_parameters"):
            self.Zeta([self.weight()])

    def test_a_group_overrules_the_route(self):
        p, q = self.weight(), self.weight()
        p.grad = q.grad = self.torch.randn(p.shape)
        groups = [{"params": [("up.weight", p)], "treatment": "adamw"}, {"params": [("embed.weight", q)]}]
        self.Zeta(groups, lr=0.1).step()
        assert_close(p.detach().numpy(), q.detach().numpy(), 0.0)

    def test_treatment_zeta_for_a_vector_is_refused_before_anything_changes(self):
        p, v = self.weight(), self.weight((8,))
        p.grad, v.grad = self.torch.randn(p.shape), self.torch.randn(v.shape)
        with pytest.raises(ValueError, match="needs matrices"):
            self.Zeta([{"params": [("a.weight", p), ("b.weight", v)], "treatment": "zeta"}]).step()
        assert self.torch.equal(p, self.torch.ones_like(p))

    def test_maximize_walks_the_other_way(self):
        p, q = self.weight(), self.weight()
        p.grad = self.torch.randn(p.shape)
        q.grad = -p.grad
        self.Zeta([("up.weight", p)], maximize=True).step()
        self.Zeta([("up.weight", q)]).step()
        assert_close(p.detach().numpy(), q.detach().numpy(), 1e-6)

    @pytest.mark.parametrize("shape", [(16, 8, 3, 3), (8, 16, 1, 1)])
    def test_channels_last_weights_take_the_same_step(self, shape):
        torch = self.torch
        plain = torch.nn.Parameter(torch.randn(shape))
        last = torch.nn.Parameter(plain.detach().to(memory_format=torch.channels_last, copy=True))
        grads = torch.randn(3, *shape)
        for p in (plain, last):
            optimizer = self.Zeta([("conv.weight", p)], lr=0.1, ns_dtype=torch.float32)
            for g in grads:
                p.grad = g.to(memory_format=torch.channels_last) if p is last else g.clone()
                optimizer.step()
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert_close(last.detach().numpy(), plain.detach().numpy(), 1e-5)

    @pytest.mark.parametrize("treatment", ["zeta", "adamw"])
    def test_non_contiguous_parameters_and_gradients(self, treatment):
        torch = self.torch
        plain = torch.nn.Parameter(torch.randn(12, 8))
        strided = torch.nn.Parameter(plain.detach().T.contiguous().T)
        grad = torch.randn(12, 8)
        plain.grad, strided.grad = grad, grad.T.contiguous().T
        for p in (plain, strided):
            optimizer = self.Zeta([("up.weight", p)], lr=0.1, treatment=treatment, ns_dtype=torch.float32)
            optimizer.step()
            optimizer.step()
        assert not strided.is_contiguous()
        assert_close(strided.detach().numpy(), plain.detach().numpy(), 1e-6)

    def test_a_gradient_that_first_arrives_later_starts_from_zero_moments(self):
        p, late = self.weight(), self.weight()
        optimizer = self.Zeta([("a.weight", p), ("b.weight", late)], lr=0.1, ns_dtype=self.torch.float32)
        p.grad = self.torch.randn(p.shape)
        optimizer.step()
        first, late.grad = p.detach().clone(), p.grad
        optimizer.step()
        assert_close(late.detach().numpy(), first.numpy(), 1e-6)

    def test_frozen_parameters_are_left_alone(self):
        p, frozen = self.weight(), self.weight().requires_grad_(False)
        p.grad = self.torch.randn(p.shape)
        self.Zeta([("a.weight", p), ("b.weight", frozen)], lr=0.1).step()
        assert self.torch.equal(frozen, self.torch.ones_like(frozen))

    def test_a_tied_embedding_is_one_parameter_and_goes_to_adamw(self):
        torch = self.torch
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "lm_head": torch.nn.Linear(4, 9, bias=False)})
        model["lm_head"].weight = model["embed"].weight
        before = model["embed"].weight.detach().clone()
        optimizer = self.Zeta(model.named_parameters(), lr=0.5, weight_decay=0.0)
        model["lm_head"](model["embed"](torch.arange(9))).pow(2).sum().backward()
        optimizer.step()
        moved = (model["embed"].weight.detach() - before).abs()
        assert_close(moved.numpy(), np.full((9, 4), 0.5), 1e-4)

    def test_state_has_the_names_that_torch_users_look_for(self):
        p, v = self.weight(), self.weight((8,))
        p.grad, v.grad = self.torch.randn(p.shape), self.torch.randn(v.shape)
        optimizer = self.Zeta([("up.weight", p), ("up.bias", v)])
        optimizer.step()
        assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys()
        assert optimizer.state[v].keys() == {"exp_avg", "exp_avg_sq", "step"}

    def test_needs_no_process_group(self):
        """Peers call the process group unconditionally and crash on one device."""
        assert not self.torch.distributed.is_initialized()
        self.test_frozen_parameters_are_left_alone()


class TestMlx:
    """What only MLX users ask for."""

    @pytest.fixture(autouse=True)
    def library(self):
        self.mx = pytest.importorskip("mlx.core")
        self.nn = pytest.importorskip("mlx.nn")
        from zeta.backends.mlx import Zeta

        self.Zeta = Zeta

    def model(self):
        self.mx.random.seed(0)
        return self.nn.Sequential(self.nn.Embedding(9, 8), self.nn.Linear(8, 12), self.nn.Linear(12, 8))

    def train(self, model, optimizer, steps, compiled=False):
        mx, ids = self.mx, self.mx.arange(9)

        def loss(model):
            return (model(ids) - 1).square().mean()

        def step():
            value, grads = self.nn.value_and_grad(model, loss)(model)
            optimizer.update(model, grads)
            return value

        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = []
        for _ in range(steps):
            losses.append(step())
            mx.eval(state, losses)
        return [value.item() for value in losses]

    def test_is_an_optimizer_that_trains_a_model(self):
        from mlx.optimizers import Optimizer

        optimizer = self.Zeta(learning_rate=0.05)
        assert isinstance(optimizer, Optimizer)
        losses = self.train(self.model(), optimizer, 20)
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("scheduled", [False, True])
    def test_compiled_equals_eager(self, scheduled):
        """`mx.compile` freezes Python numbers: a frozen rate or step count shows from the second step on."""
        from mlx.optimizers import cosine_decay

        runs = []
        for compiled in (False, True):
            rate = cosine_decay(0.05, 10) if scheduled else 0.05
            optimizer = self.Zeta(learning_rate=rate, ns_dtype=self.mx.float32)
            model = self.model()
            optimizer.init(model.trainable_parameters())
            runs.append(self.train(model, optimizer, 10, compiled))
        assert_close(np.array(runs[1]), np.array(runs[0]), 1e-5)

    def test_a_schedule_drives_matrices_and_the_rest(self):
        optimizer = self.Zeta(learning_rate=lambda step: 1.0 * 0.5**step, weight_decay=0.0)
        tree = {"up": {"weight": self.mx.ones((8, 12))}, "norm": {"weight": self.mx.ones((8,))}}
        for step in range(3):
            grads = {"up": {"weight": self.mx.random.normal((8, 12))}, "norm": {"weight": self.mx.ones((8,))}}
            after = optimizer.apply_gradients(grads, tree)
            for name, want in (("up", 0.2), ("norm", 1.0)):
                moved = np.array(after[name]["weight"] - tree[name]["weight"])
                assert_close(np.sqrt(np.mean(moved**2)), np.float32(want * 0.5**step), 1e-5)
            tree = after

    def test_frozen_parameters_are_left_alone(self):
        model = self.model()
        model.layers[1].freeze()
        before = np.array(model.layers[1].weight)
        self.train(model, self.Zeta(learning_rate=0.1), 2)
        assert_close(np.array(model.layers[1].weight), before, 0.0)

    def test_init_after_the_first_step_is_not_needed_to_continue(self):
        """`init` after loading a state would wipe it: the state itself is enough."""
        from mlx.utils import tree_flatten, tree_unflatten

        model, optimizer = self.model(), self.Zeta(learning_rate=0.05)
        self.train(model, optimizer, 3)
        copy = self.Zeta(learning_rate=0.05)
        copy.state = tree_unflatten(tree_flatten(optimizer.state))
        twin = self.model()
        twin.update(model.parameters())
        assert self.train(twin, copy, 3) == self.train(model, optimizer, 3)
