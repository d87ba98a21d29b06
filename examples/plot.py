"""Loss curves of runs in one picture: python examples/plot.py runs/1 runs/2 --out loss.png"""

import argparse
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib.figure import Figure

from zeta import checkpoint
from zeta.palette import INK, OPTIMIZERS, OTHERS


def draw(runs: dict[str, Path], out: Path) -> None:
    """Writes `out`: for each label -> run folder the training loss, smoothed, and the validation loss, as dots.

    A label's colour is that of the optimizer before its first "-"; a second run of one is dotted, to lie on the first.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    top, lines_of = 0.0, {label: checkpoint.read_lines(run / "metrics.jsonl") for label, run in runs.items()}
    end = max(line["step"] for lines in lines_of.values() for line in lines)
    rest, drawn = cycle(OTHERS), set[str]()
    for label in runs:
        colour = OPTIMIZERS.get(label.partition("-")[0]) or next(rest)
        style = {"color": INK, "ls": ":"} if colour in drawn else {"color": colour, "ls": "-"}
        drawn.add(colour)
        steps, losses = columns(lines_of[label], "loss")
        at, validation = columns(lines_of[label], "val_loss")
        axes.plot(steps, smooth(losses), lw=1, alpha=0.5, **style)
        until = f" at step {at[-1]:.0f}" if len(at) and steps[-1] < end else ""
        final = f"{label}: {validation[-1]:.3f}{until}" if len(at) else label
        axes.plot(at, validation, marker="o", ms=3.5, lw=1.6, label=final, **style)
        top = max(top, *validation[:1] if len(at) else smooth(losses)[len(losses) // 20 :][:1])
    axes.set(xlabel="step", ylabel=f"loss, nats per {unit(runs)}", title="validation (dots), training (thin, smoothed)")
    axes.set_ylim(top=top * 1.05 if top else None)  # the fall of the first steps would flatten the rest
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def unit(runs: dict[str, Path]) -> str:
    """What a loss is the mean over: a run keeps its vocabulary in tokenizer.json, one without has bytes for tokens."""
    return " or ".join(sorted({"token" if (run / "tokenizer.json").exists() else "byte" for run in runs.values()}))


def columns(lines: list[dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have this key."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    steps, values = np.array(points).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """(n,) running means that forget by `weight` a step, without a bias to the first value."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return np.array(smoothed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders that train_lm.py wrote; each is named in the legend"
    )
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    draw({run.name: run for run in args.runs}, args.out)
