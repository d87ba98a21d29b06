"""Trains a small Qwen3 with Zeta in mlx-lm's own trainer: all of its weights, or a LoRA pair beside each matrix.

    python examples/finetune_mlx_lm.py                     # about 15 seconds on two CPU cores
    python examples/finetune_mlx_lm.py --lora              # then adapts those weights to another text
    python examples/finetune_mlx_lm.py --resume            # goes on from the last checkpoint, also after a kill

The model comes from its arguments and reads bytes, so that nothing is downloaded; `mlx_lm.load(...)` takes its place.
What to know about mlx-lm and optimizers:

- The command `mlx_lm.lora` takes adam, adamw, muon, sgd or adafactor, and no other: call `train` as below.
- `train` holds on to the optimizer's state when it starts: load a saved state before, never in a callback.
- `train` saves weights only. Save `optimizer.state` as well, as `Checkpoints` below does, or a resumed run starts with
  empty moments and its schedule at the beginning: the schedule's place is the state's "step".
- After `linear_to_lora_layers`, make the optimizer anew: `zeta.routes(model)` reads the layers that are there then.
- `train` shuffles with NumPy's global random numbers, and a resumed run would see the first batches again: `batches`
  below is a function of the step alone.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import cosine_decay
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.qwen3 import Model, ModelArgs
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from trainer import text

import zeta
from zeta.backends.mlx import Zeta


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step that this call took."""
    args = parser().parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    model = small_qwen3()
    if args.lora:
        load(model, args.out / "full.safetensors", "run without --lora first, which trains them")
        model.freeze()
        linear_to_lora_layers(model, num_layers=2, config={"rank": 4, "scale": 8.0, "dropout": 0.0})
    optimizer = Zeta(cosine_decay(args.lr, args.steps), routes=zeta.routes(model))
    file = args.out / ("lora.safetensors" if args.lora else "full.safetensors")
    if args.resume:
        optimizer.state = load(model, file, "leave --resume out to start anew")

    return run(args, model, optimizer, Checkpoints(model, optimizer, file, args))


def run(args: argparse.Namespace, model: nn.Module, optimizer: Zeta, checkpoints: "Checkpoints") -> list[float]:
    if checkpoints.done > args.steps:
        raise ValueError(
            f"{checkpoints.file} is of step {checkpoints.done}: --steps {args.steps} must be at least that"
        )
    settings = TrainingArgs(
        args.batch, args.steps - checkpoints.done, steps_per_report=1, steps_per_save=args.steps + 1
    )
    settings.adapter_file = str(args.out / "weights.safetensors")  # which `train` writes at its end
    source = np.frombuffer(text.load().validation if args.lora else text.load().train, np.uint8)
    rest = partial(batches, checkpoints.done)
    train(model, optimizer, source, args=settings, iterate_batches=rest, training_callback=checkpoints)
    losses = checkpoints.losses
    if losses:
        print(f"the loss went from {np.mean(losses[:10]):.2f} to {np.mean(losses[-10:]):.2f} nats a byte")
    return losses


def small_qwen3() -> nn.Module:
    shape: dict[str, Any] = dict(model_type="qwen3", vocab_size=256, hidden_size=32, intermediate_size=64, head_dim=8)
    shape |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return Model(ModelArgs(**shape, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True))


def batches(
    done: int, dataset: np.ndarray, batch_size: int, max_seq_length: int, **_: Any
) -> Iterator[tuple[mx.array, mx.array]]:
    """From the step after `done` on: windows of bytes (batch, 33), and where in each the loss begins and ends."""
    ends = mx.array([[0, 33]] * batch_size)
    while True:
        yield mx.array(text.batch(dataset, done, batch_size, 33, seed=0)), ends
        done += 1


class Checkpoints(TrainingCallback):
    """Keeps the losses, and every so many steps writes what is trained and the optimizer's state to one file."""

    def __init__(self, model: nn.Module, optimizer: Zeta, file: Path, args: argparse.Namespace) -> None:
        self.model, self.optimizer, self.file = model, optimizer, file
        self.done, self.steps, self.every = int(optimizer.step), args.steps, args.save_every
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.losses.append(train_info["train_loss"])
        step = self.done + len(self.losses)
        if step % self.every == 0 or step == self.steps:
            self.save()

    def save(self) -> None:
        trained = {"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        part = self.file.with_name("part.safetensors")
        mx.save_safetensors(str(part), dict(tree_flatten(trained)))
        part.replace(self.file)  # so that the file is whole, whenever the run is killed


def load(model: nn.Module, file: Path, remedy: str) -> dict[str, Any]:
    """Puts the file's weights into the model and returns the optimizer's state. Raises ValueError without the file."""
    if not file.exists():
        raise ValueError(f"there is no {file}: {remedy}")
    saved = tree_unflatten(list(mx.load(str(file)).items()))
    model.update(saved["model"])
    return saved["optimizer"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lora", action="store_true", help="freeze the trained weights and adapt them by LoRA")
    p.add_argument("--steps", type=int, default=200, help="of the whole run, before and after a --resume (200)")
    p.add_argument("--batch", type=int, default=8, help="windows of 32 bytes a step (8)")
    p.add_argument("--lr", type=float, default=5e-3, help="the learning rate at the start (0.005)")
    p.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="steps between checkpoints (20)")
    p.add_argument("--out", type=Path, default=Path("runs/finetune_mlx_lm"), help="folder of the checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return p


if __name__ == "__main__":
    main()
