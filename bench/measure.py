"""What every benchmark does alike: interleaved medians, peak memory, one table, JSON, a picture."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

SLOW = 2.0  # seconds; a peer whose turn takes longer is timed on one matrix, once


def medians(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each contender: the median of `rounds` turns, taken in turn after one warm-up each."""
    times: dict[str, list[float]] = {name: [timed(run)[0]] for name, run in contenders.items()}
    quick = [name for name in contenders if times[name][0] < 5 * SLOW]
    for name in quick:
        times[name] = []
    for _ in range(rounds):
        for name in quick:
            times[name].append(timed(contenders[name])[0])
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it gave."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def torch_peak(run: Callable[[], Any], device: str) -> int:
    """Most bytes that `run` held beyond what was there before."""
    import torch

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--device", default=None, help="torch: cpu, cuda or mps (default: cuda if there, else cpu)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios to the peers")
    return parser


def show(title: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace, note: str = "") -> None:
    """Prints the rows as one table, or as JSON; each row is {column: value}."""
    if options.json:
        print(json.dumps({"title": title, "machine": machine(options), "rows": list(rows)}, indent=1))
        return
    table = Table(*rows[0], title=title, caption=f"{machine(options)}\n{note}".strip(), caption_justify="left")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.1 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def machine(options: argparse.Namespace) -> str:
    """The device and the versions that a row was measured with."""
    if options.backend == "mlx":
        import mlx.core as mx

        return f"mlx {version('mlx')} on {mx.default_device()}, {platform.machine()}"
    import torch

    if options.device == "cuda":
        return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {options.device}: {kind}"


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
