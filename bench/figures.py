"""The picture of the language models of three sizes: lead over Muon against size, loss against tokens and time."""

from math import inf
from pathlib import Path
from statistics import mean, median
from typing import Any

from contenders import CONTENDERS
from matplotlib.figure import Figure
from standings import TITLES, Runs, differences, interval

from zeta.palette import OPTIMIZERS, OTHERS

TICKS = (-0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05)
HIGH = 0.3  # nats above the lowest loss: what a panel of curves shows


def draw(tasks: dict[str, Runs], out: Path) -> None:
    """A column of curves for each size; below, all sizes' leads over Muon."""
    sizes = [task for task in TITLES if task in tasks]
    names = [name for name in CONTENDERS if any(name in tasks[task] for task in sizes)]
    rest = [name for name in names if name not in OPTIMIZERS]
    colours = OPTIMIZERS | dict(zip(rest, OTHERS * 3, strict=False))
    figure = Figure(figsize=(11, 11), layout="constrained")
    mosaic = [[f"{task} {x}" for task in sizes] for x in ("tokens", "seconds")] + [["lead"] * len(sizes)]
    axes = figure.subplot_mosaic(mosaic, height_ratios=(1, 1, 1.2))
    for task in sizes:
        for x in ("tokens", "seconds"):
            draw_curves(axes[f"{task} {x}"], tasks[task], x, colours)
        axes[f"{task} tokens"].set_title(TITLES[task].partition(", ")[2], loc="left", size=11, weight="bold")
    for x in ("tokens", "seconds"):
        axes[f"{sizes[0]} {x}"].set_ylabel("loss on the search's split, nats a byte")
    draw_lead(axes["lead"], {task: tasks[task] for task in sizes}, colours)
    handles = [axes["lead"].plot([], [], color=colours[name], label=CONTENDERS[name][0])[0] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=130)


def draw_curves(axes: Any, runs: Runs, x: str, colours: dict[str, str]) -> None:
    """The mean loss over an optimizer's seeds against tokens, or against a core's seconds (the median run's)."""
    for name, own in runs.items():
        whole = [run for run in own if run["final"] is not None]
        if not whole:
            continue
        tokens = whole[0]["tokens_per_parameter"] * whole[0]["parameters"] / 1e6
        seconds = [run["seconds"] for run in whole if "gpu" not in run]
        if x == "seconds" and not seconds:
            continue
        end = tokens if x == "tokens" else median(seconds)
        steps = [step for step, _ in whole[0]["curve"]]
        heights = [mean(values) for values in zip(*([y for _, y in run["curve"]] for run in whole), strict=True)]
        axes.plot([end * step / steps[-1] for step in steps], heights, color=colours[name], lw=1.3)
    lowest = min((line.get_ydata()[-1] for line in axes.lines), default=0.0)
    axes.set_ylim(lowest - 0.03, lowest + HIGH)
    axes.set_xlabel("million bytes" if x == "tokens" else "seconds of one core")
    tidy(axes)


def draw_lead(axes: Any, tasks: dict[str, Runs], colours: dict[str, str]) -> None:
    """Muon's loss less each optimizer's, seed by seed: every seed, the mean, its 95 % interval; above 0 is better."""
    names = [name for name in colours if name != "muon" and any({name, "muon"} <= set(runs) for runs in tasks.values())]
    shift = {name: 1.02 ** (i - len(names) / 2) for i, name in enumerate(names)}
    for name in names:
        points = []
        for runs in tasks.values():
            gaps = [gap for gap in differences(runs.get("muon", []), runs.get(name, [])) if abs(gap) < inf]
            if not gaps:
                continue
            x, (middle, half) = runs[name][0]["parameters"] * shift[name], interval(gaps)
            axes.plot([x] * len(gaps), gaps, "o", color=colours[name], alpha=0.35, ms=4, mew=0)
            axes.errorbar(x, middle, half if half < inf else None, color=colours[name], fmt="_", ms=9, capsize=3)
            points.append((x, middle))
        axes.plot(*zip(*points, strict=True), color=colours[name], lw=1) if points else None
    axes.axhline(0, color=colours["muon"], lw=1)
    axes.set(xscale="log", xlabel="parameters", ylabel="lead over Muon, nats a byte")
    axes.set_yscale("symlog", linthresh=0.02)
    low, high = axes.get_ylim()
    ticks = [y for y in TICKS if low <= y <= high]
    axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axes.set_title(
        "Lead over Muon: seeds, mean, 95 % interval of the paired difference (beyond 0.02 in logarithms)",
        loc="left",
        size=11,
    )
    sizes = [next(iter(runs.values()))[0]["parameters"] for runs in tasks.values()]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    axes.minorticks_off()
    tidy(axes)


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
