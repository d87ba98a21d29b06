#!/usr/bin/env python3
"""Trains a small language model with Zeta: one script for every backend. See --help."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from trainer import settings, text, tokens
from trainer.loop import FILE, Loop

import zeta
from zeta import checkpoint
from zeta.bench import model
from zeta.extras import need

# Whose ranks this is one of: torchrun's, mlx.launch's, or none's.
LAUNCHED = "torch" if "TORCHELASTIC_RUN_ID" in os.environ else "mlx" if "MLX_RANK" in os.environ else ""
VALIDATION = 1 << 15  # tokens that a validation looks at


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    given = vars(settings.parser().parse_args(arguments))
    try:
        return train(given)
    except KeyboardInterrupt:
        message, status = "stopped at once; a checkpoint that was there is as it was", 130
    except OSError as error:
        message, status = f"{error}: check that path and the room on its disk, or choose another --out", 2
    except (ValueError, ImportError) as error:
        message, status = str(error), 2
    except (MemoryError, RuntimeError) as error:  # torch and MLX distinguish it by the message alone
        if "alloc" in str(error):
            message = f"out of memory: choose a smaller --batch, --context or --size ({error})"
        elif LAUNCHED and re.search("gloo|NCCL|onnection|timed out", str(error)):
            message = f"another rank is gone: continue from the last checkpoint, if any, with --resume ({error})"
        else:
            raise
        status = 2
    print(f"train_lm: {' '.join(message.split())}", file=sys.stderr)
    return status


def train(given: dict[str, Any]) -> int:
    out = choose_folder(given)
    arrays, saved = checkpoint.load(out / FILE) if "resume" in given else (None, None)
    s = settings.merge(given, saved)
    if LAUNCHED and s["backend"] not in ("auto", LAUNCHED):
        raise ValueError(f"this is a rank of {LAUNCHED}, not of --backend {s['backend']}: leave --backend out")
    library = zeta.backend(LAUNCHED or s["backend"]).__name__.rpartition(".")[2]
    need("loss.png", "matplotlib")
    if s["tokenizer"] or s["vocab"]:
        need("a vocabulary", "tokenizers")
    source = text.load(s["data"] and Path(s["data"]))
    if saved or "out" in given or LAUNCHED:  # ranks must choose alike
        out.mkdir(parents=True, exist_ok=True)
        return train_in(out, source, library, arrays, saved, s)
    out = claim(out)
    try:
        return train_in(out, source, library, arrays, saved, s)
    finally:
        with suppress(OSError):
            out.rmdir()  # if the run came to nothing


def train_in(out: Path, source: Any, library: str, arrays: Any, saved: dict[str, Any] | None, s: dict[str, Any]) -> int:
    """Trains in this folder, which is there."""
    words = tokens.choose(out, s["tokenizer"] and Path(s["tokenizer"]), s["vocab"], source.train, resume=bool(saved))
    config = model.Config(**{name: s[name] for name in settings.SHAPE} | {"vocab": words.size})
    trainer = make_trainer(library, config, s)
    parts = [words.encode(part) for part in source]
    check_text(parts, s, saved)
    if s["inspect"] and trainer.ranks > 1:
        raise ValueError("--inspect is for one process: give --inspect 0, and run zeta inspect on the checkpoint")
    if s["batch"] % trainer.ranks:
        raise ValueError(f"--batch {s['batch']} cannot be divided among {trainer.ranks} ranks: choose a multiple")
    if arrays:
        restore(trainer, arrays, config)

    show = print if trainer.rank == 0 else lambda *_: None
    if s["step"] == s["steps"]:
        show(f"step {s['step']} of {s['steps']} was reached before: give more --steps to continue")
    if s["warmup"] > s["steps"]:
        show(f"the warm-up of {s['warmup']} steps is longer than the run of {s['steps']}: no step has --lr {s['lr']}")
    show(f"{sum(a.size for a in model.init(config, 0).values()):,} parameters, {s['optimizer']} on {library}, in {out}")
    s["tokens_per_byte"] = len(parts[1]) / len(source.validation)
    validation = text.windows(parts[1], max(1, VALIDATION // config.context), config.context + 1)
    finished = Loop(trainer, s, out, parts[0], validation).run()
    if trainer.rank == 0:
        from plot import draw  # matplotlib takes a second to import

        draw({s["optimizer"]: out}, out / "loss.png")
    if not finished:
        show(f"saved at step {s['step']} of {s['steps']}: continue with --resume --out {out}")
        return 130
    if trainer.rank == 0 or "fsdp" in s:
        show(sample(trainer, words, config, s))
    return 0


def choose_folder(given: dict[str, Any]) -> Path:
    """--out; without it the one after the last of runs/1, runs/2, ..., or with --resume the last itself.

    Raises ValueError rather than train over another run's checkpoint.
    """
    folders = (file.parent.name for file in Path("runs").glob(f"*/{FILE}"))
    last, resume = max((int(name) for name in folders if name.isdecimal()), default=0), "resume" in given
    out: Path = given.get("out", Path(f"runs/{max(last, 1) if resume else last + 1}"))
    there = (out / FILE).exists()
    if resume and not there:
        raise ValueError(f"there is no {out / FILE} to continue from: leave --resume out to start anew")
    if there and not resume:
        raise ValueError(f"{out / FILE} is there already: continue from it with --resume, or choose another --out")
    return out


def claim(out: Path) -> Path:
    """Makes this numbered folder, or the first after it that no other run has made."""
    while True:
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:
            out = out.with_name(str(int(out.name) + 1))


def make_trainer(library: str, config: model.Config, s: dict[str, Any]) -> Any:
    names = {name: s[name] for name in ("optimizer", "weight_decay", "betas", "dtype", "device")}
    if library == "mlx":
        from trainer.on_mlx import Trainer

        if "fsdp" in s:
            raise ValueError("MLX shares no model out: leave --fsdp out, or choose --backend torch")
    else:
        from trainer.on_torch import Trainer  # type: ignore[assignment]

        names["fsdp"] = "fsdp" in s
    return Trainer(config, model.init(config, s["seed"]), **names)


def check_text(parts: list[np.ndarray], s: dict[str, Any], saved: dict[str, Any] | None) -> None:
    """Puts the text's checksum into the settings. Raises ValueError where it is too short, or not the checkpoint's."""
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) <= s["context"]:
            raise ValueError(
                f"the {name} text has {len(part)} tokens, but --context {s['context']} takes {s['context'] + 1}: "
                "give more text (one part in twenty is for validation) or a smaller --context"
            )
    s["text"] = [crc32(part.tobytes()) for part in parts]
    if saved and s["text"] != saved["text"]:
        raise ValueError("the text is not what the checkpoint was trained on: give the same --data, or another --out")


def restore(trainer: Any, arrays: checkpoint.Arrays, config: model.Config) -> None:
    """Puts the checkpoint's arrays in place. Raises ValueError where they do not fit the model."""
    for name, shape in model.shapes(config).items():
        got = arrays[name].shape if name in arrays else "missing"
        if got != shape:
            raise ValueError(f"the checkpoint's {name} is {got}, but the model's {shape}: choose another --out")
    trainer.load(arrays)


def sample(trainer: Any, words: Any, config: model.Config, s: dict[str, Any], temperature: float = 0.8) -> str:
    """The prompt and s["sample"] tokens drawn after it, from the same random numbers on every backend."""
    rng = np.random.default_rng(s["seed"])
    drawn = [int(i) for i in words.encode(s["prompt"].encode())]
    for _ in range(s["sample"]):
        seen = drawn[-config.context :]
        padded = np.zeros((1, config.context), np.int32)  # one shape, so one compilation; what follows is not looked at
        padded[0, : len(seen)] = seen
        scores = trainer.logits(padded)[0, len(seen) - 1].astype(float) / temperature
        drawn.append(int(np.argmax(scores + rng.gumbel(size=len(scores)))))  # a draw from softmax(scores)
    return words.decode(drawn)  # type: ignore[no-any-return]


if __name__ == "__main__":
    status = main()
    if LAUNCHED == "torch":
        from trainer.on_torch import leave

        leave(status)
    sys.exit(status)
