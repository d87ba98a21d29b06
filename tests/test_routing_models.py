"""Where every parameter of real models goes, name by name, in torch and in MLX."""

import re
from pathlib import Path

import pytest
import small_models

import zeta
from zeta.routing.layout import shapes

TABLES = Path(__file__).with_name("routing_tables.txt")


def line(name, r):
    cut = "x".join(map(str, r.matrices)) if not r.parts else " + ".join("x".join(map(str, s)) for s in shapes(r))
    return f"{name}  {r.treatment}  {r.reason}" + (f"  {cut}" if cut else "")


def table(model):
    """A line for every parameter; numbered layers are alike, and stand there once."""
    lines = {}
    for name, r in zeta.routes(model).items():
        key = re.sub(r"\.(layers|h|block|blocks)\.\d+\.", r".\1.*.", name)
        assert lines.setdefault(key, line(key, r)) == line(key, r)
    return "\n".join(lines.values())


def expected():
    sections = re.split(r"^# ", TABLES.read_text(), flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, _, body in (section.partition("\n") for section in sections)}


@pytest.mark.parametrize("name", small_models.TORCH)
def test_torch(name):
    pytest.importorskip("transformers")
    assert table(small_models.torch_model(name)) == expected()[f"torch {name}"]


@pytest.mark.parametrize("name", small_models.MLX)
def test_mlx(name):
    pytest.importorskip("mlx_lm")
    assert table(small_models.mlx_model(name)) == expected()[f"mlx {name}"]


def test_scales_of_quantised_layers_go_to_adamw():
    nn = pytest.importorskip("mlx.nn")
    pytest.importorskip("mlx_lm")
    model = small_models.mlx_model("llama")
    nn.quantize(model, group_size=32, class_predicate=lambda name, _: name.endswith(("q_proj", "embed_tokens")))
    found = [r[:3] for name, r in zeta.routes(model).items() if name.endswith((".scales", ".biases"))]
    assert found and set(found) == {("adamw", (), "quantisation scale")}


def both(name):
    pytest.importorskip("transformers")
    pytest.importorskip("mlx_lm")
    return [zeta.routes(model(name)) for model in (small_models.torch_model, small_models.mlx_model)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_torch_and_mlx_agree(name):
    torch, mlx = both(name)
    assert {n: r for n, r in torch.items() if n != "lm_head.weight" or n in mlx} == mlx


def test_lengths_of_a_weight_norm_go_to_adamw():
    torch = pytest.importorskip("torch")
    norm, layers = torch.nn.utils.parametrizations.weight_norm, (torch.nn.Linear(8, 16), torch.nn.Conv1d(8, 16, 3))
    for layer in layers:
        found = zeta.routes(torch.nn.Sequential(norm(layer), torch.nn.Linear(4, 4)))
        assert found["0.parametrizations.weight.original0"].treatment == "adamw"
        assert found["0.parametrizations.weight.original1"].treatment == "zeta"


def test_a_mixture_of_experts_agrees():
    """Transformers fuses gate and up of all experts; mlx-lm keeps two stacks of them."""
    torch, mlx = both("qwen3_moe")
    for i in range(2):
        prefix = f"model.layers.{i}.mlp."
        fused, down = (torch.pop(f"{prefix}experts.{name}_proj") for name in ("gate_up", "down"))
        gate, up, own = (mlx.pop(f"{prefix}switch_mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        assert down == own and gate == up
        assert fused.matrices == (2 * gate.matrices[0], *gate.matrices[1:])
    assert torch == mlx


def test_gpt2_agrees_transposed():
    torch, mlx = both("gpt2")
    fused, plain = torch["transformer.h.0.attn.c_attn.weight"], mlx["model.h.0.attn.c_attn.weight"]
    assert shapes(fused) == [(1, 32, 32)] * 3 and shapes(plain) == [(3, 32, 32)]
    rest = {n.removeprefix("transformer."): r.treatment for n, r in torch.items() if n != "lm_head.weight"}
    assert rest == {n.removeprefix("model."): r.treatment for n, r in mlx.items()}


@pytest.mark.parametrize("vocabulary", [100, 256])  # the second is a width inside, too
@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_a_last_layer_of_an_embedding_s_shape_is_the_head_whatever_it_is_called(library, vocabulary):
    """Of models written by hand, which have no config to say so; a block's layer beside as many positions is none."""
    nn = pytest.importorskip("torch.nn" if library == "torch" else "mlx.nn")
    model = nn.Module()
    model.tokens, model.pos_emb = nn.Embedding(vocabulary, 64), nn.Embedding(192, 64)
    model.first, model.up, model.down = nn.Linear(64, 192), nn.Linear(192, 256), nn.Linear(256, 64)
    model.readout = nn.Linear(64, vocabulary)
    reasons = {name: (r.treatment, r.reason) for name, r in zeta.routes(model).items() if name.endswith("weight")}
    assert reasons["readout.weight"] == ("adamw", "output head") and reasons["tokens.weight"][0] == "adamw"
    assert {reasons[f"{name}.weight"] for name in ("first", "up", "down")} == {("zeta", "matrix")}
