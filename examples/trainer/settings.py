"""The command line: flags, sizes, defaults, and how they meet the settings of a resumed run."""

import argparse
from pathlib import Path
from typing import Any

from zeta.family import eta

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=4, width=128, heads=4, kv_heads=2, context=256, batch=8, steps=500),
    "small": dict(layers=8, width=384, heads=6, kv_heads=2, context=512, batch=16, steps=3000),
    "124m": dict(layers=12, width=768, heads=12, kv_heads=6, context=1024, batch=32, steps=10000, vocab=50304),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "zeta": dict(lr=6e-3, betas=[0.95, 0.99]),
    "eta": dict(lr=eta.defaults.lr, betas=list(eta.defaults.betas)),
    "adamw": dict(lr=6e-3, betas=[0.9, 0.95]),
    "muon": dict(lr=8e-3, betas=[0.9, 0.99]),
}
DEFAULTS: dict[str, Any] = dict(
    data=None, tokenizer=None, vocab=None, tied=False, weight_decay=0.1, seed=0, backend="auto", device=None,
    dtype="float32", eval_every=50, inspect=0, sample=300, step=0, prompt="\ndef ",
)  # fmt: skip
SHAPE = ["layers", "width", "heads", "kv_heads", "context", "vocab", "tied"]
PLACE = ["out", "resume", "size", "backend", "device", "fsdp"]  # may differ after every resume, so are not kept


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Trains a small language model with Zeta, on MLX or torch. With no flags: two minutes on two CPU "
        "cores. Writes OUT/checkpoint.safetensors, metrics.jsonl and loss.png.",
        epilog="Ctrl-C saves and stops; the same command with --resume continues from there, with either library and "
        "on any number of ranks. Several ranks: torchrun --nproc-per-node N examples/train_lm.py ..., or mlx.launch "
        "-n N examples/train_lm.py ...; --batch is that of all ranks together.",
        argument_default=argparse.SUPPRESS,
    )
    text = p.add_argument_group("text")
    text.add_argument(
        "--data", type=Path, metavar="PATH", help="a text file or a folder of them (default: Python's standard library)"
    )
    text.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (default: bytes)")
    text.add_argument(
        "--vocab", type=int, metavar="N", help="train a tokenizer of N tokens, kept as OUT/tokenizer.json"
    )

    shape = p.add_argument_group("model", "--size gives all of these, single flags overrule it")
    shape.add_argument("--size", choices=SIZES, help="(default: tiny)")
    for name, what in [
        ("layers", ""),
        ("width", ""),
        ("heads", "query heads"),
        ("kv-heads", "key and value heads"),
        ("context", "tokens that a step looks back on"),
    ]:
        shape.add_argument(f"--{name}", type=int, metavar="N", help=what or None)
    shape.add_argument("--tied", action=argparse.BooleanOptionalAction, help="one matrix for embedding and head")

    run = p.add_argument_group("training")
    run.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="zeta, eta, or the library's own AdamW or Muon (default: zeta)"
    )
    run.add_argument("--steps", type=int, metavar="N")
    run.add_argument("--batch", type=int, metavar="N", help="sequences in a step")
    rates = ", ".join(f"{name} {o['lr']}" for name, o in OPTIMIZERS.items())
    run.add_argument("--lr", type=float, metavar="X", help=f"peak learning rate (default: {rates})")
    run.add_argument(
        "--betas", type=float, nargs=2, metavar="X", help="decay of the two moments (default: zeta 0.95 0.99)"
    )
    run.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0.1)")
    run.add_argument("--warmup", type=int, metavar="N", help="steps (default: one in a hundred, 10 at least)")
    run.add_argument("--seed", type=int, metavar="N", help="of the first weights and the batches (default: 0)")

    place = p.add_argument_group("where")
    place.add_argument("--backend", choices=["auto", "mlx", "torch"], help="auto: MLX on an Apple GPU, else torch")
    place.add_argument("--device", metavar="NAME", help="cpu, cuda, mps; for MLX gpu or cpu (default: the fastest)")
    place.add_argument("--fsdp", action="store_true", help="shard the model over torchrun's ranks (FSDP2)")
    place.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="of the products (default: float32)")
    place.add_argument(
        "--out", type=Path, metavar="OUT", help="folder of the run (default: the next of runs/1, runs/2, ...)"
    )
    place.add_argument(
        "--resume", action="store_true", help="continue from OUT's checkpoint (default OUT: the last of runs/)"
    )
    place.add_argument(
        "--eval-every", type=int, metavar="N", help="steps from one validation and checkpoint to the next (default: 50)"
    )
    place.add_argument(
        "--inspect",
        type=int,
        metavar="N",
        help="every N steps what whitening does, into OUT/inspect.jsonl: zeta inspect OUT",
    )
    place.add_argument("--sample", type=int, metavar="N", help="tokens of text to write at the end (default: 300)")
    place.add_argument("--prompt", metavar="TEXT", help="what that text continues from")
    return p


def merge(given: dict[str, Any], saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """All settings: a flag that was given, else what the checkpoint says, else the size's and the optimizer's own.

    Raises ValueError for a value out of range, and where a flag contradicts the checkpoint or another flag.
    """
    size = SIZES[given.get("size", "tiny")]
    if saved:
        check_saved(given, saved)
    if given.get("tokenizer") and given.get("vocab"):
        raise ValueError("--tokenizer has its own vocabulary, and --vocab trains another: leave one of them out")
    optimizer = OPTIMIZERS[(saved or given).get("optimizer", "zeta")]
    settings = DEFAULTS | dict(optimizer="zeta") | size | optimizer | (saved or {}) | given
    for name in ("data", "tokenizer"):  # as JSON can keep them, and whatever folder the run continues from
        settings[name] = settings[name] and str(Path(settings[name]).resolve())
    settings.setdefault("warmup", max(10, settings["steps"] // 100))
    for name in ("steps", "batch", "eval_every"):
        if settings[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {settings[name]}, but must be at least 1")
    for name in ("warmup", "seed", "sample", "inspect", "lr", "weight_decay"):
        if not 0 <= settings[name] < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {settings[name]}, but must be finite and at least 0")
    if settings["inspect"] and settings["optimizer"] in ("eta", "muon"):
        raise ValueError("--inspect needs second moments, which eta and muon do not keep: choose zeta or adamw")
    if not all(0 <= b < 1 for b in settings["betas"]):
        raise ValueError(f"--betas is {settings['betas']}, but both must be at least 0 and below 1")
    return settings


def check_saved(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ValueError where the checkpoint is not one that can continue with these flags."""
    wanted = (SIZES[given["size"]] if "size" in given else {}) | given
    kept = [*SHAPE, "optimizer", "dtype"]
    if missing := sorted({*kept, "step", "steps", "text"} - saved.keys()):
        raise ValueError(f"train_lm.py did not write this checkpoint, which lacks {missing}: choose another --out")
    for name in kept:
        if name in wanted and wanted[name] != saved[name]:
            flag = f"--{name.replace('_', '-')}" if name in given else "--size"
            raise ValueError(
                f"the checkpoint's {name} is {saved[name]}, not {wanted[name]}: leave {flag} out to continue with it, "
                "or choose another --out to start anew"
            )
    if given.get("steps", saved["step"]) < saved["step"]:
        raise ValueError(
            f"--steps is {given['steps']}, but the checkpoint is of step {saved['step']} already: give more, or leave "
            f"--steps out to continue to {saved['steps']}"
        )
