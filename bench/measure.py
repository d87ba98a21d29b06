"""What every benchmark does alike: its arguments, one table, JSON, a picture."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from zeta.bench import measure, report


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--device", default=None, help="torch: cpu, cuda, mps; MLX: cpu, gpu (default: a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios to the peers")
    return parser


def show(title: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace, note: str = "") -> None:
    """Prints the rows as one table, or as JSON; each row is {column: value}."""
    machine = report.side_of(options.backend, options.device).machine()
    if options.json:
        print(json.dumps({"title": title, "machine": machine, "rows": list(rows)}, indent=1))
        return
    measure.show(title, rows, Console(width=None if sys.stdout.isatty() else 150))
    print(f"{report.machine(machine)}\n{note}".strip())


def plot(file: str, title: str, labels: Sequence[str], ratios: dict[str, list[float]]) -> None:
    """Bars of how many times faster than each peer, on a log scale with the line of equality."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(ratios)
    for k, (name, values) in enumerate(ratios.items()):
        bars = axes.bar([i + k * width for i in range(len(values))], values, width, label=name)
        axes.bar_label(bars, fmt="%.2g", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel="times faster", title=title)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, rotation=20)
    axes.legend()
    figure.savefig(file, dpi=150)
