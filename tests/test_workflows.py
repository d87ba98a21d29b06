"""The public CI: what its workflows call is there, actions are pinned, and its oldest versions are those promised."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = {f"{stem}: {name}": job for stem, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()}
TARGETS = set(re.findall(r"^([\w./]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(job: dict[str, Any]) -> Iterator[list[str]]:
    """The words of every line that a job runs."""
    for step in job["steps"]:
        yield from (shlex.split(line, comments=True) for line in step.get("run", "").splitlines())


def check(words: list[str]) -> None:
    """Raises AssertionError for a command with a target of make's or a file that is not there."""
    program, first = words[0], words[1]
    assert program in ("make", "jq", ".venv/bin/zeta", ".venv/bin/pip", ".venv/bin/python")
    if program == "make":
        assert first in TARGETS
    if program == ".venv/bin/python":
        assert (ROOT / first).is_file()
    if program == ".venv/bin/zeta":
        assert first in ("parity", "bench")


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_command_is_there(job: dict[str, Any]) -> None:
    lines = list(commands(job))
    assert any(words[0] == "make" for words in lines)
    for words in lines:
        check(words)


@pytest.mark.parametrize("line", ["make tests", "make CONSTRAINTS", ".venv/bin/python bench/steps.py", "rm -r x"])
def test_a_command_that_is_not_there_is_caught(line: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(line))


@pytest.mark.parametrize("path", FILES, ids=WORKFLOWS)
def test_actions_are_pinned_and_named(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in uses)


@pytest.mark.parametrize("flow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_jobs_may_read_and_no_more(flow: dict[str, Any]) -> None:
    assert flow["permissions"] == {}
    for job in flow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        checkout = next(step for step in job["steps"] if "checkout" in step.get("uses", ""))
        assert checkout["with"]["persist-credentials"] is False


def test_the_oldest_are_those_promised() -> None:
    oldest, newest = WORKFLOWS["ci"]["jobs"]["linux"]["strategy"]["matrix"]["include"]
    assert PROJECT["requires-python"] == f">={oldest['python']}" and newest["constraints"] == "/dev/null"
    extras = PROJECT["optional-dependencies"]
    promised = map(Requirement, PROJECT["dependencies"] + extras["torch"] + extras["mlx"])
    least = {wanted.name: Version(next(iter(wanted.specifier)).version) for wanted in promised}
    for pin in (ROOT / oldest["constraints"]).read_text().splitlines()[1:]:
        name, _, version = pin.partition("==")
        assert Version(version) == (Version("2.3.4") if name == "numpy" else least[name])


def test_a_device_is_reported_with_what_the_command_prints():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/device.yml").read_text())["body"]
    assert {"`zeta parity`", "`zeta bench`", "`zeta bench --json`"} <= {part["attributes"]["label"] for part in form}
