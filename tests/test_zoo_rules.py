"""Each rule of the routing is needed: without it a type of the zoos is routed differently. And what stays a doubt."""

import re
import warnings
from collections import Counter

import pytest
import zoo_mlx
import zoo_table
import zoo_transformers

import zeta
from zeta.routing import by_module, kinds, source, splits
from zeta.routing.kinds import bases
from zeta.routing.source import Use

pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")
NOTHING = re.compile(r"(?!)()")
MLX, TORCH = zoo_mlx, zoo_transformers
RULES = {  # where the rule stands, what is put in its place, and a type that shows it
    "a head has the shape of the vocabulary's table": (kinds.Model, "vocabularies", {0}, MLX, "gpt_neox"),
    "a head is the last layer of what is named so": (kinds, "HEAD_MODULE", NOTHING, TORCH, "owlvit"),
    "the head's layer may be named a prediction": (kinds, "PREDICTION", NOTHING, TORCH, "vit_mae"),
    "rows that are a width are no head's": (kinds.Model, "widths", set(), TORCH, "sam2_video"),
    "what is used entry by entry is no matrix": (kinds, "use", lambda *_: Use("product"), MLX, "mamba"),
    "what is multiplied is a matrix": (kinds, "use", lambda *_: Use("entries"), TORCH, "mixtral"),
    "an einsum shows the matrix": (kinds, "_product", lambda layer, *_: layer, TORCH, "xlnet"),
    "the code shows the parts": (kinds.Place, "splits", lambda *_: [], MLX, "granitemoehybrid"),
    "the code shows the order": (kinds.Place, "splits", lambda *_: [], MLX, "internlm2"),
    "experts have an order of their own": (by_module, "attribute", lambda *_: False, TORCH, "minimax"),
    "a query's halves are one": (splits, "ROTATED", NOTHING, TORCH, "persimmon"),
    "a projection by its name is one": (splits, "SINGLE", NOTHING, TORCH, "roformer"),
    "a gated unit is split": (splits, "GATED", set(), TORCH, "wav2vec2-conformer"),
    "a wrapped layer is split by the next module": (kinds.Model, "layers_in", Counter(), TORCH, "levit"),
    "a weight-normed convolution is one": (kinds, "PARAMETRIZED", NOTHING, TORCH, "wav2vec2"),
    "an array in a list belongs to the list's module": (kinds, "CONTAINERS", set(), TORCH, "reformer"),
    "a transposed convolution is one": (kinds, "CONVOLUTION", re.compile(r"Conv[123]d$"), TORCH, "sam"),
    "a grouped linear has a matrix a group": (kinds, "GROUPS", (), TORCH, "deepseek_v4"),
    "MLX's own depthwise convolutions": (kinds, "keywords", lambda _: set(), MLX, "recurrent_gemma"),
    "the code shows the parts of each layer in a list": (kinds, "LISTS", {"list"}, TORCH, "vits"),
    "rows that were added up are one": (splits, "SUMS", set(), TORCH, "wavlm"),
    "heads with names are heads as one of them is": (
        kinds,
        "bases",
        lambda m: bases(m) - {"ModuleDict"},
        TORCH,
        "lxmert",
    ),
    "the last layer need not be made last": (kinds.Model, "is_output", lambda *_: True, TORCH, "sam"),
    "the scores of an attention are no output": (kinds, "_in_attention", lambda *_: False, TORCH, "slanet"),
    "a width is no vocabulary": (kinds.Model, "widths", set(), TORCH, "lasr_ctc"),
    "a stack of heads is none of matrices": (kinds.Model, "vocabularies", set(), TORCH, "csm"),
    "a linear that is looked up is a table": (kinds, "_is_table", lambda *_: False, TORCH, "layoutlmv3"),
    "a head that is taken apart is a doubt": (kinds, "_is_split", lambda *_: False, TORCH, "neucodec"),
    "a head that puts out a width is a doubt": (kinds, "_may_end", lambda *_: False, TORCH, "pocket_tts"),
    "channels that no layer takes in are a doubt": (kinds, "_is_untaken", lambda *_: False, TORCH, "superpoint"),
    "a projection for each layer is a matrix a layer": (kinds, "PER_LAYER", NOTHING, MLX, "gemma3n"),
    "a width that is called fc is no head": (kinds, "UNSURE", NOTHING, TORCH, "xcodec"),
    "one number is an output, but a gate's": (kinds, "GATE", re.compile(""), TORCH, "d_fine"),
    "a block's last two layers may be a head's": (kinds, "BLOCK", NOTHING, TORCH, "timesfm2_5"),
    "few channels that are called last are a doubt": (kinds, "LAST", NOTHING, TORCH, "janus"),
    "a postnet's last layer is a doubt": (
        kinds,
        "HEAD_MODULE",
        re.compile(kinds.HEAD_MODULE.pattern.replace("|postnet", "")),
        TORCH,
        "fastspeech2_conformer",
    ),
    "a class of Transformers tells its head": (kinds.Model, "own_heads", set(), TORCH, "pi0"),
    "a gate's own function shows the parts": (splits, "GATING", NOTHING, MLX, "phi3small"),
    "rows that are made columns are vectors": (source, "_adds_a_column", lambda *_: False, MLX, "iquestloopcoder"),
    "a transposed convolution may be a head": (kinds, "IN_FIRST", NOTHING, TORCH, "pp_ocrv6_small_det"),
    "a cut that does not fit is a doubt": (splits, "SINGLE", re.compile(""), TORCH, "deepseek_v4"),
    "what was not understood is a doubt": (by_module, "FUSED", NOTHING, MLX, "muse_spark"),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    source.use.cache_clear()  # of what a rule's absence left there


@pytest.mark.parametrize("rule", RULES)
def test_without_the_rule_a_type_is_routed_differently(rule, monkeypatch):
    owner, name, other, zoo, type_name = RULES[rule]
    right = zoo_table.lines(zoo, type_name)
    monkeypatch.setattr(owner, name, other)
    source.use.cache_clear()
    assert zoo_table.lines.__wrapped__(zoo, type_name) != right


def test_classes_that_an_encoder_takes_in_again_are_a_heads():
    told = {line.split("  ")[0]: line for line in zoo_table.lines(TORCH, "granite_speech5_encoder")}
    assert "adamw  output head" in told["out.weight"] and "zeta  matrix" in told["out_mid.weight"]


SURE = ["llama", "qwen3", "gemma", "mistral", "gpt2", "phi3", "mixtral", "vit", "whisper", "t5"]


@pytest.mark.parametrize("name", SURE)
def test_nothing_is_in_doubt(name):
    assert not any(line.endswith("?") for line in zoo_table.lines(TORCH, name))


def own_module(source):
    """A torch module of a class whose text cannot be read, as one that was typed in has none."""
    torch = pytest.importorskip("torch")
    names = {"torch": torch, "nn": torch.nn, "__name__": "typed_in"}
    exec(source, names)
    return names["Own"]()


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8)])
def test_an_array_of_which_nothing_is_known_is_a_doubt(shape):
    made = f"super().__init__(); self.table = nn.Parameter(torch.ones{shape})"
    model = own_module(f"class Own(nn.Module):\n    def __init__(self): {made}")
    assert "does not say whether it is a matrix" in zeta.routes(model)["table"].doubt
