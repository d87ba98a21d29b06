"""What a zoo's routes are, in lines that can be compared: what all types have alike stands there once."""

import re
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import zeta
from zeta.routing.by_module import read
from zeta.routing.kinds import place

TABLES = Path(__file__).parents[1] / "zoo"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@cache
def lines(zoo: Any, name: str) -> dict[str, int]:
    """How many parameters of a type each line stands for: the end of the name, axes, treatment, cut; "" for vectors."""
    model = zoo.build(name)
    arrays, modules = read(model)
    counts = {"": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts, which the lines say
        routes = zeta.routes(model)
    for name, r in routes.items():
        shape = arrays[name].shape
        line = f"{short(name, modules)}  {len(shape)}  {r.treatment}  {told(r, shape)}" if len(shape) > 1 else ""
        counts[line] = counts.get(line, 0) + 1
        assert line or r.treatment == "adamw", name
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


def table(zoo: Any, types: Iterable[str]) -> str:
    """A zoo's text. A line ends with the number of the types that have it, or their names if few."""
    owners: dict[str, list[str]] = {}
    missing: list[str] = []
    doubtful = parameters = built = 0
    for name in types:
        try:
            counts = lines(zoo, name)
        except (Exception, SystemExit) as error:
            missing.append(f"{name}: {reason(error)}")
            continue
        built += 1
        parameters += sum(counts.values())
        doubtful += sum(n for line, n in counts.items() if line.endswith("  ?"))
        for line in counts.keys() - {""}:
            owners.setdefault(line, []).append(name)
    head = f"{built} types, {parameters} parameters, {doubtful} of them doubtful"
    body = [f"{line}  | {', '.join(o) if len(o) < 3 else len(o)}" for line, o in sorted(owners.items())]
    return "\n".join([head, *body, "", "Not built:", *missing, ""])


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    library = re.search(r"requires the (\w+) library", text)
    return f"needs {library.group(1)}" if library else f"{type(error).__name__}: {text[:90]}"


def write(names: list[str]) -> None:
    """Writes the tables of these names anew."""
    import zoo_mlx
    import zoo_transformers

    zoos: dict[str, Any] = {
        "mlx": (zoo_mlx, zoo_mlx.types),
        "transformers": (zoo_transformers, zoo_transformers.some_types),
        "transformers_all": (zoo_transformers, zoo_transformers.types),
    }
    for name in names:
        zoo, types = zoos[name]
        text = table(zoo, types())
        (TABLES / f"{name}.txt").write_text(text)
        print(name, text.splitlines()[0])


if __name__ == "__main__":
    write(sys.argv[1:])
