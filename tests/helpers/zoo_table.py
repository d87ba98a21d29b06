"""What a zoo's routes are, in lines that can be compared: what all types have alike stands there once."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zeta
from zeta.routing.by_module import read
from zeta.routing.kinds import place

TABLES = Path(__file__).parents[1] / "zoo"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def lines(model: Any) -> dict[str, int]:
    """How many parameters of a model each line stands for: the end of the name, axes, treatment, cut; vectors apart."""
    arrays, modules = read(model)
    counts: dict[str, int] = {}
    for name, r in zeta.routes(model).items():
        if len(arrays[name].shape) > 1:
            line = f"{short(name, modules)}  {len(arrays[name].shape)}  {r.treatment}  {told(r, arrays[name].shape)}"
            counts[line] = counts.get(line, 0) + 1
        else:
            assert r.treatment == "adamw", name
    return counts


def short(name: str, modules: dict[str, Any]) -> str:
    """The array's name, its layer's and its block's; numbers are starred."""
    at = place(name, modules)
    parts = NUMBER.sub("*", at.path).split(".")[-2:]
    return ".".join([*parts, at.leaf]) + ("" if name.endswith(at.leaf) else "'")


def told(r: zeta.Route, shape: tuple[int, ...]) -> str:
    """The reason and the form of the cut, without its sizes."""
    if r.treatment == "adamw":
        return r.reason + "  ?" * bool(r.doubt)
    count = "1" if r.matrices[0] == 1 else "each" if r.matrices[0] == shape[0] else "several"
    parts = f" of {len(r.parts)} {'columns' if r.axis == -1 else 'rows'}" if r.parts else ""
    return f"{r.reason}  {count}{parts}" + "  ?" * bool(r.doubt)


def table(types: Iterable[str], build: Callable[[str], Any]) -> tuple[str, dict[str, list[str]]]:
    """A zoo's text, and the lines of every type. A line ends with the number of its types, or their names if few."""
    by_type: dict[str, list[str]] = {}
    missing: list[str] = []
    doubtful = parameters = 0
    for name in types:
        try:
            model = build(name)
        except (Exception, SystemExit) as error:
            missing.append(f"{name}: {reason(error)}")
            continue
        counts = lines(model)
        by_type[name] = [*counts]
        parameters += len(read(model)[0])
        doubtful += sum(n for line, n in counts.items() if line.endswith("  ?"))
    owners: dict[str, list[str]] = {}
    for name, own in by_type.items():
        for line in own:
            owners.setdefault(line, []).append(name)
    head = f"{len(by_type)} types, {parameters} parameters, {doubtful} of them doubtful"
    body = [f"{line}  | {', '.join(o) if len(o) < 3 else len(o)}" for line, o in sorted(owners.items())]
    return "\n".join([head, *body, "", "Not built:", *missing, ""]), by_type


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    library = re.search(r"requires the (\w+) library", text)
    return f"needs {library.group(1)}" if library else f"{type(error).__name__}: {text[:90]}"
