"""Which parameter gets which treatment: names and shapes as real models have them, in torch's and MLX's layouts."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import zeta
from zeta.routing.by_name import route
from zeta.routing.layout import check_route


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 32)),
        ("model.layers.3.mlp.down_proj.weight", (32, 128)),
        ("transformer.h.0.attn.c_proj.weight", (32, 32)),
        ("blocks.2.head.weight", (8, 8)),  # a layer's own head, not the output's
        ("", (8, 8)),
        ("weight", (8, 8)),
        ("up.parametrizations.weight.original1", (64, 1)),
        ("encoder.patch_embeddings.projection.weight", (8, 12)),
    ],
)
def test_matrices(name, shape):
    assert route(name, shape)[:2] == ("zeta", (1, *shape))


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("layers.0.input_layernorm.weight", (32,), "vector"),
        ("layers.0.mlp.up_proj.bias", (128,), "vector"),
        ("scale", (), "vector"),
        ("layers.0.experts.up.bias", (8, 128), "bias"),
        ("layers.0.attn.q_norm.weight", (4, 8), "norm"),
        ("model.embed_tokens.weight", (1000, 32), "embedding"),
        ("transformer.wte.weight", (1000, 32), "embedding"),
        ("transformer.wpe.weight", (128, 32), "embedding"),
        ("pos_embed", (1, 17, 32), "embedding"),
        ("cls_token", (1, 1, 32), "embedding"),
        ("lm_head.weight", (1000, 32), "output head"),
        ("model.lm_head.weight", (1000, 32), "output head"),  # a peer looks for "head" in the local name only
        ("head.weight", (10, 32), "output head"),
        ("classifier.weight", (10, 32), "output head"),
        ("fc.weight", (10, 32), "output head"),  # torchvision's ResNet
        ("head.fc.weight", (10, 32), "output head"),  # timm
        ("classifier.out_proj.weight", (10, 32), "output head"),  # RoBERTa
        ("base_model.model.classifier.modules_to_save.default.weight", (10, 32), "output head"),  # PEFT
        ("_orig_mod.lm_head.weight", (1000, 32), "output head"),  # torch.compile
        ("unembed.weight", (1000, 32), "output head"),
        ("layer_scale", (32, 1, 1), "vector"),
        ("up.parametrizations.weight.original0", (64, 1), "norm"),
        ("up.weight_g", (64, 1), "norm"),
        ("layers.0.self_attn.q_proj.scales", (64, 2), "quantisation scale"),
        ("layers.0.mlp.switch_mlp.up_proj.biases", (4, 64, 2), "quantisation scale"),
    ],
)
def test_all_else_goes_to_adamw(name, shape, reason):
    assert route(name, shape)[:3] == ("adamw", (), reason)


@pytest.mark.parametrize(
    "name, shape, matrices",
    [
        ("conv.weight", (16, 8, 3, 3), (1, 16, 72)),
        ("layers.0.conv1d.weight", (16, 4, 3), (1, 16, 12)),
        ("features.0.weight", (16, 3, 3, 8), (1, 16, 72)),  # MLX keeps channels last
        ("patch_embed.proj.weight", (32, 3, 16, 16), (1, 32, 768)),
        ("layers.0.mlp.experts.gate_up_proj", (4, 32, 64), (4, 32, 64)),  # a peer flattens experts into one matrix
        ("layers.0.mlp.switch_mlp.up_proj.weight", (4, 64, 32), (4, 64, 32)),
        ("layers.0.experts.weight", (2, 4, 8, 12), (8, 8, 12)),
        ("attn.heads.q", (4, 8, 32), (4, 8, 32)),
    ],
)
def test_more_than_two_axes(name, shape, matrices):
    assert route(name, shape)[:2] == ("zeta", matrices)


@pytest.mark.parametrize("name, doubt", [("0.weight", True), ("temporal.weight", True), ("conv.weight", False)])
def test_three_axes_that_nothing_explains_are_a_doubt(name, doubt):
    assert ("may be a convolution" in route(name, (16, 8, 3)).doubt) == doubt
    assert not route("layers.0.experts.up.weight", (16, 8, 3)).doubt


def test_a_convolution_to_one_channel_is_a_vector():
    assert route("decoder.conv_post.weight", (1, 32, 7)).treatment == "adamw"
    assert route("decoder.conv_pre.weight", (32, 1, 7)).treatment == "zeta"


def test_a_route_with_a_misspelt_treatment_is_refused():
    with pytest.raises(ValueError, match="treatment is 'Zeta', but must be"):
        check_route(zeta.Route("Zeta", (1, 4, 3), "mine"), (4, 3))


def test_report_leaves_out_what_is_no_weight():
    parameters = [("packed", np.ones((8, 4), "uint32")), ("up.weight", np.ones((8, 4)))]
    assert zeta.report(parameters, {"up.weight": route("up.weight", (8, 4))}).row_count == 1
    assert zeta.report(parameters).row_count == 1


def test_report_names_every_parameter_with_its_treatment(target):
    parameters = [
        ("layers.0.up.weight", target.wide(np.ones((8, 4)))),
        ("lm_head.weight", target.wide(np.ones((9, 4)))),
    ]
    console = Console(width=120, file=StringIO())
    console.print(zeta.report(parameters))
    up, head = [line for line in console.file.getvalue().splitlines() if "weight" in line]
    assert all(word in up for word in ("layers.0.up.weight", "8x4", "zeta", "1x8x4", "matrix"))
    assert all(word in head for word in ("lm_head.weight", "9x4", "adamw", "output head"))
