"""The parity suite as a picture: every error on a logarithmic axis, beside the bound it has to stay under."""

from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from zeta.palette import GRID, INK, OTHERS, SOFT, WRONG
from zeta.parity.checks import Result

PANELS = {  # title -> families of checks
    "Newton-Schulz": ("newton-schulz", "coefficients"),
    "ten optimizer steps": ("step",),
    "core, and invariances": ("core", "invariance"),
}
FLOOR, CEILING = 1e-17, 1e2  # errors of exactly zero are drawn on the left edge


def draw_parity(results: list[Result], file: Path) -> None:
    """Writes the picture; its format is the file's suffix."""
    lanes = {key: list(alike) for key, alike in groupby(results, lambda r: r[:3])}
    libraries = list(dict.fromkeys(key[0] for key in lanes))
    figure = Figure(figsize=(13, 1.9 + 0.36 * len(lanes)), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (title, families) in zip(axes, PANELS.items(), strict=True):
        _frame(axis, title, list(lanes))
        for y, (key, alike) in enumerate(lanes.items()):
            shown = [r for r in alike if r.check.split(":")[0] in families]
            _lane(axis, y, shown, OTHERS[libraries.index(key[0]) % len(OTHERS)])
    failed = sum(not r.ok for r in results)
    verdict = f"{failed} of {len(results)} checks fail" if failed else f"all {len(results)} checks hold"
    colour = WRONG if failed else INK
    figure.suptitle(f"Zeta parity: {verdict}", x=0.01, ha="left", size=15, weight="bold", color=colour)
    figure.supxlabel(
        "relative error against float64 (a dot is a check; the bar is its bound, or the tick on a line of its own)",
        size=10,
        color=INK,
    )
    figure.savefig(file, dpi=160)


def _frame(axis: Any, title: str, lanes: list[tuple[str, str, str]]) -> None:
    axis.set_title(title, loc="left", size=11, color=INK)
    axis.set_xscale("log")
    axis.set_xlim(FLOOR / 3, CEILING * 3)
    ticks = {FLOOR: "0", 1e-12: "1e-12", 1e-8: "1e-8", 1e-4: "1e-4", 1: "1"}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_yticks(range(len(lanes)), [f"{library}  {device}  {dtype}" for library, device, dtype in lanes])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.minorticks_off()
    axis.tick_params(length=0, colors=INK)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    for y in range(1, len(lanes)):
        if lanes[y][0] != lanes[y - 1][0]:
            axis.axhline(y - 0.5, color=SOFT, linewidth=0.8)


def _lane(axis: Any, y: int, results: list[Result], colour: str) -> None:
    """The errors of one library, device and dtype, spread a little in height, and the tightest of their bounds."""
    if not results:
        return
    tightest = min(r.bound for r in results)
    axis.barh(y, CEILING * 3, left=tightest, height=0.72, color=WRONG, alpha=0.06, linewidth=0)
    axis.plot([tightest, tightest], [y - 0.36, y + 0.36], color=INK, linewidth=1.6)
    for i, r in enumerate(results):
        at = min(max(r.error, FLOOR), CEILING) if r.error == r.error else CEILING
        height = y + 0.55 * ((i * 0.618034) % 1 - 0.5)
        if r.bound > tightest and at > tightest / 2:  # a looser bound, of its own
            axis.plot([at, r.bound], [height, height], color=INK, linewidth=0.5, alpha=0.6)
            axis.scatter([r.bound], [height], marker="|", s=18, color=INK, linewidth=0.9)
        style = dict(marker="o", s=14, alpha=0.65, linewidth=0) if r.ok else dict(marker="x", s=26, linewidth=1.4)
        axis.scatter([at], [height], color=colour if r.ok else WRONG, zorder=3, **style)
