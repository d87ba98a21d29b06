"""`zeta mlx-lm lora`: mlx-lm's own command, with the optimizers of this library and a resume that loses nothing.

mlx-lm does all that it did before. While it runs, ours stand in the place of what it calls by name (`SEAMS`): the
parser takes more names of optimizers, the optimizer is made when the model has its LoRA layers, and the trainer reads
its batches and writes its files through `lm_checkpoint`.
"""

import inspect
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm import __version__, lora
from mlx_lm.tuner import trainer

from .lm_checkpoint import Refused, check_run, load
from .lm_tuning import OURS, Name, Tuning, make, put

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
    saved = load(Path(args.resume_adapter_file)) if args.resume_adapter_file else None
    args.resume_adapter_file = None  # its weights are in `saved`, which may be newer by the last kill
    tuning = Tuning(args, saved)
    check_run(tuning.facts, args.iters, saved)
    with put(
        lora, print_trainable_parameters=partial(tuning.begin, lora.print_trainable_parameters), train=tuning.train
    ):
        return original(args)
