"""The layout: what stands on which floor, and that no import runs upward."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"stages", "extras", "palette"},
    {"core"},
    {"adamw", "family", "preconditioned", "coefficients", "newton_schulz_forms", "checkpoint"},
    {"routing"},
    {"storage", "sharding", "portable", "step_report"},
    {"whitening", "backends"},
    {"parity"},
    {"bench"},
    {"cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ALGORITHM = set.union(*FLOORS[:3]) - {"checkpoint", "palette"}


def modules() -> dict[str, Path]:
    """{dotted name: file} of all that is ours, but zeta/__init__.py, which is every user's door."""
    folders = {"zeta": ROOT / "zeta", "zeta.backends": ROOT / "backends"}
    files = ((name, folder, file) for name, folder in folders.items() for file in folder.rglob("*.py"))
    named = {
        ".".join([name, *file.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): file
        for name, folder, file in files
        if (folder / "backends") not in file.parents
    }
    return {name: file for name, file in named.items() if name not in ("zeta", "zeta.backends")}


def imports(name: str, file: Path) -> Iterator[str]:
    """The dotted names of ours that a file imports, inside functions or not."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", modules())
def test_no_import_runs_upward(name: str) -> None:
    ours = [other for other in imports(name, modules()[name]) if other.startswith("zeta.")]
    assert all(FLOOR[room(other)] <= FLOOR[room(name)] for other in ours if room(other) in FLOOR)
    assert not [other for other in ours if room(other) not in FLOOR and room(name) in ALGORITHM]


def test_the_backends_do_not_know_each_other() -> None:
    for name, file in modules().items():
        if name.startswith("zeta.backends."):
            library = name.split(".")[2]
            other = {"torch": "mlx", "mlx": "torch"}[library]
            assert not [i for i in imports(name, file) if f"{i}.".startswith((f"{other}.", f"zeta.backends.{other}."))]


def test_every_file_stands_on_a_floor() -> None:
    assert {room(name) for name in modules()} == FLOOR.keys()
