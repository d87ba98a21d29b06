"""`param_groups` and `zeta.routes` on the layers of torch, torchvision, timm and PEFT; what overrules them."""

import pytest

import zeta
from zeta.routing.layout import shapes

torch = pytest.importorskip("torch")
nn = torch.nn

from zeta.backends.torch import Zeta, param_groups  # noqa: E402


def named(**modules):
    return nn.ModuleDict(modules)


def test_layers_of_torch():
    model = named(
        conv1=nn.Conv1d(4, 6, 3),
        conv2=nn.Conv2d(4, 6, 3, groups=2),
        conv3=nn.Conv3d(4, 6, 3),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
        up=nn.ConvTranspose2d(4, 6, 3),
        attn=nn.MultiheadAttention(8, 2),
        cross=nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
        lstm=nn.LSTM(5, 8),
        gru=nn.GRU(5, 8),
        bilinear=nn.Bilinear(3, 4, 5),
        norm=nn.BatchNorm2d(4),
        table=nn.EmbeddingBag(9, 8),
        embedder=nn.Linear(4, 8),  # its name speaks of an embedding, its class does not
    )
    found = {name: shapes(r) for name, r in zeta.routes(model).items() if r.treatment == "zeta"}
    assert found == {
        "conv1.weight": [(1, 6, 12)],
        "conv2.weight": [(2, 3, 18)],
        "conv3.weight": [(1, 6, 108)],
        "up.weight": [(1, 4, 54)],
        "attn.in_proj_weight": [(3, 8, 8)],
        "attn.out_proj.weight": [(1, 8, 8)],
        "cross.q_proj_weight": [(1, 8, 8)],
        "cross.k_proj_weight": [(1, 8, 6)],
        "cross.v_proj_weight": [(1, 8, 4)],
        "cross.out_proj.weight": [(1, 8, 8)],
        "lstm.weight_ih_l0": [(4, 8, 5)],
        "lstm.weight_hh_l0": [(4, 8, 8)],
        "gru.weight_ih_l0": [(3, 8, 5)],
        "gru.weight_hh_l0": [(3, 8, 8)],
        "bilinear.weight": [(5, 3, 4)],
        "embedder.weight": [(1, 8, 4)],
    }


def test_per_head_is_an_option():
    found = zeta.routes(named(attn=nn.MultiheadAttention(8, 2)), per_head=True)
    assert shapes(found["attn.in_proj_weight"]) == [(6, 4, 8)]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied):
    model = named(wte=nn.Embedding(9, 8), block=nn.Linear(8, 8), lm_head=nn.Linear(8, 9, bias=False))
    if tied:
        model["lm_head"].weight = model["wte"].weight
    groups = param_groups(model)
    assert [name for name, _ in groups[0]["params"]] == ["block.weight"]
    assert ("lm_head.weight" in [name for name, _ in groups[1]["params"]]) is not tied


def test_only_the_last_layer_of_a_head_goes_to_adamw():
    """torchvision's VGG and AlexNet; from the names alone it cannot be known."""
    model = named(classifier=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    assert [r.treatment for n, r in zeta.routes(model).items() if "weight" in n] == ["zeta", "adamw"]
    with pytest.warns(UserWarning, match=r"classifier\.\*\.weight is one of several layers"):
        Zeta(model.named_parameters())


@pytest.mark.parametrize(
    "overrides",
    [{"odd": "adamw"}, lambda name, p: "adamw" if "odd" in name else None, {"odd": zeta.Route("adamw", (), "mine")}],
)
def test_overrides_by_pattern_function_and_route(overrides):
    model = named(odd=nn.Linear(4, 4), even=nn.Linear(4, 4))
    found = zeta.routes(model, overrides)
    assert found["odd.weight"].treatment == "adamw" and found["even.weight"].treatment == "zeta"


def test_an_override_may_say_how_a_layer_is_cut():
    model = named(strange=nn.Linear(4, 10))
    route = zeta.Route("zeta", (1, 10, 4), "mine", parts=(6, 4))
    assert shapes(zeta.routes(model, {"strange.weight": route})["strange.weight"]) == [(1, 6, 4), (1, 4, 4)]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"odd.*bias": "zeta"}, "needs matrices"),
        ({"odd.weight": "muon"}, "muon"),
        ({"od$": "adamw"}, "no parameter's name"),
        ({"odd.weight": zeta.Route("zeta", (1, 3, 4), "")}, "do not fit"),
        ({"odd.weight": zeta.Route("zeta", (1, 4, 4), "", parts=(1, 2))}, "add up"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        zeta.routes(named(odd=nn.Linear(4, 4)), overrides)


@pytest.mark.parametrize("name, size", [("query_key_value", 24), ("qkv_proj", 20), ("in_proj", 24), ("kv_b_proj", 16)])
def test_what_is_ambiguous_is_named_and_can_be_decided(name, size):
    model = nn.ModuleList([named(**{name: nn.Linear(8, size)}) for _ in range(2)])
    with pytest.warns(UserWarning, match=rf"^\*\.{name}\.weight [^;]*: decide with overrides"):
        zeta.routes(model)
    zeta.routes(model, {f"{name}.weight": "zeta"})  # decided: no warning


def test_options_go_into_both_groups_and_each_may_be_changed():
    groups = param_groups(named(up=nn.Linear(4, 4)), lr=0.3, weight_decay=0.2)
    groups[1]["weight_decay"] = 0.0
    optimizer = Zeta(groups, lr=1.0)
    assert [(g["treatment"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("zeta", 0.3, 0.2),
        ("adamw", 0.3, 0.0),
    ]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("make", [param_groups, lambda model: Zeta(model.named_parameters())])
def test_parameters_that_could_not_be_stepped_are_named(make, dtype):
    model = named(up=nn.Linear(4, 4))
    model["up"].phase = nn.Parameter(torch.ones(4, 4).to(dtype))
    with pytest.raises(TypeError, match=rf"up\.phase is {dtype}, but only torch\.float16, .*freeze it"):
        make(model)
    model["up"].phase.requires_grad_(False)
    make(model)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_compiled_and_wrapped_models_are_the_same_models(wrapper):
    model = named(classifier=nn.Linear(4, 4), up=nn.Linear(4, 4))
    wrapped = named(**{wrapper: model})
    assert list(zeta.routes(wrapped).values()) == list(zeta.routes(model).values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 asks transformers 5.23
def test_lora_pairs_of_peft():
    peft = pytest.importorskip("peft")
    import small_models

    pytest.importorskip("transformers")
    config = peft.LoraConfig(target_modules=["qkv_proj", "embed_tokens"], modules_to_save=["lm_head"], r=4)
    found = zeta.routes(peft.get_peft_model(small_models.torch_model("phi3"), config))
    prefix = "base_model.model."
    lora = f"{prefix}model.layers.0.self_attn.qkv_proj.lora_{{}}.default.weight"
    assert shapes(found[lora.format("A")]) == [(1, 4, 32)]
    assert shapes(found[lora.format("B")]) == [(1, 64, 4)]
    assert found[f"{prefix}lm_head.modules_to_save.default.weight"].reason == "output head"
    assert len(shapes(found[f"{prefix}model.layers.0.self_attn.qkv_proj.base_layer.weight"])) == 3
