"""What torch.optim.AdamW's configurations carry, in the constructor and in groups; options apart and by parameter."""

import copy
import inspect
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from zeta.backends import torch as backend  # noqa: E402
from zeta.backends.torch import Eta, Muon, Zeta, param_groups  # noqa: E402

TAKEN, NO_EFFECT, REFUSED = "taken", "no effect", "refused"
TABLE = {  # a value that is not AdamW's default: what comes of it
    "lr": (0.3, TAKEN),
    "betas": ((0.5, 0.6), TAKEN),
    "eps": (1e-2, TAKEN),
    "weight_decay": (3.0, TAKEN),
    "maximize": (True, TAKEN),
    "fused": (True, NO_EFFECT),
    "foreach": (True, NO_EFFECT),
    "amsgrad": (True, REFUSED),
    "capturable": (True, NO_EFFECT),
    "differentiable": (True, REFUSED),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)


def steps(groups, count=2, make=Zeta, **options):
    optimizer = make(groups, **options)
    for t in range(count):
        torch.manual_seed(t)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def moved(where, **options):
    model = Model()
    steps([{"params": list(model.named_parameters()), **({} if where == "constructor" else options)}],
          **(options if where == "constructor" else {}))  # fmt: skip
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(map(torch.equal, a, b))


def test_the_table_has_every_keyword_of_adamw():
    assert TABLE.keys() == inspect.signature(torch.optim.AdamW).parameters.keys() - {"params"}
    (group,) = torch.optim.AdamW(Model().parameters()).param_groups
    assert group.keys() - TABLE.keys() == {"params", "decoupled_weight_decay"}  # True in AdamW, which ours is, too


@pytest.mark.parametrize("where", ["constructor", "group"])
@pytest.mark.parametrize("key", TABLE)
def test_every_keyword_of_adamw(key, where):
    value, verdict = TABLE[key]
    if verdict == REFUSED:
        with pytest.raises(ValueError, match=f"{key} is True, but Zeta .*: leave it out"):
            moved(where, **{key: value})
        value = False
    assert same(moved(where, **{key: value}), moved(where)) == (verdict != TAKEN)


def test_groups_of_adamw_itself_are_taken():
    model = Model()
    groups = torch.optim.AdamW(model.named_parameters(), lr=0.1).param_groups
    (group,) = steps(groups).param_groups
    assert group["lr"] == 0.1 and group["decoupled_weight_decay"] and group["fused"] is None
    with pytest.raises(ValueError, match="decoupled_weight_decay is False, but Zeta decays weights apart"):
        steps(torch.optim.Adam(model.named_parameters()).param_groups)


def test_a_groups_own_keys_are_kept_and_saved():
    own = {"lr_scale": 0.5, "rho": 0.05, "swa_lr": 0.1, "layer_id": 3, "name": "x", "weight_decay_mult": 2.0}
    model, twin = Model(), Model()
    optimizer = steps([{"params": list(model.named_parameters()), **own}])
    other = Zeta([{"params": list(twin.named_parameters())}])
    other.load_state_dict(optimizer.state_dict())
    for o in (optimizer, other, copy.deepcopy(optimizer)):
        assert own.items() <= o.param_groups[0].items()


@pytest.mark.parametrize("key, meant", [("weight_decy", "weight_decay"), ("ns_step", "ns_steps"), ("beta", "betas"),
                                        ("learning_rate", "lr"), ("maximise", "maximize")])  # fmt: skip
def test_a_near_miss_is_named(key, meant):
    with pytest.warns(UserWarning, match=f"a group's {key} has no effect: did you mean {meant}?"):
        Zeta([{"params": list(Model().named_parameters()), key: 0.1}])


MEANT = {"learning_rate": "lr?", "momentum": "betas?", "ns_step": "ns_steps?"}


@pytest.mark.parametrize("key", [*MEANT, "nesterov"])
def test_the_constructor_says_what_was_meant(key):
    remedy = f"did you mean {MEANT[key]}" if key in MEANT else "leave it out"
    with pytest.raises(TypeError, match=rf"^Eta takes no {key}: {re.escape(remedy)}$"):
        Eta(Model().named_parameters(), **{key: 0.1})


def test_errors_of_a_class_name_it():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("up.weight", p)])
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of the parameter up\.weight is sparse: Muon takes"):
        optimizer.step()
    with pytest.raises(ValueError, match="amsgrad is True, but Eta keeps"):
        Eta([("up.weight", p)], amsgrad=True)


def test_a_parameter_that_grew_is_refused_by_name():
    model = Model()
    optimizer, before = steps(param_groups(model)), Model()
    before.load_state_dict(model.state_dict())
    model.up.weight.data = torch.cat([model.up.weight.data, torch.zeros(2, 8)])
    model.up.weight.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"up\.weight has shape \(8, 8\), but had \(6, 8\)"):
        optimizer.step()
    assert same([model.norm.weight, model.embed.weight], [before.norm.weight, before.embed.weight])


def test_a_parameter_that_was_swapped_is_stepped_as_a_new_one():
    model, twin = Model(), Model()
    optimizer = steps(param_groups(model))
    optimizer.param_groups[0]["params"][0] = p = torch.nn.Parameter(twin.up.weight.detach().clone())
    p.grad = twin.up.weight.grad = torch.ones(6, 8)
    optimizer.step()
    Zeta([("up.weight", twin.up.weight)]).step()
    assert torch.equal(p, twin.up.weight)


def test_vectors_are_decayed_only_if_asked():
    weights = {}
    for ask in (False, True):
        model = Model()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = Zeta(param_groups(model), lr=1.0, weight_decay=0.5, decay_vectors=ask)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        weights[ask] = {n: p.detach() / start[n] for n, p in model.named_parameters()}
    for name in weights[True]:
        vector = name in ("up.bias", "norm.weight", "norm.bias")
        if name != "norm.bias":  # zero from the start
            assert torch.allclose(weights[True][name], torch.tensor(0.5))
            assert torch.allclose(weights[False][name], torch.tensor(1.0 if vector else 0.5))


def test_the_adamw_half_apart():
    model = Model()
    named = list(model.named_parameters())
    optimizer = Zeta(named, lr=0.1, adamw=dict(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0))
    matrices, rest = optimizer.param_groups
    assert matrices["param_names"] == ["up.weight"] and (matrices["lr"], matrices["betas"]) == (0.1, (0.95, 0.99))
    assert len(rest["params"]) == 4
    assert [rest[k] for k in ("lr", "betas", "eps", "weight_decay")] == [0.01, (0.8, 0.9), 1e-6, 0.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005]
    optimizer.step()
    scheduler.step()
    assert len(Zeta(named, lr=0.1).param_groups) == 1
    groups = [{"params": named[:1], "lr": 0.5}, {"params": named[1:]}]  # what a group says itself goes first
    assert [g["lr"] for g in Zeta(groups, lr=0.1, adamw=dict(lr=0.01)).param_groups] == [0.5, 0.1, 0.01]
    with pytest.raises(TypeError, match="adamw has 'momentum', but takes lr, betas"):
        Zeta(named, adamw=dict(momentum=0.9))
    with pytest.raises(ValueError, match="lr is -1"):
        Zeta(named, adamw=dict(lr=-1.0))


def test_the_adamw_half_apart_is_two_optimizers_in_one():
    model, twin = Model(), Model()
    steps(param_groups(model), adamw=dict(lr=0.01, betas=(0.8, 0.9)), lr=0.1)
    groups = param_groups(twin)
    groups[1] |= dict(lr=0.01, betas=(0.8, 0.9))
    steps(groups, lr=0.1)
    assert same(model.parameters(), twin.parameters())


def test_options_by_parameter():
    groups = param_groups(
        Model(), lr=0.1, options=lambda name, p: {"lr": 0.01, "layer_id": 1} if name.startswith("up") else None
    )
    got = {tuple(n for n, _ in g["params"]): (g["treatment"], g["lr"], g.get("layer_id")) for g in groups}
    assert got == {
        ("up.weight",): ("zeta", 0.01, 1),
        ("embed.weight", "norm.weight", "norm.bias"): ("adamw", 0.1, None),
        ("up.bias",): ("adamw", 0.01, 1),
    }
    Zeta(groups)


def test_saved_groups_that_say_nothing_of_vectors_decay_them_on():
    model, twin = Model(), Model()
    optimizer, other = steps(param_groups(model), decay_vectors=True), Zeta(param_groups(twin))
    twin.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["decay_vectors"]
    other.load_state_dict(saved)
    for o in (optimizer, other):
        for p in (p for g in o.param_groups for p in g["params"]):
            p.grad = torch.ones_like(p)
        o.step()
    assert same(model.parameters(), twin.parameters())


PARAMS = {
    "up.weight": np.ones((4, 4), "float32"),
    "up.bias": np.ones(4, "float32"),
    "embed.weight": np.ones((4, 4), "float32"),
}


class TestMlx:
    @pytest.fixture(autouse=True)
    def library(self):
        self.mx = pytest.importorskip("mlx.core")
        from zeta.backends import mlx as backend

        self.Zeta = backend.Zeta

    def step(self, optimizer, params, zero=True):
        mx = self.mx
        params = {k: mx.array(v) for k, v in params.items()}
        grads = {k: mx.zeros_like(v) if zero else mx.ones_like(v) for k, v in params.items()}
        return {k: np.array(v) for k, v in optimizer.apply_gradients(grads, params).items()}

    @pytest.mark.parametrize("ask", [False, True])
    def test_vectors_are_decayed_only_if_asked(self, ask):
        got = self.step(self.Zeta(1.0, weight_decay=0.5, decay_vectors=ask), PARAMS)
        want = {"up.weight": 0.5, "embed.weight": 0.5, "up.bias": 0.5 if ask else 1.0}
        assert all(np.allclose(got[k], v) for k, v in want.items())

    def test_the_adamw_half_follows_the_rate_in_proportion(self):
        optimizer = self.Zeta(1.0, weight_decay=0.5, adamw=dict(learning_rate=0.1, weight_decay=0.2))
        got = self.step(optimizer, PARAMS)
        assert np.allclose(got["embed.weight"], 1 - 0.1 * 0.2) and np.allclose(got["up.weight"], 0.5)
        optimizer.learning_rate = 0.5
        got = self.step(optimizer, PARAMS)
        assert np.allclose(got["embed.weight"], 1 - 0.05 * 0.2) and np.allclose(got["up.weight"], 0.75)

    def test_beside_a_schedule_the_half_takes_a_schedule(self):
        schedule = lambda step: 1.0 / (1 + step)  # noqa: E731
        with pytest.raises(ValueError, match="give a schedule for both"):
            self.Zeta(schedule, adamw=dict(learning_rate=0.1))
        own = lambda step: 0.1 * schedule(step)  # noqa: E731
        optimizer = self.Zeta(schedule, weight_decay=0.0, adamw=dict(learning_rate=own, weight_decay=1.0))
        for rate in (0.1, 0.05):
            assert np.allclose(self.step(optimizer, PARAMS)["embed.weight"], 1 - rate)
        with pytest.raises(TypeError, match="adamw has 'lr', but takes learning_rate"):
            self.Zeta(1.0, adamw=dict(lr=0.1))


@pytest.mark.parametrize("make", [kind for kind in vars(backend).values() if isinstance(kind, type)])
def test_every_class_takes_what_a_recipe_passes(make):
    steps(param_groups(Model()), make=make, fused=True, foreach=None, amsgrad=False, capturable=False)
