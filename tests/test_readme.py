"""The README's Python: "Use" runs as it stands, every block parses, and files import what they are said to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import precision
import pytest

from zeta.parity.checks import TOLERANCE

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
LIBRARIES = ["torch", "mlx.core", "numpy"]  # in the order of "Use"


@pytest.mark.parametrize("library, block", [*zip(LIBRARIES, BLOCKS[:3], strict=True)], ids=LIBRARIES)
def test_use_runs_as_it_stands(library: str, block: str) -> None:
    pytest.importorskip(library)
    assert f"import {library}" in block
    exec(compile(block, f"README.md, {library}", "exec"), {})


@pytest.mark.parametrize("block", BLOCKS, ids=range(1, len(BLOCKS) + 1))
def test_every_block_parses(block: str) -> None:
    ast.parse(block)


def imported(file: Path) -> set[str]:
    """What a file imports from outside Python's own library and zeta, inside functions or not."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"zeta"}


def test_the_algorithm_imports_no_array_library() -> None:
    text = " ".join(README.read_text().split())
    said = re.search(r"The optimizers \((.*?)\) are pure functions that import no array library", text)
    assert said
    files = re.findall(r"`(\w+\.py)`", said[1])
    assert {"core.py", "family.py", "preconditioned.py"} < set(files)
    for name in files:
        assert imported(README.parent / "zeta" / name) <= {"array_api_compat"}
    assert "numpy" in imported(README.parent / "zeta/parity/checks.py")
    loaded = "import sys, zeta; sys.exit(bool({'numpy', 'torch', 'mlx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import numpy; {loaded}"]).returncode == 1


@pytest.mark.parametrize("dtype", precision.DEFAULTS)
def test_promises_are_the_bounds_that_tests_hold(dtype: str) -> None:
    row = re.search(rf"^\| {dtype}.*\| bit for bit \|(.*)\|(.*)\|$", README.read_text(), re.MULTILINE)
    assert row
    losses, steps = ([float(number.strip("() ")) for number in cell.split()] for cell in row.groups())
    assert losses[0] <= losses[1] == precision.LOSSES[dtype]
    assert steps[0] <= steps[1] == TOLERANCE[dtype].step
    bound = f"{precision.LOSSES[dtype]:.0e}".replace("e-0", "e-")
    assert f"{bound} with {dtype}" in (README.parent / "examples/README.md").read_text()
