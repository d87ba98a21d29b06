"""What `convergence.py` shows of its runs: means, intervals, differences seed by seed; as Markdown and as a picture."""

from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from contenders import CONTENDERS

matplotlib.use("agg")
from matplotlib.figure import Figure

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # n: t at 97.5 %
Runs = dict[str, list[dict[str, Any]]]  # optimizer -> its runs on the fresh seeds, in the seeds' order
TITLES = {"lm": "language model", "vit": "vision transformer on digits", "moe": "mixture of experts"}
COLOURS = {"eta": "#d1602a", "zeta": "#0b6fb8"}
HEAD = "| {} | state | lr, b1, b2 | held-out loss | less {}, seed by seed | steps to AdamW's | ms a step |"


def table(task: str, runs: Runs, against: str) -> str:
    """Markdown: a row for each optimizer, the lowest loss first."""
    lines = [HEAD.format(TITLES[task], CONTENDERS[against][0]), "|---" * 7 + "|"]
    for name in ranked(runs):
        own, adamw, other = runs[name], runs.get("adamw", []), runs.get(against, [])
        r, n = own[0], len(own)
        setting = f"{r['lr']:g}, {r['b1']:g}, {r['b2']:g}"
        loss = show(*interval(losses(own))) + ("" if n == 5 else f" ({n} seeds)")
        paired = show(*interval(differences(own, other[:n])), sign="+") if name != against and len(other) >= n else ""
        steps = f"{steps_to(own, adamw):.0f}" if name != "adamw" and len(adamw) >= n else ""
        cost = f"{mean(run['step_ms'] for run in own):.0f} ({mean(run['optimizer_ms'] for run in own):.0f})"
        cells = [CONTENDERS[name][0], f"{r['state']:.2f}", setting, loss, paired, steps.replace("inf", "never"), cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(middle: float, half: float, sign: str = "") -> str:
    return f"{middle:{sign}.4f} ± {half:.4f}" if middle < inf else "diverged"


def ranked(runs: Runs) -> list[str]:
    return sorted(runs, key=lambda name: interval(losses(runs[name]))[0])


def losses(runs: list[dict[str, Any]]) -> list[float]:
    """The held-out loss at the end of each run; inf where it diverged."""
    return [inf if run["final"] is None else run["final"] for run in runs]


def differences(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Loss less the other's on the same seed: what first weights and batches have in common cancels."""
    if [run["seed"] for run in runs] != [run["seed"] for run in others]:
        raise ValueError("the runs are of different seeds: pair those of the same")
    return [a - b if a < inf else inf for a, b in zip(losses(runs), losses(others), strict=True)]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t): inf, inf where a value is."""
    if not all(value < inf for value in values):
        return inf, inf
    n = len(values)
    return mean(values), STUDENT[n] * stdev(values) / sqrt(n) if n > 1 else inf


def steps_to(runs: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> float:
    """The mean step at which a run reaches AdamW's final loss on its seed; inf if one never does."""
    return mean(reached(run["curve"], loss) for run, loss in zip(runs, losses(adamw), strict=False))


def reached(curve: list[list[Any]], loss: float) -> float:
    """The step at which the held-out loss is first this low, by a straight line between two looks; inf if never."""
    before = (0, inf)
    for step, value in curve:
        if value is not None and value <= loss:
            last, height = before
            return step if height == inf else last + (step - last) * (height - loss) / (height - value)
        before = (step, inf if value is None else value)
    return inf


def draw(tasks: dict[str, Runs], out: Path) -> None:
    """A panel for each task: every seed's loss as a dot, the mean with its interval, the lowest on top."""
    figure = Figure(figsize=(13, 1.6 + 0.27 * max(map(len, tasks.values()))), layout="constrained")
    for axes, (task, runs) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        names, near = ranked(runs), close(runs)
        for y, name in enumerate(names):
            found, colour = losses(runs[name]), COLOURS.get(name, "#4a4a5a")
            middle, half = interval(found)
            if name in near:
                axes.plot(found, [y] * len(found), "o", color=colour, alpha=0.35, ms=4, mew=0)
                bar = half if half < inf else None
                axes.errorbar(middle, y, xerr=bar, fmt="|", color=colour, ms=10, lw=1.8, capsize=3)
            else:
                axes.text(0.99, y, f"{middle:.2f} →", transform=axes.get_yaxis_transform(), ha="right", va="center")
        axes.set_yticks(range(len(names)), [CONTENDERS[name][0] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(TITLES[task], loc="left", size=11)
        axes.set_xlabel("held-out loss, nats")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def close(runs: Runs) -> list[str]:
    """The optimizers that a picture has room for: one far off would press all others together."""
    means = {name: interval(losses(runs[name]))[0] for name in ranked(runs)}
    finite = [m for m in means.values() if m < inf]
    return [
        name for name, m in means.items() if m < inf and m - finite[0] <= 3 * (finite[len(finite) // 2] - finite[0])
    ]
