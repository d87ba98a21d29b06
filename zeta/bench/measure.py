"""How every benchmark measures and shows: interleaved medians, and tables of rows {column: value}."""

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Contenders = dict[str, Callable[[], Any]]
SLOW = 10.0  # seconds; what takes longer is timed once


class Step(NamedTuple):
    """A step of an optimizer that has parameters of its own."""

    run: Callable[[], None]
    state: Callable[[], int]  # bytes of its state, after a step

    def __call__(self) -> None:
        self.run()


def medians(contenders: Contenders, rounds: int, seconds: float = inf) -> dict[str, float]:
    """Seconds of each contender: the median of `rounds` turns after one warm-up each; who follows whom is drawn anew in
    each round, for what a contender leaves in caches and free memory is the next one's.

    Once so many `seconds` are over since then, no other round begins.
    """
    for run in contenders.values():
        run()
    start = time.perf_counter()
    times: dict[str, list[float]] = {name: [timed(run)] for name, run in contenders.items()}
    quick = [name for name, (took,) in times.items() if took < SLOW]
    order = random.Random(0)
    for _ in range(rounds - 1):
        if time.perf_counter() - start < seconds:
            for name in order.sample(quick, len(quick)):
                times[name].append(timed(contenders[name]))
    return {name: statistics.median(turns) for name, turns in times.items()}


def timed(run: Callable[[], Any]) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(text, row.values()))
    console.print(title, highlight=False, style="bold")
    console.print(table)


def text(value: Any) -> str:
    if value is None:
        return "not measured"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.1e}"


def cpu() -> str:
    """The processor's name; on a Mac the chip's, GPU included."""
    if platform.system() == "Darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
