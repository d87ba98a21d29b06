"""The README's Python: what "Use" shows runs as it stands, and every block parses."""

import ast
import re
from pathlib import Path

import pytest

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
