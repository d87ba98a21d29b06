"""What `zeta mlx-lm lora` does in mlx-lm's `train_model`: makes the optimizer, takes a saved run up, saves it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import build_schedule

import zeta
from zeta.backends import mlx as backend

from .lm_checkpoint import Batches, Refused, Saved, check_model, check_run, restore, save

OURS = {name.lower(): kind for name, kind in vars(backend).items() if isinstance(kind, type) and name != "Muon"}


class Name(str):
    """An optimizer's name, which mlx-lm prints and saves; its own chain of names takes it for Adam's."""

    def lower(self) -> str:
        return "adam"


def make(args: Any, model: Any = None) -> Optimizer:
    """The optimizer of this name with its `optimizer_config`, for the parameters that the model has now."""
    name = str(args.optimizer).lower()
    what = "lr_schedule"
    try:
        rate = build_schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate
        what = f"optimizer_config of {name}"
        config = dict((args.optimizer_config or {}).get(name) or {})
        overrides = config.pop("overrides", None)
        routes = zeta.routes(model, overrides) if model is not None else None
        made: Optimizer = OURS[name](rate, routes=routes, **config)
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise Refused(f"{what}: {error}") from error
    return made


class Tuning:
    """One run of mlx-lm's `train_model`: what it needs to begin, and what stands in for its trainer."""

    def __init__(self, args: Any, saved: Saved | None) -> None:
        self.args, self.saved = args, saved
        self.optimizer: Optimizer | None = None
        self.facts = {
            "optimizer": str(args.optimizer).lower(),
            "fine_tune_type": args.fine_tune_type,
            "num_layers": args.num_layers,
            "lora_parameters": None if args.fine_tune_type == "full" else args.lora_parameters,
            "batch_size": args.batch_size,
            "grad_accumulation_steps": args.grad_accumulation_steps,
        }

    def begin(self, original: Callable[[Any], None], model: Any) -> None:
        """Where mlx-lm counts the parameters to train: the layers are in, and nothing has been written yet."""
        if isinstance(self.args.optimizer, Name):
            self.optimizer = make(self.args, model)
        if self.saved:
            check_model(self.saved, model)
            if self.optimizer:
                restore(self.saved, model, self.optimizer)
            say(f"Resuming after iteration {self.saved.place.iteration}, from {self.saved.file}")
        original(model)

    def train(
        self,
        model: Any,
        optimizer: Optimizer,
        args: Any,
        train_dataset: Any,
        training_callback: Any = None,
        **rest: Any,
    ) -> None:
        """mlx-lm's `train` from the saved iteration on."""
        if self.optimizer:
            optimizer = self.optimizer
        elif self.saved:
            restore(self.saved, model, optimizer)
        facts = self.facts | {"examples": len(train_dataset)}
        check_run(facts, args.iters, self.saved)
        batches = Batches(args.grad_accumulation_steps, self.saved.place if self.saved else None)
        files = partial(save, mx.save_safetensors, optimizer, batches, facts)
        with put(trainer, range=batches.iterations), put(mx, save_safetensors=files):
            trainer.train(
                model=model,
                optimizer=optimizer,
                args=args,
                train_dataset=train_dataset,
                iterate_batches=batches,
                training_callback=Lines(optimizer, training_callback),
                **rest,
            )


class Lines:
    """Below each of mlx-lm's lines, the learning rate and what the last step did; both reach mlx-lm's own callback."""

    def __init__(self, optimizer: Optimizer, following: Any) -> None:
        self.following = following
        self.report = getattr(optimizer, "report", None)  # mlx-lm's own optimizers have none
        if self.report:
            self.report()  # which starts the measuring

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        summary = self.report().summary() if self.report else {}
        done = [
            f"{key.removeprefix('zeta/')} {summary[key]:.2e}" for key in ("zeta/update_rms", "zeta/ratio") if summary
        ]
        say(", ".join([f"          rate {train_info['learning_rate']:.3e}", *done]))
        if self.following:
            self.following.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        if self.following:
            self.following.on_val_loss_report(val_info)


@contextmanager
def put(module: ModuleType, **names: Any) -> Iterator[None]:
    """These in the place of the module's own of these names, which are back when the block ends."""
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(names)
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)


def say(line: str) -> None:
    if mx.distributed.init().rank() == 0:
        print(line, flush=True)
