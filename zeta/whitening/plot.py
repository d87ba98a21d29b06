"""The records of `zeta inspect` as a picture: of one step spectra and dumbbells, of several heat maps over time."""

from math import log10
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from zeta.palette import AFTER, BEFORE, GRID, INK, SOFT
from zeta.whitening.measures import POINTS, Record
from zeta.whitening.report import MEASURES, last_step, short_names

SHOWN = {  # measure -> what its axis is
    "rows": "0 even, 1 one-sided",
    "condition": r"largest / smallest $\sigma$",
    "cosine": "of Newton-Schulz, to M's $UV^T$",
}
WORSE_LOW = {"cosine"}  # of all others the higher number is the worse one
M, X = "M, the momentum", r"X = M / ($\sqrt{V}$ + eps), whitened"


def draw(records: list[Record], file: Path) -> None:
    """Writes the picture; its format is the file's suffix."""
    steps = {record["step"] for record in records}
    figure = heat_maps(records) if len(steps) > 1 else state(last_step(records))
    figure.savefig(file, dpi=130)


def state(records: list[Record]) -> Figure:
    """Spectra before and after whitening, and a dumbbell for each matrix and measure."""
    prefix, names = short_names(records)
    figure = Figure(figsize=(11, max(4.0, 1.5 + 0.19 * len(records))), layout="constrained", facecolor="white")
    spectra, first, *others = figure.subplots(1, 1 + len(SHOWN), width_ratios=[1.5, *[1.0] * len(SHOWN)])
    _spectra(spectra, records)
    for axis, name in zip((first, *others), SHOWN, strict=True):
        _dumbbells(axis, records, name)
        axis.set_yticks(range(len(records)), names if axis is first else [], size=9)
    title = f"What whitening does to {prefix}*, step {records[0]['step']}"
    figure.suptitle(title, x=0.01, ha="left", size=14, weight="bold", color=INK)
    handles = [first.plot([], [], "o", color=colour)[0] for colour in (BEFORE, AFTER)]
    figure.legend(handles, (M, X), loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=11)
    return figure


def _spectra(axis: Any, records: list[Record]) -> None:
    """Singular values by rank, each matrix's over their root mean square; thick: the median matrix."""
    share = np.linspace(0, 1, POINTS)
    for side, colour in (("before", BEFORE), ("after", AFTER)):
        curves = np.array([record[side]["spectrum"] for record in records])
        axis.plot(share, curves.T, color=colour, linewidth=0.6, alpha=0.35)
        axis.plot(share, np.median(curves, axis=0), color=colour, linewidth=2.6)
    _frame(axis, r"singular values $\sigma$ / their RMS")
    axis.set(yscale="log", xlabel="rank, largest 0, smallest 1 (thick: median)")
    axis.grid(color=GRID)


def _dumbbells(axis: Any, records: list[Record], name: str) -> None:
    measure = MEASURES[name]
    before, after = (np.array([measure.value(record[side]) for record in records]) for side in ("before", "after"))
    y = np.arange(len(records))
    axis.hlines(y, before, after, color=SOFT, linewidth=1.4, zorder=1)
    axis.scatter(before, y, s=22, color=BEFORE, zorder=2)
    axis.scatter(after, y, s=22, color=AFTER, zorder=3)
    _frame(axis, measure.title)
    axis.set_xlabel(SHOWN[name], color=INK, size=9)
    axis.set_ylim(len(records) - 0.4, -0.6)
    if name == "condition":
        axis.set_xscale("log")
    elif name != "cosine":
        axis.set_xlim(left=0)
    axis.grid(axis="x", color=GRID)


def _frame(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", size=11, color=INK)
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(which="minor", length=0, labelsize=0)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)


def heat_maps(records: list[Record]) -> Figure:
    """Two maps for each measure, over steps and matrices: of M and of X, whitened, in one scale."""
    prefix, names = short_names(records)
    names, steps = list(dict.fromkeys(names)), sorted({record["step"] for record in records})
    size = (11, max(4.5, 2.2 + 0.19 * len(names)))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2 * len(SHOWN), sharex=True, sharey=True)
    for name, pair in zip(SHOWN, axes.reshape(-1, 2), strict=True):
        grids = [_grid(records, side, name, names, steps) for side in ("before", "after")]
        low, high = np.nanmin(grids), np.nanmax(grids)
        colours = "magma" if name in WORSE_LOW else "magma_r"
        for axis, grid, letter in zip(pair, grids, "MX", strict=True):
            image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            _frame(axis, f"{MEASURES[name].title}\nof {letter}" if letter == "M" else f"\nof {letter}")
        bar = figure.colorbar(image, ax=pair, location="bottom", aspect=30)
        bar.set_label(f"{MEASURES[name].title}:\n{SHOWN[name]}", color=INK)
        bar.outline.set_visible(False)
        if name == "condition":
            bar.set_ticks(ticks := list(range(int(np.ceil(low)), int(high) + 1)), labels=[f"1e{t}" for t in ticks])
    axes[0].set_yticks(range(len(names)), names, size=9)
    axes[0].set_xticks([0, len(steps) - 1], [steps[0], steps[-1]])
    axes[0].set_xlabel("step", color=INK)
    title = f"What whitening does to {prefix}*, steps {steps[0]} to {steps[-1]}"
    figure.suptitle(title, x=0.01, ha="left", size=14, weight="bold", color=INK)
    figure.supxlabel(f"{M}; {X}; dark is worse", size=11, color=INK)
    return figure


def _grid(records: list[Record], side: str, name: str, names: list[str], steps: list[int]) -> Any:
    """(matrices, steps) numbers, condition numbers as their logarithms; NaN where there is no record."""
    grid = np.full((len(names), len(steps)), np.nan)
    for short, record in zip(short_names(records)[1], records, strict=True):
        value = MEASURES[name].value(record[side])
        grid[names.index(short), steps.index(record["step"])] = log10(value) if name == "condition" else value
    return grid
