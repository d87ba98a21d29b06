"""A language model's folder as mlx-lm reads it, and the text to tune it on: letters for tokens, nothing downloaded."""

import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from small_models import MLX, mlx_model
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_model(folder: Path, bits: int = 0, columns: int = 32) -> Path:
    """The folder, of a Qwen3, quantised where `bits` are given."""
    folder.mkdir()
    mx.random.seed(0)
    model = mlx_model("qwen3")
    config = {"model_type": "qwen3", **MLX["qwen3"][1], "head_dim": 32, "intermediate_size": 32, "hidden_size": columns}
    model = type(model)(type(model.args).from_dict(config))
    if bits:
        config["quantization"] = {"group_size": 32, "bits": bits}
        nn.quantize(model, **config["quantization"])
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"<end>": 0} | {a: i for i, a in enumerate(LETTERS, 1)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def make_data(folder: Path) -> Path:
    """The folder, of train, valid and test.jsonl: five batches of four texts in the first."""
    folder.mkdir()
    rng = random.Random(0)
    for name, count in {"train": 21, "valid": 17, "test": 4}.items():
        texts = ("".join(rng.choices("abcde ", k=rng.randrange(8, 20))) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder
