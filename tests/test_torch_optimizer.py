"""torch's `Zeta` where torch.optim.AdamW could stand: schedulers, saved state, scalers, hooks, compiled steps."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from zeta.backends import torch as backend  # noqa: E402
from zeta.backends.torch import Zeta, load_named_state, named_state, newton_schulz, param_groups  # noqa: E402
from zeta.core import COEFFICIENTS  # noqa: E402
from zeta.routing.layout import Route  # noqa: E402

schedulers = torch.optim.lr_scheduler
SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),  # these two drive betas, too
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [SCHEDULERS["LinearLR"](o), SCHEDULERS["StepLR"](o)], [3]),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([SCHEDULERS["LinearLR"](o), SCHEDULERS["StepLR"](o)]),
}


class Model(torch.nn.Module):
    """One of each: an embedding, a matrix, a fused matrix, a norm, a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(9, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.gate_up_proj = torch.nn.Linear(8, 20)
        self.down = torch.nn.Linear(10, 8)

    def forward(self, ids):
        gate, up = self.gate_up_proj(self.norm(self.embed(ids))).chunk(2, -1)
        return self.down(torch.sigmoid(gate) * up)


def backward(model, seed=0):
    ids = torch.randint(9, (12,), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = (model(ids).float() - 1).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        backward(model, t)
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_backend_needs_its_library_alone(backend):
    """What the other extras bring is not there after pip install '.[torch]'."""
    absent = "safetensors tokenizers matplotlib triton transformers"
    code = f"import sys; sys.modules.update(dict.fromkeys('{absent}'.split())); import zeta.backends.{backend}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_group_of_two_dtypes_moves_both():
    wide, narrow = (torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    optimizer = Zeta([{"params": [("wide", wide), ("narrow", narrow)], "treatment": "adamw"}], lr=0.1)
    for p in (wide, narrow):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(wide.bfloat16(), narrow) and wide[0] < 1
    assert len(optimizer.state) == 2


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "a view": lambda x: torch.cat([x, torch.full_like(x, 7.0)], -1)[..., : x.shape[-1]],
    "one number": lambda x: x.flatten()[:1].expand(x.shape),
}


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", [name for name in LAYOUTS if name != "one number"])
@pytest.mark.parametrize("treatment", ["adamw", "zeta"])
def test_layouts_in_memory_change_no_step(treatment, parameter, gradient):
    """torch's fused AdamW takes all for contiguous, and would write beside a view."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4, 2, 3), torch.randn(3, 6, 4, 2, 3)
    runs = []
    for own, layout in ((LAYOUTS[parameter], LAYOUTS[gradient]), (torch.clone, torch.clone)):
        p = torch.nn.Parameter(own(start.clone()))
        optimizer = Zeta([{"params": [("a.weight", p)], "treatment": treatment}], lr=0.1, ns_dtype=torch.float32)
        for t, g in enumerate(grads):
            p.grad = layout(LAYOUTS[gradient](g).clone() if layout is torch.clone else g)
            if t == 2:  # as they are after another process loaded and moved them
                optimizer.state[p]["exp_avg_sq"] = own(optimizer.state[p]["exp_avg_sq"])
            optimizer.step()
        runs.append(p)
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
    if parameter == "a view":
        assert (runs[0].detach().as_strided((6, 4, 2, 6), (48, 12, 6, 1))[..., 3:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("treatment", ["adamw", "zeta"])
def test_gradients_of_another_dtype_are_taken(treatment, dtype):
    runs = []
    for kind in (torch.float32, dtype):
        p, q = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        p.grad_dtype = None
        p.grad, q.grad = torch.eye(4, dtype=kind), torch.eye(4)
        Zeta([{"params": [("a.weight", p), ("b.weight", q)], "treatment": treatment}], lr=0.1).step()
        runs.append(p)
    assert torch.equal(*runs) and not torch.equal(runs[0], torch.ones(4, 4))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_every_scheduler_drives_lr_and_betas_as_it_drives_adamw(name, tensor):
    histories = []
    for make in (Zeta, torch.optim.AdamW):
        model = Model()
        lr = torch.tensor(0.05) if tensor else 0.05
        groups = param_groups(model) if make is Zeta else [{"params": list(model.parameters())}]
        optimizer = make(groups, lr=lr, betas=(0.9, 0.99))
        scheduler, history = SCHEDULERS[name](optimizer), []
        for t in range(6):
            backward(model, t)
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            history.append((float(optimizer.param_groups[-1]["lr"]), optimizer.param_groups[-1]["betas"]))
        histories.append(history)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert histories[0] == histories[1]
    assert len(set(histories[0])) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["file", "pickle", "deepcopy"])
def test_state_continues_exactly(dtype, how):
    """torch casts loaded state to the parameter's dtype: moments must not be rounded to bfloat16."""
    model = Model().to(dtype)
    optimizer = Zeta(param_groups(model), lr=0.01)
    train(model, optimizer, 3)
    if how == "file":
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        other = Zeta(param_groups(twin), lr=1.0)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        copied = (model, optimizer)
        twin, other = copy.deepcopy(copied) if how == "deepcopy" else pickle.loads(pickle.dumps(copied))
    train(model, optimizer, 3, start=3)
    assert not same(model, twin)  # nothing is shared
    train(twin, other, 3, start=3)
    assert same(model, twin)
    kept = {value.dtype for s in other.state.values() for key, value in s.items() if key.startswith("exp_avg")}
    assert kept == {torch.promote_types(dtype, torch.float32)}


def wider():
    model = Model()
    model.down = torch.nn.Linear(10, 9)
    return model


def version_99(model):
    state = trained(model).state_dict()
    state["param_groups"][0]["version"] = 99
    return state


def trained(model, make=Zeta):
    optimizer = make(param_groups(model) if issubclass(make, Zeta) else model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def swapped(model):
    state = trained(model).state_dict()
    first = next(iter(state["state"]))
    state["state"][first] = {"step": torch.ones(()), **state["state"][first]}
    return state


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: trained(wider()).state_dict(), "another model"),
        (lambda: trained(Model(), torch.optim.AdamW).state_dict(), "written by AdamW, not by this Zeta: load it there"),
        (
            lambda: trained(Model(), backend.NorMuon).state_dict(),
            "written by NorMuon, not by Zeta: load it into NorMuon",
        ),
        (lambda: version_99(Model()), "version 99.*install the zeta that wrote it"),
        (lambda: trained(Model().down).state_dict(), "same model"),
        (lambda: swapped(Model()), "needs .* build the optimizer with the routes"),
    ],
)
def test_foreign_state_is_refused_and_the_optimizer_left_alone(make, message):
    model, twin = Model(), Model()
    optimizer, other = trained(model), trained(twin)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert same(model, twin)


@pytest.mark.parametrize("how", ["load_state_dict", "load_named_state"])
@pytest.mark.parametrize("number", [int, float, torch.Tensor.numpy, torch.Tensor.long], ids=lambda f: f.__name__)
def test_steps_counted_in_other_numbers_are_loaded(number, how):
    """As old torch and other tools write them."""
    model = Model()
    optimizer = Zeta(param_groups(model), lr=0.01)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = Zeta(param_groups(twin), lr=0.01)
    if how == "load_state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        for s in saved["state"].values():
            s |= {"step": number(s["step"])} if "step" in s else {}
        other.load_state_dict(saved)
    else:
        arrays = named_state(model, optimizer)
        load_named_state(twin, other, {n: number(x) if ".step." in n else x for n, x in arrays.items()})
    steps = {s["step"] for s in other.state.values() if "step" in s}
    assert {step.dtype for step in steps} == {torch.float32} and {float(step) for step in steps} == {3.0}
    train(model, optimizer, 2, start=3)
    train(twin, other, 2, start=3)
    assert same(model, twin)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["Zeta", "Eta", "SOAP"])
def test_a_model_that_changes_dtype_and_back_goes_on(kind, saved):
    model = Model()
    optimizer = getattr(backend, kind)(param_groups(model), lr=0.01)
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float16, torch.float32, torch.float64
    for dtype in dtypes:
        model = model.to(dtype)
        if saved:
            state = optimizer.state_dict()
            optimizer = getattr(backend, kind)(param_groups(model), lr=0.01)
            optimizer.load_state_dict(state)
        train(model, optimizer, 2)
        assert all(torch.isfinite(p).all() and p.dtype == dtype for p in model.parameters())
        found = {v.dtype for s in optimizer.state.values() for k, v in s.items() if k not in ("step", "remainder")}
        assert found == {torch.promote_types(dtype, torch.float32)}
        assert all(("remainder" in s) == (dtype.itemsize == 2) for s in optimizer.state.values())


@pytest.mark.parametrize("how", ["to", "load_state_dict", "load_named_state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_took_off_joins_a_parameter_that_has_room_for_it(how, dtype):
    model = Model().bfloat16()
    optimizer = Zeta(param_groups(model), lr=1e-4)
    train(model, optimizer, 3)
    exact = [p.to(dtype) + optimizer.state[p]["remainder"].to(dtype) for p in model.parameters()]
    if how == "to":
        wide, other = model.to(dtype), optimizer
    else:
        wide = copy.deepcopy(model).to(dtype)
        other = Zeta(param_groups(wide))
        if how == "load_state_dict":
            other.load_state_dict(optimizer.state_dict())
        else:
            load_named_state(wide, other, named_state(model, optimizer))
    for group in other.param_groups:
        group["lr"] = 0.0
    train(wide, other, 1)
    assert all(torch.equal(p, w) for p, w in zip(wide.parameters(), exact, strict=True))


def test_grad_scaler_skips_what_overflowed_and_else_changes_nothing():
    model, twin = Model(), Model()
    optimizer, other = Zeta(param_groups(model), lr=0.01), Zeta(param_groups(twin), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(3):
        model.zero_grad()
        ids = torch.randint(9, (12,), generator=torch.Generator().manual_seed(t))
        scaler.scale((model(ids) - 1).square().mean()).backward()
        if t == 1:
            model.down.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        if t != 1:
            train(twin, other, 1, start=t)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_hooks_are_called():
    model, calls = Model(), []
    optimizer = Zeta(param_groups(model), lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "loaded"]


def test_hooks_may_change_the_state_before_and_after_it_is_loaded():
    model, twin = Model(), Model()
    optimizer, other = trained(model), Zeta(param_groups(twin))

    def doubled(_, state):
        return state | {"state": {i: {k: 2 * v for k, v in s.items()} for i, s in state["state"].items()}}

    def stepless(loaded):
        for s in loaded.state.values():
            if "step" in s:
                s["step"].zero_()

    other.register_load_state_dict_pre_hook(doubled)
    other.register_load_state_dict_post_hook(stepless)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(other.state[q]["exp_avg"], 2 * optimizer.state[p]["exp_avg"])
        assert other.state[q].get("step", 0) == 0


def test_state_fits_however_a_route_is_explained():
    """The reason is a text, and may be told otherwise by the next version; the matrices may not be others."""
    model, twin = Model(), Model()
    optimizer, other = trained(model), Zeta(param_groups(twin, {"embed": Route("adamw", (), "mine")}))
    other.load_state_dict(optimizer.state_dict())
    reasons = [Route(*r).reason for g in other.param_groups for r in g["routes"]]
    assert "mine" in reasons and len(other.state) == len(optimizer.state)
    split = Route("zeta", (1, 20, 8), "mine", (4, 16))
    with pytest.raises(ValueError, match="other matrices"):
        Zeta(param_groups(twin, {"gate_up.*weight": split})).load_state_dict(optimizer.state_dict())


WRITTEN = {
    "lr": -1.0,
    "betas": (0.9, 1.0),
    "coefficients": ((1.0, 2.0),),
    "ns_dtype": torch.int8,
    "eps": 0.0,
    "weight_decay": float("nan"),
}


@pytest.mark.parametrize("key", WRITTEN)
def test_values_written_into_a_group_are_refused_before_anything_changes(key):
    model, twin = Model(), Model()
    optimizer = trained(model)
    trained(twin)
    optimizer.param_groups[-1][key] = WRITTEN[key]
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=key):
        optimizer.step()
    assert same(model, twin)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, kept[index][name]) for name, value in state.items())


def test_parameters_put_into_a_group_by_hand_are_refused_before_anything_changes():
    model, twin = Model(), Model()
    optimizer = trained(model)
    trained(twin)
    optimizer.param_groups[-1]["params"].append(torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match="with add_param_group"):
        optimizer.step()
    assert same(model, twin)


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("key", ["ns_dtype", "comm_dtype"])
def test_dtypes_that_nothing_is_multiplied_in_are_refused_at_once(key, dtype):
    with pytest.raises(ValueError, match=f"{key} is .*, but must be None or one of torch.float16"):
        Zeta(param_groups(Model()), **{key: dtype})


def test_a_groups_own_number_of_steps():
    model, auto = Model(), param_groups(Model(), ns_steps="auto")
    assert {g["coefficients"] for g in Zeta(auto).param_groups} == {"auto"}
    groups = [{"params": list(model.named_parameters()), "ns_steps": 3}]
    (group,) = Zeta(groups).param_groups
    assert len(group["coefficients"]) == 3 and "ns_steps" not in group
    with pytest.raises(ValueError, match="ns_steps is 9"):
        Zeta(param_groups(model, ns_steps=9))
    for default, own in ((3, 5), ("auto", 5), (3, "auto")):  # a group's own is of all the coefficients
        (group,) = Zeta([{**groups[0], "ns_steps": own}], ns_steps=default).param_groups
        assert group["coefficients"] == ("auto" if own == "auto" else COEFFICIENTS["jordan"])


def test_a_rate_that_torch_cannot_use_is_refused_before_anything_moves():
    model = Model()
    optimizer = Zeta(param_groups(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for wrong in (np.array(1e-3), torch.ones(2)):
        optimizer.param_groups[0]["lr"] = wrong
        with pytest.raises(ValueError, match=r"lr is .*, but must be a number or a tensor of one"):
            optimizer.step()
    assert not optimizer.state


def test_a_vector_is_no_input_of_newton_schulz():
    with pytest.raises(ValueError, match=r"a matrix .* is needed, got shape \(4,\)"):
        newton_schulz(torch.ones(4))


def test_a_module_called_optimizer_is_saved_like_any_other():
    def make():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"optimizer": torch.nn.Linear(4, 4), "step": torch.nn.Linear(4, 4)})
        model["optimizer"].inner = torch.nn.Linear(4, 4)
        return model

    model, twin = make(), make()
    optimizer, other = trained(model), Zeta(param_groups(twin))
    load_named_state(twin, other, {name: value.clone() for name, value in named_state(model, optimizer).items()})
    assert same(model, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_a_parameter_named_like_anothers_state_is_refused():
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})
    model["optimizer"] = torch.nn.ModuleDict({"step": torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"optimizer\.step\.up\.weight has the name of the state of up\.weight"):
        named_state(model, trained(model))


def test_names_that_become_one_are_refused():
    model = torch.nn.Module()
    model.module, model.weight = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"module\.weight would be saved as weight, and so would another"):
        named_state(model, Zeta(param_groups(model)))


def test_statistics_of_a_batch_norm_are_saved():
    def make():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        model.register_buffer("mask", torch.full((2, 2), -torch.inf))  # which no checkpoint would take
        return model

    model, twin = make(), make()
    optimizer = Zeta(param_groups(model))
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    saved = {name: value.clone() for name, value in named_state(model, optimizer).items()}
    assert not {"mask", "1.num_batches_tracked"} & saved.keys()
    load_named_state(twin, Zeta(param_groups(twin)), saved)
    x = torch.randn(3, 4)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    del saved["1.running_var"]
    with pytest.raises(ValueError, match="lacks"):
        load_named_state(twin, Zeta(param_groups(twin)), saved)


def test_a_group_s_treatment_overrules_its_routes():
    model = Model()
    groups = param_groups(model)
    groups[0]["treatment"] = "adamw"
    optimizer = Zeta(groups)
    train(model, optimizer, 1)
    assert all("step" in optimizer.state[p] for p in model.parameters())
    for given in ({"treatment": "adamw"}, {"options": lambda name, p: {"treatment": "adamw"}}):
        with pytest.raises(ValueError, match="overrides="):
            param_groups(model, **given)


def test_a_copy_gives_later_groups_what_the_original_would():
    model = Model()
    optimizer = Zeta(param_groups(model), lr=1e-3, ns_steps=3, adamw={"lr": 5e-4})
    for copied in (copy.deepcopy(optimizer), optimizer):
        copied.add_param_group({"params": [("late.bias", torch.nn.Parameter(torch.ones(4)))]})
        copied.add_param_group({"params": [("late.up", torch.nn.Parameter(torch.ones(4, 4)))], "ns_steps": 5})
        assert copied.param_groups[-2]["lr"] == 5e-4 and len(copied.param_groups[-1]["coefficients"]) == 5


def test_parameters_of_one_layer_say_too_little():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "up": torch.nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="no names that say their layers"):
        Zeta([{"params": layer.named_parameters()} for layer in model.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Zeta([{"params": model["embed"].named_parameters(), "treatment": "adamw"}])
        Zeta(model.named_parameters())


def test_the_family_shows_its_settings_and_takes_a_subclass_for_what_it_is():
    for kind in ("Muon", "Dion2", "Schattor", "AdaGO"):
        names = list(inspect.signature(getattr(backend, kind)).parameters)
        assert names[:5] == ["params", "lr", "betas", "eps", "weight_decay"]

    class Mine(backend.Muon):
        pass

    model, twin = Model(), Model()
    own, other = Mine(param_groups(model)), backend.Muon(param_groups(twin))
    train(model, own, 1)
    other.load_state_dict(own.state_dict())
    assert len(other.state) == len(own.state)


def test_parameters_may_be_frozen_and_come_later():
    model = Model()
    model.down.requires_grad_(False)
    before = model.down.weight.clone()
    optimizer = Zeta(param_groups(model), lr=0.01)
    train(model, optimizer, 2)
    assert torch.equal(model.down.weight, before)
    model.down.requires_grad_(True)
    extra = torch.nn.Linear(3, 4)
    optimizer.add_param_group(param_groups(extra, lr=0.5)[0])
    extra(torch.ones(3)).sum().backward()
    train(model, optimizer, 1)
    assert not torch.equal(model.down.weight, before)
    assert optimizer.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    "group, error, message",
    [
        ({"routes": [("zeta", (1, 3, 4), "")]}, ValueError, "do not fit"),
        ({"routes": []}, ValueError, "has 0 routes for 1 parameters"),
        ({"routes": [("zeta",)]}, TypeError, "arguments"),
        ({"routes": None}, TypeError, "None"),
        ({"lr": -1.0}, ValueError, "lr is -1"),
        ({"weight_decy": 0.1}, UserWarning, "weight_decy has no effect: did you mean weight_decay"),
        ({"adamw": {"lr": 0.1}}, ValueError, "stands in the constructor"),
        ({"amsgrad": True}, ValueError, "amsgrad is True, but Dion2 keeps no maximum"),
        ({"fraction": 3.0}, ValueError, "fraction is 3"),
        ({"name": "classifier.0.weight"}, UserWarning, "one of several layers"),  # a warning, made an error
    ],
)
def test_a_refused_group_is_not_added(group, error, message):
    model = Model()
    optimizer = backend.Dion2(param_groups(model), lr=0.01)
    late = [(group.get("name", "x"), torch.nn.Parameter(torch.ones(4, 4)))]
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": late, **group})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 1)


@pytest.mark.parametrize("kind", ["Zeta", "Eta", "NorMuon"])
def test_compiled_step_is_one_graph_equal_to_eager_and_is_not_compiled_again(kind):
    """Twice: the first step makes the state. Then neither rate nor step count nor betas may compile it again."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    eager, model = Model(), Model()
    torch._dynamo.reset()
    options = dict(lr=torch.tensor(0.02), ns_dtype=torch.float32)  # bfloat16 would multiply what AdamW rounds otherwise
    runs = [(m, getattr(backend, kind)(param_groups(m), **options)) for m in (eager, model)]
    compiled = torch.compile(lambda: runs[1][1].step(), backend=counting, fullgraph=True)
    for t in range(6):
        for (m, optimizer), step in zip(runs, (runs[0][1].step, compiled), strict=True):
            backward(m, t)
            step()
            for group in optimizer.param_groups:
                group["lr"].mul_(0.9)
        assert len(graphs) == min(t + 1, 2)
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_operators_does_not_grow_with_the_layers(dtype):
    """Views and allocations launch no kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            free = func.is_view or name in ("empty", "empty_like", "promote_types", "_reshape_alias", "_unsafe_view")
            self.found += not free
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 6):
        model = torch.nn.ModuleList([Model().to(dtype) for _ in range(layers)])
        optimizer = Zeta(param_groups(model), lr=0.01)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Count() as count:
            optimizer.step()
        counts.append(count.found)
    assert counts[0] == counts[1]
