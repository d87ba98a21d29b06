"""The trainers people use, driven by the examples: Zeta reaches them with its routes, a killed run resumes exactly."""

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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
    kill(example, 8, [*SHORT.split(), str(tmp_path / "killed")])
    shutil.copytree(tmp_path / "killed", tmp_path / "lost")

    with torch_steps() as taken:
        assert example.main([*SHORT.split(), str(tmp_path / "killed"), "--resume"]) == whole
    assert len(taken) == 12 - 5

    with pytest.raises(ValueError, match="is of step 12 already: --steps 6 must be at least that"):
        example.main([*SHORT.split(), str(tmp_path / "killed"), "--resume", "--steps", "6"])

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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 asks transformers 5.23
def test_transformers_trainer_makes_it_of_the_model_it_makes_itself(tmp_path: Path) -> None:
    """`model_init`, PEFT and gradient checkpointing, in a run that ends early and resumes."""
    need("transformers"), need("accelerate"), need("peft")
    import hugging_face

    whole, optimizer = hugging_face.train(tmp_path / "whole", 6)
    trained = [
        (name, route)
        for group in optimizer.param_groups
        for name, p, route in zip(group["param_names"], group["params"], group["routes"], strict=True)
        if p.requires_grad
    ]
    assert len(trained) == 8 and all("lora_" in name and route[2] == "LoRA pair" for name, route in trained)
    rates = [line["learning_rate"] for line in whole if "learning_rate" in line]
    assert rates[0] == hugging_face.RATE and rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * rates[0]

    hugging_face.train(tmp_path / "stopped", 6, stop_at=3)
    resumed, _ = hugging_face.train(tmp_path / "stopped", 6, resume=True)
    assert [line["loss"] for line in resumed if "loss" in line] == [line["loss"] for line in whole if "loss" in line]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # trl 1.16 sets it
def test_trl_resumes(tmp_path: Path) -> None:
    need("trl")
    import hugging_face

    whole = hugging_face.fine_tune(tmp_path / "whole")
    assert killed_runs.is_killed(hugging_face.fine_tune, tmp_path / "killed", True)
    assert len(whole) == 6 and hugging_face.fine_tune(tmp_path / "killed", resume=True) == whole


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_transformers_trainer_on_two_ranks(how: str, tmp_path: Path) -> None:
    """Trainer itself, killed and resumed."""
    need("transformers"), need("accelerate")
    import hugging_face
    import torch
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    killed_runs.context()
    # Whichever is seen first: a rank that was killed, or one that was waiting for it and lost the connection.
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match=r"SIGKILL|by peer"):
        start_processes(hugging_face.rank, (how, str(tmp_path), True), nprocs=2, start_method="forkserver")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-2"]
    start_processes(hugging_face.rank, (how, str(tmp_path)), nprocs=2, start_method="forkserver")
    alone, *ranks = [torch.load(tmp_path / f"{name}.pt") for name in ("alone", "0", "1")]
    for rank in ranks:
        for name, p in rank.items():
            moved = (alone[name] - hugging_face.start()[name]).norm()
            assert moved > 0 and (p - alone[name]).norm() <= 1e-3 * moved


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


def test_transformers_trainer_logs_reports(tmp_path: Path) -> None:
    need("transformers"), need("accelerate")
    import hugging_face

    trainer = hugging_face.trainer(tmp_path, logging_steps=2)
    from zeta.backends.torch.for_transformers import Reports

    trainer.add_callback(Reports(trainer))
    trainer.train()
    logged = [line for line in trainer.state.log_history if "zeta/ratio" in line]
    assert [line["step"] for line in logged] == [2, 4] and all(0 < line["zeta/ratio"] < 1 for line in logged)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader.")
def test_lightning_logs_reports(tmp_path: Path) -> None:
    example = load("lightning_vit", "lightning", "sklearn")
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from zeta.backends.torch.for_lightning import Reports

    class Plain(example.Classifier):
        def on_train_epoch_end(self) -> None:
            pass

    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", callbacks=[Reports()], logger=False, log_every_n_steps=2, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Plain(16, 1, 1e-2), DataLoader(TensorDataset(*example.digits()[0]), 64))
    assert 0 < trainer.callback_metrics["zeta/ratio"] < 1


def test_mlx_lm_logs_reports(tmp_path: Path) -> None:
    need("mlx_lm")
    from zeta.backends.mlx import for_mlx_lm

    lines: list[dict[str, float]] = []

    class Keep(for_mlx_lm.TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            lines.append(train_info)

    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as tune

    from zeta.backends.mlx import Zeta

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers, self.head = nn.Embedding(16, 8), [nn.Linear(8, 8)], nn.Linear(8, 16)

        def __call__(self, ids: Any, *_: Any, **__: Any) -> Any:
            return self.head(self.embed(ids) + self.layers[0](self.embed(ids)))

    class Data:
        def process(self, row: Any) -> Any:
            return row, 0

        def __getitem__(self, i: int) -> Any:
            return [(i + k) % 16 for k in range(9)]

        def __len__(self) -> int:
            return 8

    model, optimizer = Model(), Zeta(1e-2)
    mx.random.seed(0)
    arguments = TrainingArgs(
        batch_size=4, iters=4, steps_per_report=2, steps_per_eval=100, steps_per_save=100, val_batches=0,
        max_seq_length=16, adapter_file=str(tmp_path / "adapters.safetensors"),
    )  # fmt: skip
    data = CacheDataset(Data())
    tune(model, optimizer, data, args=arguments, training_callback=for_mlx_lm.Reports(optimizer, Keep()))
    assert [line["iteration"] for line in lines] == [2, 4]
    assert all(0 < line["zeta/ratio"] < 1 for line in lines)
