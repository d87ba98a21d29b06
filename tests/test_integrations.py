"""The trainers people use, driven by the examples: Zeta reaches them with its routes, a killed run resumes exactly."""

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import killed_runs
import pytest
from conftest import need
from trainer import text

SHORT = "--steps 12 --batch 4 --save-every 5 --out"
VIT = "--epochs 3 --batch 64 --width 32 --depth 1 --lr 2e-2 --accelerator cpu --out"


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """The examples train on Python's own library, which takes half a second to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load", cache(text.load))
        yield


def load(example: str, *libraries: str) -> Any:
    """The example's module; a library that is not here is a skip."""
    for library in libraries:
        need(library)
    return importlib.import_module(example)


def kill(example: Any, step: int, arguments: list[str]) -> None:
    """Runs the example in a process of its own, which SIGKILL ends after this step."""
    assert killed_runs.is_killed(killed_runs.example, example.__name__, step, arguments)


def assert_falls(losses: list[float], by: float) -> None:
    assert min(losses[-3:]) < losses[0] - by, losses


def test_transformers_trainer_resumes(tmp_path: Path) -> None:
    example = load("finetune_hf", "transformers", "accelerate")
    whole = example.main([*SHORT.split(), str(tmp_path / "whole")])
    assert_falls(whole, 0.5)
    kill(example, 8, [*SHORT.split(), str(tmp_path / "optimizers")])
    for other in ("class", "lost"):
        shutil.copytree(tmp_path / "optimizers", tmp_path / other)

    for through in ("optimizers", "class"):
        with torch_steps() as taken:
            resumed = example.main([*SHORT.split(), str(tmp_path / through), "--through", through, "--resume"])
        assert resumed == whole
        assert len(taken) == 12 - 5

    with pytest.raises(ValueError, match="is of step 12 already: --steps 6 must be at least that"):
        example.main([*SHORT.split(), str(tmp_path / "optimizers"), "--resume", "--steps", "6"])

    (tmp_path / "lost/checkpoint-5/optimizer.pt").unlink()  # so that the comparison can fail
    lost = example.main([*SHORT.split(), str(tmp_path / "lost"), "--resume"])
    assert lost[:5] == whole[:5] and lost != whole


@contextmanager
def torch_steps() -> Iterator[list[int]]:
    """A list that grows by one with every step that a torch optimizer takes."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    yield taken
    handle.remove()


def test_transformers_trainer_takes_the_routes(tmp_path: Path) -> None:
    example = load("finetune_hf", "transformers", "accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    shape = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16, vocab_size=11)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    arguments = TrainingArguments(str(tmp_path), report_to=[])

    optimizer = Trainer(model, arguments, optimizer_cls_and_kwargs=(example.zeta_class, {"lr": 0.5})).create_optimizer()
    matrices, others = optimizer.param_groups
    assert matrices["lr"] == others["lr"] == 0.5
    assert all("proj" in name for name in matrices["param_names"])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(others["param_names"])
    with pytest.warns(UserWarning, match="no names"):
        Trainer(model, arguments, optimizer_cls_and_kwargs=(example.Zeta, {"lr": 0.5})).create_optimizer()


def test_accelerate_resumes(tmp_path: Path) -> None:
    example = load("finetune_hf", "transformers", "accelerate")
    flags = ["--through", "accelerate", *SHORT.split()]
    whole = example.main([*flags, str(tmp_path / "whole")])
    assert_falls(whole, 0.5)
    kill(example, 8, [*flags, str(tmp_path / "killed")])
    assert example.main([*flags, str(tmp_path / "killed"), "--resume"]) == whole[5:]
    with pytest.raises(ValueError, match="is of step 10 already: --steps 6 must be at least that"):
        example.main([*flags, str(tmp_path / "killed"), "--resume", "--steps", "6"])


# lightning 2.6.6: with torch 2.13, its advice about worker processes, and what it says of a folder to resume from
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_resumes(tmp_path: Path) -> None:
    example = load("lightning_vit", "lightning", "sklearn")
    whole, accuracy = example.main([*VIT.split(), str(tmp_path / "whole")])
    assert_falls(whole, 1.0)
    assert accuracy > 0.5
    epoch = len(whole) // 3
    kill(example, epoch + 5, [*VIT.split(), str(tmp_path / "killed")])
    assert example.main([*VIT.split(), str(tmp_path / "killed"), "--resume"]) == (whole[epoch:], accuracy)
    with pytest.raises(ValueError, match="has 3 epochs already: --epochs 2 must be at least that"):
        example.main([*VIT.split(), str(tmp_path / "killed"), "--resume", "--epochs", "2"])


@pytest.mark.parametrize("name", ["finetune_hf", "lightning_vit"])
def test_there_is_nothing_to_resume(name: str, tmp_path: Path) -> None:
    example = load(name, "lightning", "sklearn", "transformers", "accelerate")
    with pytest.raises(ValueError, match=r"[Cc]heckpoint|leave --resume out"):
        example.main(["--resume", "--out", str(tmp_path)])
