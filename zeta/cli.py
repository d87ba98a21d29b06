"""The console command `zeta`: one function for each subcommand. Exit status 1 means failure, 2 wrong usage."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zeta.extras import Missing, need

if TYPE_CHECKING:
    from rich.table import Table

    from zeta.parity.checks import Result


FIRST = """zeta parity                      is this machine right? Compares every library with float64, 20 seconds
zeta bench                       is it fast here? Beside the library's own Muon and AdamW, two minutes
zeta routing package.module:f    which parameters of the model that f makes go where
zeta --help                      all commands"""


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="zeta", description="Zeta, a matrix optimizer: check, measure and use it on this machine.")
    parser.add_argument("--version", action="version", version=f"zeta {version('zeta-optim')}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    commands = parser.add_subparsers(metavar="COMMAND")  # type: ignore[assignment]
    _add_parity(commands)
    _add_bench(commands)
    _add_routing(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_mlx_lm(commands)
    args = parser.parse_args(argv)
    if "run" not in args:
        print(FIRST)
        return 0
    try:
        return int(args.run(args, args.command))
    except Missing as error:
        print(f"{args.command.prog}: {error}", file=sys.stderr)
        return 2


def _add_parity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Compare every library and device of this machine with float64, in seconds."
    command = commands.add_parser("parity", help=about, description=about)
    command.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw every error against its bound")
    command.add_argument("--verbose", action="store_true", help="a line for every check, and how many took each path")
    names = ("coefficient", "transpose", "axis", "bias", "restart", "blocks", "parts", "batch", "rule")
    command.add_argument("--control", choices=names, help="make one deliberate mistake: the command must then fail")
    devices = ("numpy:cpu", "array_api_strict:cpu", "torch:cpu", "torch:cuda", "torch:mps", "mlx:cpu", "mlx:gpu")
    command.add_argument(
        "--without",
        action="append",
        choices=devices,
        default=[],
        metavar="LIBRARY:DEVICE",
        help="leave out what is known to be absent, such as mlx:gpu (may be given several times); "
        "what else is absent is still named",
    )
    command.set_defaults(run=parity, command=command)


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Measure this device in two minutes: time, error and memory beside the library's own Muon and AdamW."
    command = commands.add_parser("bench", help=about, description=about)
    command.add_argument("--json", action="store_true", help="print one object instead of tables")
    command.add_argument(
        "--backend", choices=("torch", "mlx"), help="the library (default: MLX on an Apple machine, else torch)"
    )
    command.add_argument("--device", choices=("cpu", "cuda", "mps", "gpu"), help="torch: cpu, cuda, mps; MLX: cpu, gpu")
    command.set_defaults(run=bench, command=command)


def _add_routing(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Print which of a model's parameters go to Zeta, as which matrices, and which to AdamW."
    command = commands.add_parser("routing", help=about, description=about)
    command.add_argument("model", metavar="MODEL", help="package.module:function, a config.json or its folder")
    command.add_argument("--all", action="store_true", help="a line for every parameter, not one for layers alike")
    command.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    command.add_argument(
        "--library",
        choices=("torch", "mlx"),
        help="whose model of a config: Transformers' (the default if torch is installed) or mlx-lm's",
    )
    command.add_argument("--per-head", action="store_true", help="every head of query, key and value by itself")
    command.set_defaults(run=routing, command=command)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Show what whitening does to a run's own matrices: scale, spectrum, error of Newton-Schulz."
    command = commands.add_parser("inspect", help=about, description=about)
    command.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, an inspect.jsonl, or a run's folder")
    command.add_argument("--json", action="store_true", help="print a list of objects instead of tables")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw spectra, or of several steps heat maps")
    command.add_argument(
        "--lr", type=float, metavar="X", help="rate of the step that is shown (default: the run's peak)"
    )
    command.set_defaults(run=inspect, command=command)


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Make one portable checkpoint of a folder that save_sharded wrote, for any library and number of ranks."
    command = commands.add_parser("convert", help=about, description=about)
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.add_argument("file", type=Path, metavar="FILE.safetensors")
    command.set_defaults(run=convert, command=command)


def _add_mlx_lm(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Fine-tune as mlx_lm.lora does, with zeta's optimizers and a resume that loses nothing."
    command = commands.add_parser("mlx-lm", help=about, description=about)
    command.add_argument("which", choices=["lora"], help="mlx-lm's command: the others need nothing of zeta")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see zeta mlx-lm lora --help")
    command.set_defaults(run=mlx_lm, command=command)


def mlx_lm(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0; 2 where something cannot be done as asked."""
    need("fine-tuning", "mlx", "mlx-lm")
    try:
        from zeta.backends.mlx.lm import main as lora
    except ImportError as error:
        raise Missing(f"this mlx-lm is not as expected: {error}: pip install 'mlx-lm==0.32.2'") from error
    return lora(args.arguments)


def convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0; 2 where FOLDER is no such checkpoint or FILE cannot be written."""
    need("reading what save_sharded wrote", "torch")
    from zeta.backends.torch.sharded import convert as make_one

    try:
        make_one(args.folder, args.file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.file}: {args.file.stat().st_size:,} bytes")
    return 0


def bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0; 2 where the library or the device is not there."""
    import zeta

    library = args.backend or zeta.backend().__name__.rpartition(".")[2]
    need("zeta bench", library)
    from zeta.bench.report import measure, tell

    try:
        report = measure(library, args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        from rich.console import Console

        tell(report, Console(width=None if sys.stdout.isatty() else 140))
    return 0


def inspect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0; 2 where there is nothing at PATH that can be shown."""
    _check_plot(args, parser)
    from zeta.whitening.report import find_records, show

    try:
        records = find_records(args.path, args.lr)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(records, indent=1))
    else:
        show(records)
    if args.plot:
        from zeta.whitening.plot import draw

        draw(records, args.plot)
    return 0


def _check_plot(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.plot:
        need("--plot", "matplotlib")
    if args.plot and not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: there is no folder {args.plot.parent}: make it first")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: {args.plot.suffix!r} is no kind of picture here: .png, .svg or .pdf")


def routing(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0, or 1 where something about the model was ambiguous."""
    import warnings

    from zeta.routing import report
    from zeta.routing.by_module import read, routes
    from zeta.routing.model import find_model
    from zeta.storage import totals

    try:
        model = find_model(args.model, args.library)
    except ValueError as error:
        parser.error(str(error))
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        chosen = routes(model, per_head=args.per_head)
    arrays = read(model)[0]
    rows = report.rows(arrays.items(), chosen, collapse=not args.all)
    if args.json:
        print(json.dumps(report.objects(rows), indent=1))
    else:
        _print_routes(report.table(rows), report.footer(arrays, chosen), _state(totals(arrays, chosen)))
    name = type(model).__name__  # mlx-lm's is Model, whose head may be the embedding itself
    if name.endswith("Model") and name != "Model" and not any(r.reason == "output head" for r in chosen.values()):
        print(f"note: {name} has no output head: its config names no other class", file=sys.stderr)
    mine = [doubt for doubt in doubts if "overrides" in str(doubt.message)]
    for doubt in mine:
        print(f"ambiguous: {doubt.message}", file=sys.stderr)
    return 1 if mine else 0


def _state(totals: dict[str, int]) -> str:
    most = max(totals.values())
    unit, size = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6) if most >= 1e6 else ("kB", 1e3)
    return "State: " + ", ".join(f"{name} {count / size:,.2f} {unit}" for name, count in totals.items())


def _print_routes(table: "Table", *footer: str) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("\n".join(footer), highlight=False)


def parity(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0 if every library and device that is here agrees with the oracle, else 1."""
    _check_plot(args, parser)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for small matrices more threads are slower
    from zeta.parity.checks import run
    from zeta.parity.mistakes import CONTROLS
    from zeta.parity.targets import Absent, targets

    results: list[Result] = []
    broke = args.control is None
    for target in targets():
        if f"{target.library}:{target.device}" in args.without:
            continue
        if isinstance(target, Absent):
            if not target.expected:
                print(f"skipped: {target.library} {target.device} ({target.reason})", file=sys.stderr)
            results += run(target)
            continue
        if target.note:
            print(f"note: {target.name}: {target.note}", file=sys.stderr)
        checked = CONTROLS[args.control](target) if args.control else target
        broke |= checked is not target
        results += run(checked)
    if not broke:
        parser.error(f"--control {args.control}: nothing that is here has the path that it breaks")

    if args.json:
        print(json.dumps([_as_dict(result) for result in results], indent=1))
    else:
        _print_table(results, args.verbose)
        if args.verbose:
            _print_paths(results)
    if args.plot:
        from zeta.parity.plot import draw_parity

        draw_parity(results, args.plot)
    return 0 if results and all(result.ok for result in results) else 1


def _as_dict(result: "Result") -> dict[str, object]:
    error = result.error if isfinite(result.error) else None  # JSON has no infinity
    values = result._asdict() | {"error": error}
    return values | {"ok": result.ok, "paths": values.pop("paths")}


def _print_table(results: "list[Result]", verbose: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("backend", "device", "dtype", "check", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("error", "bound", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for _, alike in groupby(results, lambda result: result[:3]):
        rows = [(r, r.check) for r in alike]
        for i, (r, check) in enumerate(rows if verbose else _families(r for r, _ in rows)):
            labels = r[:3] if i == 0 else ("", "", "")
            verdict = "[green]ok" if r.ok else "[bold red]FAIL"
            table.add_row(*labels, check, f"{r.error:.1e}", f"{r.bound:.1e}", verdict, end_section=i + 1 == len(rows))
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    failed = sum(not result.ok for result in results)
    console.print(
        f"{len(results)} checks, [bold red]{failed} failed" if failed else f"{len(results)} checks, all within bounds"
    )


def _print_paths(results: "list[Result]") -> None:
    """How many checks went through each path: of Newton-Schulz + of the optimizers' steps."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from zeta.parity.paths import PATHS

    table = Table("backend", "device", "dtype", box=box.SIMPLE_HEAD, pad_edge=False)
    for path in PATHS:
        table.add_column(path, justify="right", no_wrap=True)
    for labels, alike in groupby(results, lambda result: result[:3]):
        checks = list(alike)
        table.add_row(*labels, *(_count([r for r in checks if path in r.paths]) for path in PATHS))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print("Checks through each path, of Newton-Schulz + of ten steps (bench/README.md lists the paths):")
    console.print(table)


def _count(checks: "list[Result]") -> str:
    """Blank for a path that a target does not have; one that it has and no check took is in its failed check."""
    taken = [r for r in checks if r.family != "paths"]
    steps = sum("step" in r.family for r in taken)
    return f"{len(taken) - steps}+{steps}" if taken else "[bold red]0" if checks else ""


def _families(results: "Iterable[Result]") -> "list[tuple[Result, str]]":
    """The worst result of each family, with a label that says how many there are."""
    families = [list(alike) for _, alike in groupby(results, lambda result: result.family)]
    rows = []
    for family in families:
        worst = max(family, key=lambda r: (not r.ok, r.error / r.bound if r.bound else r.error))
        count = f"{len(family)} x " if len(family) > 1 else ""
        bad = sum(not r.ok for r in family)
        rows.append((worst, f"{count}{worst.check}" + (f" ({bad} failed)" if bad > 1 else "")))
    return rows
