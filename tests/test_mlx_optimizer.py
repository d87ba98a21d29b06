"""MLX's `Zeta` where mlx.optimizers.AdamW could stand: saved state, compiled steps, LoRA, quantised layers."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

import zeta  # noqa: E402
from zeta import adamw, core, preconditioned  # noqa: E402
from zeta.backends import mlx as mlx_backend  # noqa: E402
from zeta.backends.mlx import Muon, NorMuon, Zeta, load_named_state, named_state, newton_schulz, to_numpy  # noqa: E402
from zeta.backends.mlx.ranks import together  # noqa: E402
from zeta.parity.checks import assert_close  # noqa: E402


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        mx.random.seed(0)
        self.embed = nn.Embedding(9, 8)
        self.layers = [nn.Linear(8, 8) for _ in range(layers)]
        self.norm = nn.LayerNorm(8)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + mx.tanh(layer(x))
        return self.norm(x)


def loss(model, t=0):
    ids = (mx.arange(12) * (t + 1)) % 9
    return (model(ids).astype(mx.float32) - 1).square().mean()


def train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        value, grads = nn.value_and_grad(model, loss)(model, t)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return value.item()


def flat(model):
    return {n: np.array(p.astype(mx.float32)) for n, p in tree_flatten(model.parameters())}


def assert_same(a, b):
    for name, want in flat(b).items():
        assert_close(flat(a)[name], want, 0.0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_state_in_safetensors_continues_exactly(dtype, tmp_path):
    model = Model()
    model.set_dtype(dtype)
    schedule = optim.cosine_decay(0.05, 10)
    optimizer = Zeta(schedule)
    train(model, optimizer, 3)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    twin, other = Model(), Zeta(schedule)
    twin.update(model.parameters())
    other.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    other.init(twin.trainable_parameters())  # must not wipe what was loaded
    train(model, optimizer, 3, start=3)
    train(twin, other, 3, start=3)
    assert_same(twin, model)
    kept = {str(v.dtype) for n, v in tree_flatten(other.state) if "exp_avg" in n}
    assert kept == {"mlx.core.float32"}


def test_a_schedule_and_the_step_count_do_not_compile_again():
    traces = []
    runs = []
    for compiled in (False, True):
        model = Model(1)  # compiled by a C++ compiler on a CPU
        optimizer = Zeta(optim.cosine_decay(0.05, 10), ns_dtype=mx.float32)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def step(t, model=model, optimizer=optimizer):
            traces.append(1)
            value, grads = nn.value_and_grad(model, loss)(model, t)
            optimizer.update(model, grads)
            return value

        take = mx.compile(step, inputs=state, outputs=state) if compiled else step
        traces.clear()
        for t in range(6):
            mx.eval(take(mx.array(t)), state)
        runs.append((flat(model), len(traces)))
    (eager, _), (fast, count) = runs
    assert count == 1
    for name, want in eager.items():
        assert_close(fast[name], want, 1e-5)


def test_layers_may_thaw_later_and_start_as_new_ones():
    model, optimizer = Model(), Zeta(0.05, weight_decay=0.0)
    model.layers[1].freeze()
    model.norm.freeze()
    train(model, optimizer, 2)
    model.unfreeze()
    before = flat(model)
    train(model, optimizer, 1)
    moved = np.abs(flat(model)["norm.bias"] - before["norm.bias"])
    assert_close(moved, np.full(8, 0.05, "float32"), 1e-3)  # AdamW's first step, whatever the others have taken
    step = np.sqrt(np.mean((flat(model)["layers.1.weight"] - before["layers.1.weight"]) ** 2))
    assert_close(step, np.float32(0.2 * 0.05), 1e-3)


def test_multi_optimizer():
    model, alone = Model(), Model()
    both = optim.MultiOptimizer(
        [Zeta(0.05, ns_dtype=mx.float32) for _ in range(2)], [lambda name, _: "layers.1" in name]
    )
    single = Zeta(0.05, ns_dtype=mx.float32)
    train(model, both, 3)
    train(alone, single, 3)
    for name, want in flat(alone).items():
        assert_close(flat(model)[name], want, 1e-5)
    copy = optim.MultiOptimizer([Zeta(0.05), Zeta(0.05)], [lambda name, _: "layers.1" in name])
    copy.state = tree_unflatten(tree_flatten(both.state))
    twin = Model()
    twin.update(model.parameters())
    train(twin, copy, 1)
    train(model, both, 1)
    assert_same(twin, model)


def test_quantised_layers_keep_their_packed_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.layers[0] = model.layers[0].to_quantized()
    optimizer = Zeta(0.1, routes=zeta.routes(model))  # which knows no packed weight
    optimizer.init(model.parameters())  # all of them, as people do
    packed = np.array(model.layers[0].weight)
    assert not optimizer.state["layers"][0]["weight"]
    _, grads = nn.value_and_grad(model, lambda model: model(mx.ones((2, 64))).square().mean())(model)
    optimizer.update(model, grads)
    assert np.array_equal(np.array(model.layers[0].weight), packed)


def test_lora_of_mlx_lm_moves_its_pairs_alone():
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from small_models import mlx_model

    model = mlx_model("llama")
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0})
    routes = zeta.routes(model)
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert {routes[name].reason for name in trained} == {"LoRA pair"}
    before = flat(model)
    optimizer = Zeta(0.05, routes=routes)
    _, grads = nn.value_and_grad(model, lambda model: model(mx.array([[1, 2, 3]])).square().mean())(model)
    optimizer.update(model, grads)
    moved = {name for name, after in flat(model).items() if not np.array_equal(after, before[name])}
    assert moved <= trained.keys() and any("lora_b" in name for name in moved)


def other_state(make):
    model = Model()
    optimizer = make()
    optimizer.init(model.trainable_parameters())
    return optimizer.state


def unversioned(optimizer):
    return {name: value for name, value in other_state(lambda: optimizer).items() if "version" not in name}


def renamed():
    state = other_state(Zeta)
    state["zeta_version_99"] = state.pop("zeta_version_1")
    return state


def wider():
    state = other_state(Zeta)
    state["layers"][0]["weight"]["exp_avg"] = mx.zeros((9, 9))
    return state


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: other_state(lambda: optim.AdamW(0.1)), "written by one of mlx.optimizers, not by this Zeta: start"),
        (lambda: other_state(lambda: NorMuon(0.1)), "written by NorMuon, not by Zeta: load it into NorMuon, or start"),
        (lambda: unversioned(NorMuon(0.1)), "written by NorMuon, not by this Zeta: start anew"),
        (lambda: other_state(Zeta) | {"step": 3}, "step is int, but must be an mx.array: convert it"),
        (renamed, "version_99.*install the zeta that wrote it"),
        (wider, "another model"),
        (lambda: {"weight": {}}, "with a step"),
    ],
)
def test_foreign_state_is_refused_and_the_optimizer_left_alone(make, message):
    model, twin, optimizer, other = Model(), Model(), Zeta(0.05), Zeta(0.05)
    train(model, optimizer, 2)
    train(twin, other, 2)
    with pytest.raises(ValueError, match=message):
        optimizer.state = make()
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert_same(model, twin)


def test_state_of_other_shapes_is_refused_by_a_fresh_optimizer_before_it_moves_anything():
    model, optimizer = Model(), Zeta(0.05)
    optimizer.state = wider()
    before = flat(model)
    with pytest.raises(ValueError, match="another model"):
        train(model, optimizer, 1)
    assert all(np.array_equal(after, before[name]) for name, after in flat(model).items())


def test_state_of_another_model_is_refused_at_the_first_step():
    model, first, optimizer, again = Model(), Zeta(0.05), Zeta(0.05), Zeta(0.05)
    train(model, first, 1)
    optimizer.state = {"inner" if name == "layers" else name: value for name, value in first.state.items()}
    with pytest.raises(ValueError, match=r"inner\.0\..*another model"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"another model"):
        optimizer.init({"blocks": model.trainable_parameters()["layers"]})
    again.state = first.state
    model.layers[0].freeze()
    params = model.trainable_parameters()
    again.apply_gradients(params, params)  # what does not move now is no reason


def tensor(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)


def flat_state(optimizer):
    return {name: np.array(value) for name, value in tree_flatten(optimizer.state)}


@pytest.mark.parametrize(
    "name, grad, param, error, message",
    [
        ("up.weight", tensor(6, 4), tensor(4, 6), ValueError, r"gradient of up.weight has shape \(6, 4\).*\(4, 6\)"),
        ("up.bias", tensor(1), tensor(8), ValueError, "gradient of up.bias"),
        ("up.weight", tensor(4, 4), tensor(4, 4, dtype=mx.int32), TypeError, "up.weight is mlx.core.int32"),
        ("up.weight", tensor(4, 4), tensor(4, 4, dtype=mx.complex64), TypeError, "complex64"),
        ("bad.matrices", tensor(4, 4), tensor(4, 4), ValueError, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(name, grad, param, error, message):
    routes = {"norm.weight": zeta.route("norm.weight", (4,)), "bad.matrices": zeta.Route("zeta", (1, 2, 2), "wrong")}
    routes |= {name: zeta.route(name, tuple(param.shape)) for name in ("up.weight", "up.bias")}
    optimizer = Zeta(optim.linear_schedule(0.1, 0.2, 3), routes=routes)
    known = {"norm.weight": tensor(4)}
    optimizer.apply_gradients(known, known)
    before = flat_state(optimizer)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients(known | {name: grad}, known | {name: param})
    after = flat_state(optimizer)
    assert all(np.array_equal(after[key], value) for key, value in before.items()) and len(after) == len(before)


def test_a_gradient_of_no_parameter_is_refused_before_anything_changes():
    optimizer, params = Zeta(0.1), {"a": tensor(4, 4), "b": tensor(4), "c": tensor(4)}
    optimizer.apply_gradients(params, params)
    before = flat_state(optimizer)
    with pytest.raises(ValueError, match=r"a gradient of d\.weight, but no such parameter: there are a, b, c"):
        optimizer.apply_gradients(params | {"d": {"weight": tensor(4)}}, params)
    after = flat_state(optimizer)
    assert all(np.array_equal(after[key], value) for key, value in before.items()) and len(after) == len(before)


@pytest.mark.parametrize("kind", [Zeta, Muon])
@pytest.mark.parametrize("what", ["model", "parameters", "list", "array"])
def test_parameters_in_place_of_the_rate_are_refused_in_a_line(kind, what):
    model = Model()
    given = {"model": model, "parameters": model.parameters(), "list": [tensor(4, 4)], "array": tensor(4, 4)}[what]
    with pytest.raises(TypeError, match=rf"learning_rate is \w+, but .*{kind.__name__}\(learning_rate=1e-3\)") as error:
        kind(given)
    assert len(str(error.value)) < 200
    assert kind(mx.array(0.5)).learning_rate == kind(mx.array([0.5])).learning_rate == 0.5


def test_init_with_wrong_routes_leaves_the_state_alone():
    model = Model()
    optimizer = Zeta(0.1, routes=zeta.routes(Model(1)))
    with pytest.raises(ValueError, match="of this very model"):
        optimizer.init(model.trainable_parameters())
    assert not optimizer.state.keys() & model.keys()


@pytest.mark.parametrize("form", ["flat", "flat in a tree", "flat in a list"])
def test_a_tree_may_be_flat(form):
    flat = {"up.weight": tensor(4, 6), "up.bias": tensor(6)}
    tree = {"flat": flat, "flat in a tree": {"block.0": flat}, "flat in a list": {"blocks": [flat]}}[form]
    nested = tree_unflatten(tree_flatten(tree))
    optimizer, other, loaded = Zeta(0.1), Zeta(0.1), Zeta(0.1)
    for _ in range(2):
        tree, nested = optimizer.apply_gradients(tree, tree), other.apply_gradients(nested, nested)
    loaded.state = tree_unflatten(tree_flatten(optimizer.state))  # which a file makes of it
    loaded.init(tree)
    again, nested = loaded.apply_gradients(tree, tree), other.apply_gradients(nested, nested)
    want = dict(tree_flatten(nested))
    for name, got in tree_flatten(again):
        assert_close(np.array(got), np.array(want[name]), 0.0)
    assert flat_state(loaded).keys() == flat_state(other).keys()


def test_a_schedule_may_return_a_python_number(tmp_path):
    model, optimizer = Model(), Zeta(lambda step: 0.05)
    other = Zeta(lambda step: 0.05)
    train(model, optimizer, 1)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    other.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    train(model, other, 1)


def test_a_subclass_reads_its_bases_state():
    class Own(Muon):
        pass

    model, first, second = Model(), Muon(0.05), Own(0.05)
    train(model, first, 1)
    second.state = first.state
    train(model, second, 1)


def test_float64_is_float64():
    rng, hyper, undecayed = np.random.default_rng(0), zeta.Hyper(lr=1e-2), zeta.Hyper(lr=1e-2, weight_decay=0.0)
    params = {"up.weight": rng.standard_normal((6, 8)), "bias": rng.standard_normal(8)}
    want, got = dict(params), {name: mx.array(p, mx.float64) for name, p in params.items()}
    states = {"up.weight": core.init(params["up.weight"]), "bias": adamw.init(params["bias"])}
    optimizer = Zeta(mx.array(1e-2, mx.float64))
    with mx.stream(mx.cpu):
        for _ in range(4):
            grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
            got = optimizer.apply_gradients({name: mx.array(g, mx.float64) for name, g in grads.items()}, got)
            for name, update, own in (("up.weight", core.update, hyper), ("bias", adamw.update, undecayed)):
                want[name], states[name] = update(grads[name], states[name], want[name], own)
        for name in params:
            assert_close(np.array(got[name]), want[name], 1e-12, params[name])


def test_the_example_keeps_float64():
    from trainer import on_mlx

    from zeta.bench import model

    config = model.Config(vocab=16, context=4, layers=1, width=8, heads=2, kv_heads=1)
    trainer = on_mlx.Trainer(config, model.init(config, 0), dtype="float64", device="cpu")
    trainer.step(np.arange(10, dtype="int32").reshape(2, 5), 1e-2)
    (part,) = trainer.parts
    found = {n: value.dtype for n, value in tree_flatten(part.optimizer.state) if "." in n or n == "learning_rate"}
    assert set(found.values()) == {mx.float64}


@pytest.mark.parametrize("wrote, reads", [("zeta", "adamw"), ("zeta", "eta"), ("adamw", "zeta"), ("muon", "zeta")])
def test_the_example_refuses_another_optimizers_checkpoint(wrote, reads):
    from trainer import on_mlx

    from zeta.bench import model

    config = model.Config(vocab=16, context=4, layers=1, width=8, heads=2, kv_heads=1)
    writer, reader = (on_mlx.Trainer(config, model.init(config, 0), name, device="cpu") for name in (wrote, reads))
    before = reader.arrays()
    with pytest.raises(ValueError, match="load it into the optimizer that wrote it"):
        reader.load(writer.arrays())
    assert all(np.array_equal(before[name], value) for name, value in reader.arrays().items())


@pytest.mark.parametrize("shape", [(), (4,)])
def test_newton_schulz_of_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=r"a matrix \(\.\.\., rows, cols\) is needed"):
        newton_schulz(mx.ones(shape))


def test_decompositions_are_of_small_matrices(monkeypatch):
    """MLX's SVD makes all vectors: of 16x4000 numbers it would make 4000x4000."""
    sizes, svd = [], mx.linalg.svd
    monkeypatch.setattr(mx.linalg, "svd", lambda x, **options: sizes.append(x.shape) or svd(x, **options))
    a, s, b = preconditioned.svd(tensor(16, 4000))
    assert sizes == [(16, 16)] and [x.shape for x in (a, s, b)] == [(16, 16), (16,), (16, 4000)]


def test_ranks_start_no_work_inside_a_compiled_step():
    class Group:
        def size(self):
            return 2

    mx.compile(lambda x: together({"w": x}, Group())["w"] + 1)(mx.ones(2))  # MLX refuses to: no error


def test_what_a_name_leaves_open_is_reported_and_the_model_decides_it():
    pytest.importorskip("mlx_lm")
    from small_models import mlx_model

    model = mlx_model("phi3")
    with pytest.warns(UserWarning, match=r"qkv_proj\.weight fuses query, key and value.*routes=zeta\.routes\(model\)"):
        Zeta(0.1).init(model.trainable_parameters())
    Zeta(0.1, routes=zeta.routes(model)).init(model.trainable_parameters())  # no warning


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.1}, "Muon takes no lr: call it learning_rate"),
        ({"momentum": 0.9}, "Muon takes no momentum: it is the first of betas"),
        ({"bias_correction": True}, "Muon takes no bias_correction: AdamW's half always"),
        ({"routes": Model()}, r"routes is Model, but must be what zeta\.routes\(model\) gives"),
    ],
)
def test_what_it_does_not_take_is_told_in_a_line(options, message):
    with pytest.raises(TypeError, match=message):
        Muon(**options)


def test_a_dtype_of_products_is_one_of_floating_point():
    assert Zeta(ns_dtype="bfloat16").ns_dtype == mx.bfloat16  # as a YAML file says it
    for wrong in ("int8", "half", mx.int32, 16, np.float32):
        with pytest.raises(ValueError, match=r"ns_dtype is .*, but must be None or one of float16"):
            Zeta(ns_dtype=wrong)


def test_moments_of_a_narrow_state_take_no_digits_off_the_weights():
    model, optimizer = Model(), Zeta(1e-6)
    train(model, optimizer, 1)
    optimizer.state = tree_map(lambda x: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x, optimizer.state)
    before = flat(model)
    train(model, optimizer, 1)
    assert max(np.abs(array - before[name]).max() for name, array in flat(model).items()) < 1e-5
    assert {x.dtype for name, x in tree_flatten(optimizer.state) if "exp_avg" in name} == {mx.float32}


def test_what_rounding_took_off_joins_weights_that_have_room_for_it():
    model, optimizer = Model(), Zeta(0.05)
    model.set_dtype(mx.bfloat16)
    train(model, optimizer, 2)
    remainder = np.array(optimizer.state["layers"][0]["weight"]["remainder"].astype(mx.float32))
    model.set_dtype(mx.float32)
    weight, optimizer.learning_rate = np.array(model.layers[0].weight), 0.0
    train(model, optimizer, 1)
    assert np.abs(remainder).max() > 1e-4
    np.testing.assert_allclose(np.array(model.layers[0].weight), weight + remainder, rtol=1e-6)
    assert not any(name.endswith("remainder") for name, _ in tree_flatten(optimizer.state))


@pytest.mark.parametrize("kind", [kind for kind in vars(mlx_backend).values() if isinstance(kind, type)])
def test_a_matrix_with_another_route_begins_anew(kind):
    model = Model()
    rules, adamw = zeta.routes(model), zeta.routes(model, {"layers": "adamw"})
    for before, after in ((rules, adamw), (adamw, rules)):
        first, then, again = (kind(1e-3, routes=routes, weight_decay=0.0) for routes in (before, after, after))
        train(model, first, 20)
        then.state = dict(tree_unflatten(tree_flatten(first.state)))
        then.learning_rate, weight = 1e-3, np.array(model.layers[0].weight)
        train(model, then, 1)
        # An entry moves by about the rate; without its variance's past AdamW's would by ten times that.
        assert np.abs(np.array(model.layers[0].weight) - weight).max() < 2e-3
        load_named_state(model, again, named_state(model, then))


def test_a_rate_in_half_precision_still_decays():
    model = Model()
    before, optimizer = np.array(model.layers[0].weight), Zeta(1e-3, weight_decay=0.1)
    optimizer.learning_rate = mx.array(1e-3, mx.bfloat16)
    zeros = tree_map(mx.zeros_like, model.trainable_parameters())
    optimizer.update(model, zeros)
    np.testing.assert_allclose(np.array(model.layers[0].weight), before * (1 - 1e-4), rtol=1e-6)


class Convolutions(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, size), nn.ConvTranspose2d(8, 3, size)
        self.head = nn.Linear(3, 4)

    def __call__(self, x):
        return self.head(self.up(self.stem(x)).mean((1, 2)))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("kind", ["Zeta", "Eta"])
def test_convolutions_move_to_torch_and_back(size, kind):
    torch = pytest.importorskip("torch")
    from zeta.backends import torch as there

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.up = torch.nn.Conv2d(3, 8, size), torch.nn.ConvTranspose2d(8, 3, size)
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.up(self.stem(x)).mean((2, 3)))

    def step(model, optimizer):
        optimizer.update(model, nn.value_and_grad(model, lambda m: (m(x) - 1).square().mean())(model)[1])

    x, model, twin, again = mx.random.normal((2, 6, 6, 3)), Convolutions(size), Twin(), Convolutions(size)
    given = torch.tensor(np.array(x)).permute(0, 3, 1, 2)
    own, back = (
        getattr(mlx_backend, kind)(1e-2, routes=zeta.routes(m), ns_dtype=mx.float32, decay_vectors=True)
        for m in (model, again)
    )
    other = getattr(there, kind)(there.param_groups(twin), lr=1e-2, ns_dtype=torch.float32, decay_vectors=True)
    step(model, own)
    there.load_named_state(twin, other, to_numpy(named_state(model, own)))
    step(model, own)
    (twin(given) - 1).square().mean().backward()
    other.step()
    np.testing.assert_allclose(np.array(model(x)), twin(given).detach().numpy(), atol=2e-4)
    load_named_state(again, back, there.to_numpy(there.named_state(twin, other)))
    step(again, back)
    step(model, own)
    np.testing.assert_allclose(np.array(again(x)), np.array(model(x)), atol=2e-4)


def test_state_by_a_convolutions_columns_moves_nowhere():
    model = Convolutions(3)
    optimizer = mlx_backend.SOAP(1e-2, routes=zeta.routes(model))
    optimizer.init(model.trainable_parameters())
    with pytest.raises(ValueError, match="lies by the convolution's columns"):
        named_state(model, optimizer)


def test_arrays_of_a_checkpoint_do_not_change_with_the_models():
    x = mx.ones((64, 64))
    kept = to_numpy({"x": x})["x"]
    x += 1
    x @= mx.ones((64, 64))
    mx.eval(x, [mx.full((64, 64), 7.0) for _ in range(9)])
    assert (kept == 1).all()


def test_a_state_of_other_layers_is_taken_where_the_model_has_them():
    model, optimizer, again = Model(), Zeta(0.05), Zeta(0.05)
    model.freeze()
    model.norm.unfreeze()
    train(model, optimizer, 1)
    again.state = optimizer.state
    model.freeze()
    model.layers[0].unfreeze()
    train(model, again, 1)


def test_a_schedule_continues_or_says_that_it_begins_anew():
    model, schedule = {"up": {"weight": mx.ones((4, 4))}}, optim.cosine_decay(1e-2, 100)
    first, then = Zeta(schedule), Zeta(schedule)
    for _ in range(3):
        first.apply_gradients(model, model)
    saved = named_state(model, first)
    with pytest.warns(UserWarning, match="schedules begin anew: give load_named_state step="):
        load_named_state(model, then, saved)
    load_named_state(model, then, saved, step=3)
    assert then.step.item() == 3


def test_modules_in_a_dict_with_integer_keys(tmp_path):
    class Keyed(Model):
        def __init__(self):
            super().__init__()
            self.layers = {3: self.layers[0], 7: self.layers[1]}

        def __call__(self, ids):
            x = self.embed(ids)
            for layer in self.layers.values():
                x = x + mx.tanh(layer(x))
            return self.norm(x)

    model = Keyed()
    optimizer = Zeta(0.05, routes=zeta.routes(model))
    train(model, optimizer, 2)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    twin, other = Keyed(), Zeta(0.05, routes=zeta.routes(model))
    twin.update(model.parameters())
    other.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    other.init(twin.trainable_parameters())
    train(model, optimizer, 2, start=2)
    train(twin, other, 2, start=2)
    assert_same(twin, model)
