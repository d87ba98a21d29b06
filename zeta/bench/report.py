"""What `zeta bench` says: one object of all that it measured, the tables, and a line to paste into an issue."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from math import prod
from typing import Any

from rich.console import Console

from zeta.bench import tables
from zeta.bench.measure import Row, show
from zeta.bench.tables import Side, sizes

Report = dict[str, Any]
ROUNDS = 7
SECONDS = 20.0  # after which a table begins no other round


def measure(library: str, device: str | None) -> Report:
    """All of it, on a device of this library. Raises ValueError for a device that is not there."""
    side = side_of(library, device)
    report: Report = {"zeta": version("zeta-optim"), "machine": side.machine()}
    report |= {key: {"title": title, "rows": rows} for key, title, rows in measured(side) if rows}
    return report | {"line": line(report)}


def measured(side: Side) -> Iterator[tuple[str, str, list[Row]]]:
    """(key, title, rows) of every table."""
    own, names = sizes(side), ["Zeta", f"{side.muon} + AdamW", "AdamW"]
    peer, limits = {side.muon: side.peers()[side.muon]}, (ROUNDS, SECONDS / len(own.matrices))
    rows = [tables.newton_schulz(side, shape, peer, *limits) for shape in own.matrices]
    yield "newton_schulz", "Newton-Schulz, five jordan steps of float32 matrices", rows
    (layers, width, vocab), lm = own.gpt, own.lm
    title = f"One step of a GPT: {layers} layers, width {width}, vocabulary {vocab}, float32"
    contenders = {name: side.step(name, tables.gpt(*own.gpt)) for name in names}
    yield "step", title, tables.step(side, contenders, ROUNDS, SECONDS)
    del contenders  # a GPU's memory, too
    title = (
        f"Training step of a language model: {lm.layers} layers, width {lm.width}, {own.batch} x {lm.context} tokens"
    )
    yield "training_step", title, tables.training_step(side, lm, own.batch, names, ROUNDS, SECONDS)
    yield (
        "symmetric_products",
        "x times its transpose, half precision",
        tables.symmetric_products(side, ROUNDS, SECONDS),
    )


def side_of(library: str, device: str | None = None) -> Side:
    """What is measured with this library. Raises ValueError for a device that is not there."""
    if library == "mlx":
        from zeta.bench.on_mlx import Mlx

        return Mlx(device)
    from zeta.bench.on_torch import Torch

    return Torch(device)


def line(report: Report) -> str:
    """All of it in one line."""
    ns, step, training = (report[key]["rows"] for key in ("newton_schulz", "step", "training_step"))
    peer = step[1]["optimizer"].partition(" + ")[0]
    ratios = [row[f"x {peer}"] for row in ns]
    errors = [row["error"] / row[f"{peer}'s error"] for row in ns]
    shares = ", ".join(f"{row['optimizer']} {row['share']:.0%}" for row in training)
    memory = ", ".join("?" if row["transient MiB"] is None else f"{row['transient MiB']:.0f}" for row in step)
    return (
        f"zeta {report['zeta']}, {machine(report['machine'])}: Newton-Schulz x{mean(ratios):.2f} {peer}'s speed "
        f"({min(ratios):.2f} to {max(ratios):.2f}) at x{mean(errors):.2g} its error; step x{step[1]['x Zeta']:.2f}; "
        f"transient MiB {memory}; share of a training step: {shares}"
    )


def gate_of(report: Report) -> Any:
    """The line for this GPU in the table of gates."""
    from zeta.backends.torch.kernel_gate import Gate

    source = f"zeta bench {report['zeta']}, {report['machine']['library']}"
    return Gate(report["machine"]["name"], tables.gate(report["symmetric_products"]["rows"]), source)


def machine(parts: dict[str, Any]) -> str:
    """In words."""
    count = parts.get("threads", 0)
    threads = f", {count} thread{'s' * (count > 1)}" if count else ""
    return f"{parts['library']} on {parts['device']} ({parts['name']}, {parts['system']}{threads}, {parts['products']})"


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return float(prod(values) ** (1 / len(values)))


def tell(report: Report, console: Console) -> None:
    console.print(f"zeta {report['zeta']}, {machine(report['machine'])}\n", highlight=False)
    for part in (value for value in report.values() if isinstance(value, dict) and "rows" in value):
        show(part["title"], part["rows"], console)
    if "symmetric_products" in report:
        print(f"GATES of zeta.backends.torch.kernel_gate should have\n{gate_of(report)}\n")
    console.print(
        "x: that optimizer's time over zeta's, medians of interleaved turns. Errors: against float64. Transient: the "
        "most that a step holds beyond parameters, gradients and state.\n\nTo report this device, paste this line and "
        "the output of zeta bench --json into an issue:",
        highlight=False,
    )
    print(report["line"])
