"""`zeta mlx-lm lora`: mlx-lm's own command, with the optimizers of this library and a resume that loses nothing.

mlx-lm does all that it did before. While it runs, ours stand in the place of what it calls by name (`SEAMS`): the
parser takes more names of optimizers, the optimizer is made when the model has its LoRA layers, and the trainer reads
its batches and writes its files through `lm_checkpoint`.
"""

import inspect
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx_lm import __version__, lora
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import build_schedule

import zeta
from zeta.backends import mlx as backend

from .lm_checkpoint import Batches, Refused, Saved, check_model, check_run, load, restore, save

COMMAND = "zeta mlx-lm lora"
KNOWN = "0.31.1 to 0.32.2"
SEAMS = (  # where mlx-lm looks a name up that is ours while it runs, or does what ours relies on
    (lora, "main", "build_parser()"),
    (lora, "main", "run("),
    (lora, "train_model", "print_trainable_parameters(model)\n"),
    (lora, "train_model", "args.optimizer.lower()"),
    (lora, "train_model", "    train(\n"),
    (trainer, "train", "range(1, args.iters + 1)"),
    (trainer, "train", "iterate_batches("),
    (trainer, "train", "mx.save_safetensors(str("),
)
THEIRS = ("adam", "adamw", "muon", "sgd", "adafactor")
OURS = {name.lower(): getattr(backend, name) for name in backend.__all__ if name[0].isupper() and name != "Muon"}


def main(arguments: list[str]) -> int:
    """0, or 2 where something cannot be done as asked, said in one line."""
    try:
        check_seams()
        ours = {"build_parser": partial(build_parser, lora.build_parser), "run": partial(run, lora.run)}
        with put(sys, argv=[COMMAND, *arguments]), put(lora, **ours):
            lora.main()
    except Refused as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


def check_seams() -> None:
    """Raises Refused for an mlx-lm that does not call by name what ours takes the place of."""
    for module, function, text in SEAMS:
        if text not in inspect.getsource(getattr(module, function, check_seams)):
            raise Refused(
                f"mlx-lm {__version__} has no {text.strip()!r} in {module.__name__}.{function}, which this command "
                f"needs; known are {KNOWN}: pip install 'mlx-lm==0.32.2', or a newer zeta"
            )


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


def build_parser(original: Callable[[], ArgumentParser]) -> ArgumentParser:
    """mlx-lm's parser, which takes and explains the names of our optimizers, too."""
    parser = original()
    parser.description = (
        "All of mlx_lm.lora's flags and YAML. Added: --optimizer takes "
        f"{', '.join(OURS)}; beside every file of weights stands its optimizer's state, and --resume-adapter-file "
        "takes up both, with the place in the data and in the schedule, so that --iters is that of the whole run."
    )
    choice = next(action for action in parser._actions if action.dest == "optimizer")
    choice.choices, choice.metavar = None, "NAME"  # a name may stand in the YAML file instead: `run` checks both
    choice.help = f"mlx-lm's own {', '.join(THEIRS)}; or {', '.join(OURS)}. Options: optimizer_config in the YAML file."
    return parser


def run(original: Callable[..., None], args: Any) -> None:
    """mlx-lm's run, once all is checked that can be before the model is read."""
    if not args.train:
        return original(args)
    name = str(args.optimizer).lower()
    if name not in (*THEIRS, *OURS):
        raise Refused(f"the optimizer is {args.optimizer!r}, but must be one of {', '.join((*THEIRS, *OURS))}")
    if name in OURS:
        make(args)
        args.optimizer = Name(name)
    saved = load(args.resume_adapter_file) if args.resume_adapter_file else None
    args.resume_adapter_file = None  # its weights are in `saved`, which may be newer by the last kill
    tuning = Tuning(args, saved)
    check_run(tuning.facts, args.iters, saved)
    with put(
        lora, print_trainable_parameters=partial(tuning.begin, lora.print_trainable_parameters), train=tuning.train
    ):
        return original(args)


class Name(str):
    """An optimizer's name, which mlx-lm prints and saves; its own chain of names takes it for Adam's."""

    def lower(self) -> str:
        return "adam"


def make(args: Any, model: Any = None) -> Optimizer:
    """The optimizer of this name with its `optimizer_config`, for the parameters that the model has now."""
    name = str(args.optimizer).lower()
    config = dict((args.optimizer_config or {}).get(name) or {})
    overrides = config.pop("overrides", None)
    rate = build_schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate
    try:
        routes = zeta.routes(model, overrides) if model else None
        made: Optimizer = OURS[name](rate, routes=routes, **config)
    except (TypeError, ValueError) as error:
        raise Refused(f"optimizer_config of {name}: {error}") from error
    return made


class Tuning:
    """One run of mlx-lm's `train_model`: what it needs to begin, and what stands in for its trainer."""

    def __init__(self, args: Any, saved: Saved | None) -> None:
        self.args, self.saved = args, saved
        self.optimizer: Optimizer | None = None
        structure = None if args.fine_tune_type == "full" else args.lora_parameters
        self.facts = {
            "optimizer": str(args.optimizer).lower(),
            "fine_tune_type": args.fine_tune_type,
            "num_layers": args.num_layers,
            "lora_parameters": structure,
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
    """Below each of mlx-lm's lines, the learning rate; both reach the callback that mlx-lm was given."""

    def __init__(self, optimizer: Optimizer, following: Any) -> None:
        self.optimizer, self.following = optimizer, following

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        if mx.distributed.init().rank() == 0:
            print(f"          rate {train_info['learning_rate']:.3e}", flush=True)
        if self.following:
            self.following.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        if self.following:
            self.following.on_val_loss_report(val_info)
