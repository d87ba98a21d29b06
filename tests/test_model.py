"""The language model: its plain form against each library's fused one, and the same run in every library."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import precision
import pytest
from trainer import text

from zeta.bench import model
from zeta.routing.by_name import route

CONFIG = model.Config(vocab=256, context=12, layers=2, width=16, heads=4, kv_heads=2)
OPERANDS: dict[str, list[tuple[int, ...]]] = {
    "rms_norm": [(2, 3, 5), (5,)],
    "attention": [(2, 6, 7, 4), (2, 2, 7, 4), (2, 2, 7, 4)],
    "attention alone": [(1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)],
    "cross_entropy": [(6, 11)],
}


def torch_gradients(operation: Any, arrays: list[np.ndarray], fixed: list[np.ndarray]) -> list[np.ndarray]:
    """The operation's result and the gradients of its weighted sum."""
    import torch

    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = operation(*leaves, *(torch.tensor(a) for a in fixed))
    (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum().backward()
    return [y.detach().numpy(), *(np.asarray(leaf.grad) for leaf in leaves)]


def mlx_gradients(operation: Any, arrays: list[np.ndarray], fixed: list[np.ndarray]) -> list[np.ndarray]:
    import mlx.core as mx

    constants = [mx.array(a) for a in fixed]

    def weighted(leaves: list[mx.array]) -> mx.array:
        y = operation(*leaves, *constants)
        return (y * mx.cos(mx.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    leaves = [mx.array(a) for a in arrays]
    with mx.stream(mx.cpu):
        gradients = mx.grad(weighted)(leaves)
        return [np.array(operation(*leaves, *constants)), *(np.array(g) for g in gradients)]


GRADIENTS = {"torch": torch_gradients, "mlx": mlx_gradients}


@pytest.fixture(params=GRADIENTS)
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param if request.param == "torch" else "mlx.core")
    return str(request.param)


def glue(library: str) -> Any:
    return import_module(f"trainer.on_{library}")


def assert_close(got: Any, want: Any, rtol: float) -> None:
    """Relative to the largest entry."""
    assert np.shape(got) == np.shape(want)
    assert np.max(np.abs(np.asarray(got, float) - want)) <= rtol * np.max(np.abs(want))


@pytest.mark.parametrize("case", OPERANDS)
def test_fused_equals_plain(library: str, case: str, rng: np.random.Generator) -> None:
    name = case.split()[0]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in OPERANDS[case]]
    fixed = [rng.integers(0, 11, 6).astype(np.int32)] if name == "cross_entropy" else []
    gradients = GRADIENTS[library]
    fused = gradients(getattr(glue(library).FUSED, name), arrays, fixed)
    plain = gradients(getattr(model.PLAIN, name), arrays, fixed)
    oracle = torch_gradients(getattr(model.PLAIN, name), [a.astype(float) for a in arrays], fixed)
    for f, p, o in zip(fused, plain, oracle, strict=True):
        assert_close(f, o, 3e-6)  # float32: some ten roundings of 6e-8
        assert_close(p, o, 3e-6)


def test_the_loss_of_scores_in_half_precision_is_not_rounded_to_it(library: str, rng: np.random.Generator) -> None:
    xp = import_module("torch" if library == "torch" else "mlx.core")
    scores, targets = xp.asarray(rng.standard_normal((50, 11)).astype(np.float32)), xp.asarray(rng.integers(0, 11, 50))
    half = scores.to(xp.bfloat16) if library == "torch" else scores.astype(xp.bfloat16)
    wide = half.to(xp.float32) if library == "torch" else half.astype(xp.float32)
    got, want = (float(glue(library).FUSED.cross_entropy(x, targets)) for x in (half, wide))
    assert got == want != float(glue(library).FUSED.cross_entropy(scores, targets))


def test_a_wrong_fused_form_is_caught(library: str, rng: np.random.Generator) -> None:
    q, k = (rng.standard_normal((1, 2, 9, 8)).astype(np.float32) for _ in range(2))

    def biased(*arrays: Any) -> Any:
        return glue(library).FUSED.attention(*arrays[:2], 1.001 * arrays[2])

    got, want = (GRADIENTS[library](f, [q, k, k], [])[0] for f in (biased, model.attention))
    with pytest.raises(AssertionError):
        assert_close(got, want, 3e-6)


def test_plain_model_runs_on_numpy(library: str, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 256, (3, CONFIG.context + 1)).astype(np.int32)
    params = model.init(CONFIG, 0)
    wide = model.nest({name: a.astype(float) for name, a in params.items()})
    want = model.loss(wide, tokens, model.rotations(CONFIG), CONFIG)
    trainer = glue(library).Trainer(CONFIG, params, dtype="float64", device="cpu")
    assert_close(trainer.loss(tokens), want, 1e-6)  # MLX sums a float64 cross-entropy in float32
    assert abs(want - np.log(256)) < 0.1  # at the start, nothing is known


@pytest.mark.parametrize("tied", [False, True])
def test_no_token_sees_the_next(library: str, tied: bool, rng: np.random.Generator) -> None:
    config = model.Config(256, 8, 1, 8, 2, 1, tied)
    trainer = glue(library).Trainer(config, model.init(config, 0), device="cpu")
    tokens = rng.integers(0, 256, (1, 8)).astype(np.int32)
    changed = np.where(np.arange(8) == 5, (tokens + 1) % 256, tokens).astype(np.int32)
    a, b = trainer.logits(tokens)[0], trainer.logits(changed)[0]
    assert_close(a[:5], b[:5], 1e-6)
    assert np.abs(a[5:] - b[5:]).max(axis=-1).min() > 1e-5


def losses(module: Any, dtype: str, layers: int = 2, **options: Any) -> np.ndarray:
    """(20,) the losses of twenty free-running steps."""
    config = model.Config(vocab=256, context=32, layers=layers, width=32, heads=4, kv_heads=2)
    tokens = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    trainer = module.Trainer(config, model.init(config, 0), dtype=dtype, device="cpu", **options)
    steps = [trainer.step(text.batch(tokens, s, 4, 33, 0), 4e-3 * min(1, s / 10)) for s in range(1, 21)]
    return np.array([float(result.reshape(-1)[0]) for result in steps])


@pytest.fixture(scope="module")
def oracle() -> np.ndarray:
    return losses(glue("torch"), "float64")


def test_twenty_steps_are_the_same_in_every_library(library: str, oracle: np.ndarray, default_dtype: str) -> None:
    assert oracle[-1] < oracle[0] - 1
    np.testing.assert_allclose(losses(glue(library), "float32"), oracle, rtol=precision.LOSSES[default_dtype])


def test_another_optimizer_setting_is_another_run(oracle: np.ndarray) -> None:
    other = losses(glue("torch"), "float64", betas=(0.9, 0.99))
    assert np.max(np.abs(other / oracle - 1)) > 4 * max(precision.LOSSES.values())


@pytest.mark.parametrize("optimizer", ["zeta", "eta", "adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_learns(library: str, optimizer: str, dtype: str) -> None:
    got = losses(glue(library), dtype, layers=1, optimizer=optimizer)
    assert got[-1] < got[0] - 1


def test_names_are_routed() -> None:
    treatments = {name: route(name, shape).treatment for name, shape in model.shapes(CONFIG).items()}
    ours = {name for name, treatment in treatments.items() if treatment == "zeta"}
    assert ours == {name for name in treatments if "_proj." in name}
    assert len(ours) == 7 * CONFIG.layers


def test_nest_and_flatten_are_inverse() -> None:
    params = model.init(CONFIG, 0)
    assert model.flatten(model.nest(params)).keys() == params.keys()
    assert "lm_head.weight" not in model.shapes(model.Config(256, 12, 1, 16, 4, 2, tied=True))


@pytest.mark.parametrize(
    "sizes", [dict(heads=3), dict(width=20), dict(kv_heads=3), dict(layers=0), dict(heads=16), dict(width=-16)]
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"divi|at least 1|evenly"):
        model.Config(**{**CONFIG.__dict__, **sizes})
