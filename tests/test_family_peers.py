"""The family beside public implementations, on the same gradients: where a peer has another form, the line says which.

Peers that round to bfloat16 are made not to, so that their formulas are compared and not their rounding. Every
comparison has its control: a momentum off by 1 %.
"""

from functools import partial

import numpy as np
import pytest
from conftest import need

import zeta
from zeta import adamw, family, preconditioned
from zeta.core import COEFFICIENTS
from zeta.family import uncut
from zeta.parity.checks import assert_close, relative_error
from zeta.stages import ema, entries, match_rms

LR, BETAS, EPS = 1e-2, (0.95, 0.99), 1e-14  # an eps that is lost beside what it is added to: peers add it elsewhere


def draw(shape, count=10):
    rng = np.random.default_rng([7, *shape])
    return rng.standard_normal(shape), rng.standard_normal((count, *shape)) * np.exp(0.5 * rng.standard_normal(shape))


def ours(rule, shape, hyper, orthogonalize=zeta.newton_schulz, keep=()):
    """The weights after each step; `hyper` may depend on it. What `keep` names stays as the first step left it."""
    w, grads = draw(shape)
    state, first, after = rule.init(w), {}, []
    for t, g in enumerate(grads, 1):
        options = (hyper(t) if callable(hyper) else hyper,)
        args = options if rule is adamw else (*options, orthogonalize)
        w, state = rule.update(g, state, w, *args)
        first = first or {key: state[key] for key in keep}
        state |= first
        after.append(w)
    return np.array(after)


def changes(after, shape):
    return np.diff(np.concatenate([draw(shape)[0][None], after]), axis=0)


def settings(weight_decay=0.1, b1=BETAS[0]):
    return zeta.Hyper(LR, (b1, BETAS[1]), EPS, weight_decay)


def agree(got, rule, shape, rtol, weight_decay=0.1, **options):
    """Whether the peer's weights are ours after every step, and are not ours with a momentum off by 1 %."""
    start = draw(shape)[0]
    assert_close(got, ours(rule, shape, settings(weight_decay), **options), rtol, start)
    wrong = ours(rule, shape, settings(weight_decay, b1=0.99 * BETAS[0]), **options)
    assert relative_error(got, wrong, start) > 100 * rtol


@pytest.fixture
def torch(monkeypatch):
    torch = need("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    return torch


def torch_steps(torch, make, shape):
    w, grads = draw(shape)
    p, after = torch.nn.Parameter(torch.tensor(w)), []
    optimizer = make(p)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
        after.append(p.detach().numpy().copy())
    return np.array(after)


both_ways = pytest.mark.parametrize("shape", [(12, 20), (20, 12)])


class TestTorch:
    @both_ways
    def test_adamw(self, torch, shape):
        got = torch_steps(torch, lambda p: torch.optim.AdamW([p], LR, BETAS, EPS, 0.1), shape)
        agree(got, adamw, shape, 1e-12)

    @both_ways
    def test_muon(self, torch, shape, monkeypatch):
        monkeypatch.setattr(torch, "bfloat16", torch.float64)  # torch 2.15 rounds by .to(torch.bfloat16)
        options = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        got = torch_steps(torch, lambda p: torch.optim.Muon([p], LR, **options), shape)
        agree(got, family.muon, shape, 1e-12)


class TestMlx:
    """In float32; MLX's own Muon adds decay to the gradient, so none, and scales by sqrt(rows / cols) if above 1."""

    def steps(self, make, shape):
        mx = need("mlx.core")
        w, grads = (mx.array(x.astype("float32")) for x in draw(shape))
        optimizer, after, tree = make(need("mlx.optimizers")), [], {"w": w}
        for g in grads:
            tree = optimizer.apply_gradients({"w": g}, tree)
            after.append(np.array(tree["w"]).astype("float64"))
        return np.array(after)

    @both_ways
    def test_adamw(self, shape):
        got = self.steps(lambda o: o.AdamW(LR, list(BETAS), EPS, 0.1, bias_correction=True), shape)
        agree(got, adamw, shape, 6e-5)

    @both_ways
    def test_muon(self, shape):
        lr = LR * 0.2 * max(shape) ** 0.5 / max(1, shape[0] / shape[1]) ** 0.5
        agree(self.steps(lambda o: o.Muon(lr, weight_decay=0.0), shape), family.muon, shape, 6e-5, weight_decay=0)

    def test_signum_is_lion_with_equal_betas(self):
        got = self.steps(lambda o: o.Lion(0.2 * LR, [0.95, 0.95], weight_decay=0.5), (12, 20))
        agree(got, family.signum, (12, 20), 6e-5)


class TestPytorchOptimizer:
    @pytest.fixture(autouse=True)
    def library(self, torch, monkeypatch):
        self.torch, self.peer = torch, need("pytorch_optimizer")
        from pytorch_optimizer.optimizer.muon import adago, adamuon, normuon

        for module in (adago, adamuon, normuon):
            exact = partial(module.zero_power_via_newton_schulz_5, dtype=torch.float64)
            monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", exact)

    def steps(self, kind, shape, muon=True, **options):
        make = getattr(self.peer, kind)
        if not muon:
            return torch_steps(self.torch, lambda p: make([p], lr=LR, **options), shape)
        options |= {"foreach": False}
        return torch_steps(self.torch, lambda p: make([{"params": [p], "use_muon": True}], lr=LR, **options), shape)

    @both_ways
    def test_adamuon_without_the_papers_sign_is_whiten_after(self, shape):
        got = self.steps("AdaMuon", shape, betas=BETAS, weight_decay=0.1, eps=EPS)
        agree(got, family.whiten_after, shape, 1e-9)
        assert relative_error(got, ours(family.adamuon, shape, settings()), draw(shape)[0]) > 0.1

    @both_ways
    def test_normuon(self, shape):
        options = {"momentum": 0.95, "beta2": 0.99, "weight_decay": 0.1, "eps": EPS, "nesterov": False}
        agree(self.steps("NorMuon", shape, update_scale="match_rms", **options), family.normuon, shape, 1e-12)

    @both_ways
    def test_adago_divides_by_v_squared_where_the_paper_divides_by_v(self, shape):
        """All norms are above gamma, so v^2 = 1 + t."""
        options = {"gamma": 1.0, "v": 1.0, "eps": 1e-4, "nesterov": False, "use_adjusted_lr": True}
        got = changes(self.steps("AdaGO", shape, momentum=0.95, **options), shape)
        v = np.sqrt(1 + np.arange(1, 11))[:, None, None]
        for b1, same in ((0.95, True), (0.94, False)):
            want = changes(ours(family.adago(), shape, settings(0.0, b1)), shape)
            assert (relative_error(v * got, want) < 1e-12) == same

    @both_ways
    def test_shampoo_sums_and_has_no_scale(self, shape):
        """The average of all factors so far is their sum but for a number: b2 = 1 - 1 / t. Without momentum."""
        got = changes(self.steps("Shampoo", shape, muon=False, matrix_eps=1e-14), shape)
        want = changes(
            ours(preconditioned.shampoo(1), shape, lambda t: zeta.Hyper(LR, (0.0, 1 - 1 / t), EPS, 0)), shape
        )
        unit = [x / np.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (got, want)]
        assert_close(unit[0], unit[1], 1e-6)
        last = changes(ours(preconditioned.shampoo(1), shape, zeta.Hyper(LR, (0.0, 0.5), EPS, 0)), shape)
        assert relative_error(unit[0], last / np.linalg.norm(last, axis=(-2, -1), keepdims=True)) > 0.01

    @pytest.mark.parametrize("shape", [(12, 12), (16, 16)])
    def test_soap_until_its_basis_turns(self, shape):
        """Ours has exact eigenvectors in every step, the peer's follow by power iteration; here neither turns."""
        got = self.steps("SOAP", shape, muon=False, betas=BETAS, weight_decay=0.0, eps=EPS, precondition_frequency=99)
        agree(got, preconditioned.soap(), shape, 1e-9, weight_decay=0, keep=("left", "right"))


class TestHeavyball:
    @pytest.fixture(autouse=True)
    def library(self, torch, monkeypatch):
        self.torch, self.peer = torch, need("heavyball")
        monkeypatch.setattr(self.peer.utils, "compile_mode", None)

    def test_soap_until_its_basis_turns(self):
        options = {"betas": BETAS, "shampoo_beta": 0.99, "eps": EPS, "weight_decay": 0.0, "merge_dims": False}
        make = partial(self.peer.SOAP, lr=LR, precondition_frequency=99, **options)
        got = torch_steps(self.torch, lambda p: make([p]), (12, 12))
        agree(got, preconditioned.soap(), (12, 12), 1e-6, weight_decay=0, keep=("left", "right"))

    @both_ways
    def test_muon_adds_the_gradient_to_the_average_has_other_coefficients_and_scale(self, shape):
        @uncut(exp_avg=entries)
        def theirs(g, state, hyper, orthogonalize):
            m = ema(state["exp_avg"], g, hyper.betas[0])
            return match_rms(orthogonalize(m + g)), {"exp_avg": m}

        lr = LR * 0.2 * max(shape) ** 0.5 / max(1, shape[0] / shape[1]) ** 0.5
        got = torch_steps(self.torch, lambda p: self.peer.Muon([p], lr=lr, betas=BETAS), shape)
        you = partial(zeta.newton_schulz, coefficients=COEFFICIENTS["you"])
        agree(got, theirs, shape, 1e-6, weight_decay=0, orthogonalize=you)


class TestOptax:
    @pytest.fixture(autouse=True)
    def library(self):
        self.jax, self.peer = need("jax"), need("optax")
        with self.jax.enable_x64(True):
            yield

    def steps(self, rule, shape):
        w, grads = draw(shape)
        w, after = self.jax.numpy.array(w), []
        state, update = rule.init(w), self.jax.jit(rule.update)
        for g in grads:
            change, state = update(self.jax.numpy.array(g), state, w)
            w = self.peer.apply_updates(w, change)
            after.append(np.array(w))
        return np.array(after)

    @both_ways
    def test_adamw(self, shape):
        agree(self.steps(self.peer.adamw(LR, *BETAS, EPS, weight_decay=0.1), shape), adamw, shape, 1e-12)

    def test_signum(self):
        rule = self.peer.chain(self.peer.ema(0.95, debias=False), self.peer.scale_by_sign(), self.peer.scale(-0.2 * LR))
        agree(self.steps(rule, (12, 20)), family.signum, (12, 20), 1e-12, weight_decay=0)

    @both_ways
    def test_muon_corrects_nesterovs_two_terms_apart(self, shape):
        """m by the next step's bias and g by this one's: another mixture at first, the same in the end."""

        @uncut(exp_avg=entries, steps=lambda rows, cols: (1, 1))
        def theirs(g, state, hyper, orthogonalize):
            b1, t = hyper.betas[0], state["steps"] + 1
            m = ema(state["exp_avg"], g, b1)
            u = orthogonalize(ema(m / (1 - b1 ** (t + 1)), g / (1 - b1**t), b1))
            return match_rms(u), {"exp_avg": m, "steps": t}

        rule = self.peer.contrib.muon(LR, beta=0.95, eps=EPS, weight_decay=0.1, consistent_rms=0.2)
        agree(self.steps(rule, shape), theirs, shape, 1e-9)
