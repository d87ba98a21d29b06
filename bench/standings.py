"""What `convergence.py` shows of its runs: means, intervals, differences seed by seed; as Markdown and as a picture."""

from collections import Counter
from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from contenders import CONTENDERS

matplotlib.use("agg")
from matplotlib.figure import Figure
from scipy.stats import t as student

from zeta.palette import INK, OPTIMIZERS

Runs = dict[str, list[dict[str, Any]]]  # optimizer -> its runs on the fresh seeds, in the seeds' order
TITLES = {
    name: f"language model, {parameters} million parameters"
    for name, parameters in (("lm_100k", 0.11), ("lm_300k", 0.32), ("lm_600k", 0.58), ("lm_10m", 9.9))
}
TITLES |= {"lm": "language model", "moe": "mixture of experts", "vit": "vision transformer on digits"}
HEAD = "| {} | state | lr, AdamW's lr, weight decay, b1, b2 | loss | less {}, paired | steps to AdamW's | ms a step |"


def table(task: str, runs: Runs, against: str) -> str:
    """Markdown: a row for each optimizer, the lowest loss first."""
    lines = [HEAD.format(TITLES[task], CONTENDERS[against][0]), "|---" * 7 + "|"]
    for name in ranked(runs):
        own, adamw = runs[name], runs.get("adamw", [])
        r, n = own[0], len(own)
        setting = ", ".join(f"{r[key]:g}" for key in ("lr", "adamw_lr", "weight_decay", "b1", "b2"))
        loss = show(*interval(losses(own))) + ("" if n == 5 else f" ({n} seed{'s' * (n > 1)})")
        paired = "" if name == against else less(own, runs.get(against, []))
        steps = steps_to(own, adamw) if name != "adamw" else ""
        cpu = [run for run in own if "gpu" not in run]
        ms = [f"{mean(run[key] for run in cpu):.0f}" for key in ("step_ms", "optimizer_ms")] if cpu else []
        cost = f"{ms[0]} ({ms[1]})" if ms else ""
        cells = [CONTENDERS[name][0], f"{r['state']:.2f}", setting, loss, paired, steps, cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def less(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The mean difference with its interval, and whether that holds zero; nothing where no seed is shared."""
    shared = differences(runs, others)
    middle, half = interval(shared) if shared else (inf, inf)
    return show(middle, half, "+") + ", no difference found" * (abs(middle) <= half < inf) if shared else ""


def looks(lines: list[dict[str, Any]], searched: int) -> str:
    """How often the held-out splits of a task were looked at: `searched` is the seed of a search's runs."""
    search, fresh = ([line for line in lines if (line["seed"] == searched) == own] for own in (True, False))
    each = Counter(line["optimizer"] for line in search)
    runs = ", ".join(f"{CONTENDERS[name][0]} {n}" for name, n in each.most_common())
    search_looks = sum(len(line["curve"]) for line in search)
    claims = sum("claims" in line for line in fresh)
    return (
        f"Runs of searches: {len(search)} ({runs}), which looked at the search's split {search_looks} times. "
        f"Fresh runs: {len(fresh)}, for their curves {sum(len(line['curve']) for line in fresh)} times. "
        f"Looks at the split for claims: {claims}."
    )


def show(middle: float, half: float, sign: str = "") -> str:
    return f"{middle:{sign}.4f} ± {half:.4f}".replace(" ± inf", "") if middle < inf else "diverged"


def ranked(runs: Runs) -> list[str]:
    return sorted(runs, key=lambda name: interval(losses(runs[name]))[0])


def losses(runs: list[dict[str, Any]]) -> list[float]:
    """The held-out loss at the end of each run, on the split for claims where there is one; inf where it diverged."""
    ends = [run.get("claims", run["final"]) for run in runs]
    return [inf if loss is None else loss for loss in ends]


def differences(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Loss less the other's on every seed that both have: what first weights and batches have in common cancels."""
    other = dict(zip((run["seed"] for run in others), losses(others), strict=True))
    pairs = [(loss, other[run["seed"]]) for run, loss in zip(runs, losses(runs), strict=True) if run["seed"] in other]
    return [a - b if max(a, b) < inf else inf for a, b in pairs]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t): inf, inf where a value is."""
    if not all(value < inf for value in values):
        return inf, inf
    n = len(values)
    return mean(values), float(student.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else inf


def steps_to(runs: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> str:
    """The mean step at which a run reaches AdamW's final loss on its seed, where it has one; else how many reach it."""
    ends = {run["seed"]: inf if run["final"] is None else run["final"] for run in adamw}
    steps = [reached(run["curve"], ends[run["seed"]]) for run in runs if run["seed"] in ends]
    there = [step for step in steps if step < inf]
    if there and len(there) == len(steps):
        return f"{mean(there):.0f}"
    return f"{len(there)} of {len(steps)}" if steps else ""


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
    """A panel for each task, the first at the left of all others: every seed's loss, the mean with its interval."""
    first, *others = (task for task in TITLES if task in tasks)
    rows = max(len(tasks[first]), sum(len(tasks[task]) + 4 for task in others) - 4)  # four for an axis and a title
    figure = Figure(figsize=(11, 1.6 + 0.25 * rows), layout="constrained")
    ratios = [len(tasks[task]) for task in others or [first]]
    grid = [[first, task] for task in others] or [[first]]
    for task, axes in figure.subplot_mosaic(grid, height_ratios=ratios).items():
        draw_task(axes, tasks[task])
        axes.set_title(TITLES[task], loc="left", size=12, weight="bold")
        axes.set_xlabel("held-out loss, nats")
    dot, bar = (axes.errorbar([], [], xerr=size, color=INK, **style) for size, style in ((None, DOT), ([], BAR)))
    arrow = axes.plot([], [], ls="", marker="$→$", ms=10, color=INK)[0]
    labels = ("one seed", "mean, 95 % interval (Student's t)", "mean beyond the axis")
    figure.legend((dot, bar, arrow), labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=130)


DOT: dict[str, Any] = {"fmt": "o", "alpha": 0.35, "ms": 5, "mew": 0}
BAR: dict[str, Any] = {"fmt": "|", "ms": 10, "lw": 1.8, "capsize": 3}


def draw_task(axes: Any, runs: Runs) -> None:
    """A row for each optimizer, the lowest mean on top; those far off as numbers."""
    names, near = ranked(runs), close(runs)
    for y, name in enumerate(names):
        final, colour = losses(runs[name]), OPTIMIZERS.get(name, INK)
        middle, half = interval(final)
        if name in near:
            axes.errorbar(final, [y] * len(final), color=colour, **DOT)
            axes.errorbar(middle, y, xerr=half if half < inf else None, color=colour, **BAR)
        else:
            far = f"{middle:.2f} →" if middle < inf else "diverged"
            axes.text(0.99, y, far, transform=axes.get_yaxis_transform(), ha="right", va="center", color=colour)
    axes.set_yticks(range(len(names)), [CONTENDERS[name][0] for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=INK, weight="bold" if name in ("eta", "zeta") else "normal")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def close(runs: Runs) -> list[str]:
    """The optimizers that a picture has room for: a quarter, far off, would press all others together."""
    means = {name: interval(losses(runs[name]))[0] for name in ranked(runs)}
    finite = [m for m in means.values() if m < inf]
    room = 1.5 * (finite[3 * len(finite) // 4] - finite[0]) if finite else 0.0
    return [name for name, m in means.items() if m < inf and m - finite[0] <= room]
