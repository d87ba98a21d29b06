"""The README and the pages beside the code: their Python runs, their commands exist, their numbers stand once."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from typing import Any

import precision
import pytest
from documents import PAGES, ROOT, block, blocks

from zeta.cli import main
from zeta.parity.checks import TOLERANCE

README = ROOT / "README.md"
BANNED = r"shared out|goes on|without a word|other way round|\btells\b"


def test_torch_runs_as_it_stands() -> None:
    pytest.importorskip("torch")
    names: dict[str, Any] = {}
    for name, treated in (("torch", "zeta adamw adamw adamw"), ("matrices they hold", "adamw adamw adamw adamw")):
        exec(compile(block(name), "README.md", "exec"), names)
        groups = names["optimizer"].param_groups
        assert [route[0] for group in groups for route in group["routes"]] == treated.split()


def test_mlx_runs_as_it_stands() -> None:
    pytest.importorskip("mlx")
    names: dict[str, Any] = {}
    exec(compile(block("MLX"), "README.md", "exec"), names)
    assert names["optimizer"].step == 1 and "exp_avg_sq" in names["optimizer"].state["up"]["weight"]


def test_the_algorithm_page_runs_as_it_stands() -> None:
    exec(compile(block("With NumPy", "zeta/README.md"), "zeta/README.md", "exec"), {})
    pytest.importorskip("torch")
    exec(compile(block("whitening study's", "zeta/README.md"), "zeta/README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_parses(page) -> None:
    for text in blocks(page):
        ast.parse(text)


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for page in PAGES:
        for line in "\n".join(blocks(page, "sh")).splitlines():
            first, *rest = [*line.split("#")[0].split(), "", ""]
            assert first != "make" or rest[0] in targets, line
            assert first != "zeta" or f"    {rest[0]}" in told, line
            assert first != "python" or (ROOT / rest[0]).exists(), line


def test_a_newcomer_reads_it_in_five_minutes() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1400
    rows = [re.findall(r"^\|", table, re.MULTILINE) for table in text.split("\n\n")]
    assert max(map(len, rows)) <= 8 + 2


def strings(tree: ast.AST) -> list[str]:
    """Docstrings and messages."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_it_is_plain_english() -> None:
    said = {page: page.read_text() for page in PAGES}
    for folder in ("zeta", "backends", "examples", "bench"):
        said |= {file: "\n".join(strings(ast.parse(file.read_text()))) for file in (ROOT / folder).rglob("*.py")}
    assert not [f"{file}: {words}" for file, text in said.items() for words in re.findall(BANNED, text)]


def test_no_number_of_the_readme_stands_in_another_page() -> None:
    """What is measured stands once. Code, papers and Python's version are no measurements."""
    numbers = re.compile(r"(?<![\w./])(?!3\.11\b)\d[\d,]*\.\d\d+(?![\w.])")
    counted = Counter(number for page in PAGES for number in set(numbers.findall(page.read_text())))
    text = re.sub(r"```.*?```|`[^`]*`", "", README.read_text(), flags=re.DOTALL)
    assert not [number for number in numbers.findall(text) if counted[number] > 1]


def test_the_address_stands_once() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert len({url.partition("/blob/")[0].partition("/issues")[0] for url in urls.values()}) == 1
    address = urls["Repository"]
    assert {url for url in re.findall(r"(?:git\+|clone )(https?://\S+?)['\s]", README.read_text())} == {address}


def imported(file) -> set[str]:
    """What a file imports from outside Python's own library and zeta, inside functions or not."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"zeta"}


def test_the_algorithm_imports_no_array_library() -> None:
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", (ROOT / "zeta/README.md").read_text(), re.MULTILINE)[:2]
    files = re.findall(r"`(\w+\.py)`", " ".join(rows))
    assert {"core.py", "family.py", "preconditioned.py"} < set(files)
    for name in files:
        assert imported(ROOT / "zeta" / name) <= {"array_api_compat"}
    assert "numpy" in imported(ROOT / "zeta/parity/checks.py")
    loaded = "import sys, zeta; sys.exit(bool({'numpy', 'torch', 'mlx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import numpy; {loaded}"]).returncode == 1


@pytest.mark.parametrize("dtype", precision.DEFAULTS)
def test_promises_are_the_bounds_that_tests_hold(dtype: str) -> None:
    text = (ROOT / "examples/README.md").read_text()
    row = re.search(rf"^\| {dtype}.*\| bit for bit \|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert row
    losses, steps = ([float(number.strip("() ")) for number in cell.split()] for cell in row.groups())
    assert losses[0] <= losses[1] == precision.LOSSES[dtype]
    assert steps[0] <= steps[1] == TOLERANCE[dtype].step
    bound = f"{precision.LOSSES[dtype]:.0e}".replace("e-0", "e-")
    assert f"{bound} with {dtype}" in text
