"""`zeta inspect` without its command line: where the records come from, and how a person reads them."""

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from zeta.whitening.measures import Record, inspect, read_series

if TYPE_CHECKING:
    from rich.table import Table

CHECKPOINT, SERIES = "checkpoint.safetensors", "inspect.jsonl"


class Measure(NamedTuple):
    """One number of a matrix, before or after whitening."""

    title: str
    value: Callable[[Record], float]  # of record["before"] or record["after"]
    form: str


MEASURES = {
    "rows": Measure("uneven rows", lambda view: view["rows"]["effect"], ".2f"),
    "cols": Measure("uneven columns", lambda view: view["cols"]["effect"], ".2f"),
    "blocks": Measure("uneven blocks", lambda view: view["blocks"]["effect"], ".2f"),
    "condition": Measure("condition number", lambda view: view["condition"], ",.0f"),
    "error": Measure("error to own polar", lambda view: view["error"], ".3f"),
    "left": Measure("left below 0.5", lambda view: view["left"], ".1%"),
    "cosine": Measure("cosine to polar(M)", lambda view: view["cosine"], ".3f"),
}
ARROW = " → "


def find_records(path: Path, lr: float | None = None) -> list[Record]:
    """The records of a checkpoint, of an inspect.jsonl, or of a run's folder, its inspect.jsonl if it has one.

    `lr` is the rate that a checkpoint's update is shown for; None is its run's peak. Raises OSError and ValueError for
    anything else.
    """
    if (path / "zeta.json").exists():
        raise ValueError(f"{path} is of save_sharded: make one file of it, zeta convert {path} FILE.safetensors")
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix == ".jsonl":
        if lr is not None:
            raise ValueError(f"{path} records steps as they were taken: leave --lr out, or give a checkpoint")
        records = read_series(path)
        if not records:
            raise ValueError(f"{path} holds no record yet: wait for the run's next inspection")
        return records
    from zeta import checkpoint

    arrays, settings = checkpoint.load(path)
    rate = settings.get("lr", 1e-3) if lr is None else lr
    records = list(inspect(arrays, lr=rate, step=settings.get("step", 0)))
    if not records:
        raise ValueError(f"{path} holds no matrix with momentum: every gradient was zero so far")
    return sorted(records, key=lambda record: _by_number(record["matrix"]))


def _in_folder(folder: Path) -> Path:
    """A run's inspect.jsonl or checkpoint.safetensors, or the only safetensors file, whatever its name."""
    for name in (SERIES, CHECKPOINT):
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ValueError(f"{folder} holds several checkpoints, such as {files[0].name}: name one")
    return files[0] if files else folder / CHECKPOINT


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def last_step(records: list[Record]) -> list[Record]:
    return [record for record in records if record["step"] == records[-1]["step"]]


def short_names(records: list[Record]) -> tuple[str, list[str]]:
    """What all the matrices' dotted names begin with, and the rest of each record's."""
    names = [record["matrix"] for record in records]
    parents = zip(*(name.split(".")[:-1] for name in names), strict=False)
    prefix = "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, parents))
    return prefix, [name.removeprefix(prefix) for name in names]


def table(records: list[Record]) -> "Table":
    """A row for each matrix: before whitening → after."""
    from rich import box
    from rich.table import Table

    prefix, names = short_names(records)
    table = Table(f"{prefix}*", "shape", box=box.SIMPLE_HEAD, pad_edge=False, title=f"step {records[0]['step']}")
    for measure in MEASURES.values():
        table.add_column(measure.title, justify="right")
    table.add_column("change a step", justify="right")
    for name, record in zip(names, records, strict=True):
        cells = [
            ARROW.join(format(m.value(record[side]), m.form) for side in ("before", "after")) for m in MEASURES.values()
        ]
        change = "" if record["change"] is None else f"{record['change']:.2%}"
        table.add_row(name, "x".join(map(str, record["shape"])), *cells, change)
    return table


def summary(records: list[Record]) -> "Table":
    """Medians over all matrices, and in how many of them whitening lowers the number."""
    from rich import box
    from rich.table import Table

    table = Table("median of all matrices", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("before", "after", "lower after"):
        table.add_column(title, justify="right")
    for name, measure in MEASURES.items():
        before, after = ([measure.value(record[side]) for record in records] for side in ("before", "after"))
        lower = sum(b > a for b, a in zip(before, after, strict=True))
        row = [format(median(side), measure.form) for side in (before, after)]
        table.add_row(measure.title, *row, f"{lower} of {len(records)}")
        if name in ("rows", "cols", "blocks"):
            uneven = [sum(record[side][name]["p"] < 0.05 for record in records) for side in ("before", "after")]
            table.add_row("  matrices with p < 0.05", *map(str, uneven), "")
    return table


def show(records: list[Record]) -> None:
    """Prints the last step's table and its summary."""
    import sys

    from rich.console import Console

    console: Any = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table(last_step(records)))
    console.print(summary(last_step(records)))
    console.print(
        "a → b: M, the momentum, before whitening → X = M / (sqrt(V) + eps), after. uneven: Cramer's V less chance, "
        "0 even, 1 one-sided.\nerror: of five Newton-Schulz steps. change a step: |update| / |weights|.",
        highlight=False,
    )
