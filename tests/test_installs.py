"""What a user installs: the wheel's files, what each extra brings, and one line about what is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from documents import block
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from zeta.extras import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND = "import sys; from zeta.cli import main; sys.exit(main())"
TRAIN = (
    "examples/train_lm.py --data LICENSE --layers 1 --width 16 --heads 2 --kv-heads 1 --context 8 --steps 2 --batch 2 "
    "--sample 1 --out {tmp}/run"
)
MODELS = {
    "torch_model.py": "from torch import nn\n\nmodel = nn.Linear(4, 4)\n",
    "lazy_model.py": "def make():\n    from torch import nn\n\n    return nn.Linear(4, 4)\n",
    "mlx_model.py": "from mlx import nn\n\nmodel = nn.Linear(4, 4)\n",
    "config.json": '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9}',
}


README = {"torch": ("torch",), "mlx": ("MLX",), "numpy": ("With NumPy", "zeta/README.md")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, made of a copy of the tree, and the wheel, made of that alone."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("zeta", "backends", "tests", "examples", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / name, folder / "tree" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    build(folder / "tree", f"build_sdist({str(folder)!r})")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder / "unpacked", filter="data")
    build(next((folder / "unpacked").iterdir()), f"build_wheel({str(folder)!r})")
    return folder


def build(tree: Path, call: str) -> None:
    code = f"from setuptools import build_meta; build_meta.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules(backends: str) -> set[str]:
    """Every file of Python's below zeta/ and backends/, the latter under the name given."""
    own = (path.relative_to(ROOT) for path in (ROOT / "zeta").rglob("*.py"))
    theirs = (path.relative_to(ROOT / "backends") for path in (ROOT / "backends").rglob("*.py"))
    return {str(p) for p in own if p.parts[1] != "backends"} | {f"{backends}/{path}" for path in theirs}


def test_the_wheel_holds_every_module_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    about = {name for name in names if ".dist-info/" in name}
    assert set(names) - about == modules("zeta/backends") | {"zeta/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_the_source_distribution_holds_what_the_wheel_is_made_of(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames() if not file.getmember(name).isdir()}
    about = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "zeta/py.typed"}
    assert {name for name in names if ".egg-info/" not in name} == modules("backends") | about


def brought(requirements: Iterable[str], extras: Iterable[str], seen: set[str]) -> Iterator[Distribution]:
    """The distributions that these requirements bring here, and what those require, each once."""
    for wanted in map(Requirement, requirements):
        name = canonicalize_name(wanted.name)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        if (key := f"{name}{sorted(wanted.extras)}") not in seen:
            seen.add(key)
            yield distribution(name)
            yield from brought(distribution(name).requires or [], wanted.extras, seen)


class Installed:
    """The wheel in an environment of its own, without a network: links to what its requirements bring, no more."""

    def __init__(self, built: Path, extras: str) -> None:
        self.folder = built / (extras or "nothing")
        self.folder.mkdir()
        with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
            wheel.extractall(self.folder)
        self.about = PathDistribution(next(self.folder.glob("*.dist-info")))
        for library in brought(self.about.requires or [], extras.split(",") if extras else [], set()):
            for top in {file.parts[0] for file in library.files or []} - {"..", "__pycache__"}:
                if not (self.folder / top).exists():
                    (self.folder / top).symlink_to(library.locate_file(top))

    def run(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(self.folder)}
        python = [sys.executable, "-S"]  # without this environment's own packages
        return subprocess.run([*python, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(built: Path) -> dict[str, Installed]:
    return {extras: Installed(built, extras) for extras in ("", "torch", "mlx", "torch,train", "integrations")}


@pytest.mark.parametrize("extras, absent", [("", "torch"), ("", "mlx"), ("torch", "mlx"), ("mlx", "torch")])
def test_an_environment_has_no_more_than_its_extras(installed: dict[str, Installed], extras: str, absent: str) -> None:
    """The control: what the tests below do without is really not there."""
    done = installed[extras].run("-c", f"import {absent}")
    assert done.returncode == 1 and f"No module named '{absent}'" in done.stderr


WORKS = {
    "": ["-c import zeta", "-c README numpy", "zeta parity", "zeta inspect {witness}/portable-Zeta.safetensors"],
    "torch": [
        "-c README torch",
        "zeta routing torch_model:model",
        "zeta convert {witness}/sharded {tmp}/one.safetensors",
    ],
    "mlx": ["-c README mlx", "zeta routing mlx_model:model"],
    "torch,train": [TRAIN],
    "integrations": ["zeta routing {tmp}/config.json"],
}
LACKS = {
    "": {
        "zeta routing torch_model:model": "torch_model:model needs torch: pip install 'zeta-optim[torch]'",
        "zeta routing lazy_model:make": "lazy_model:make needs torch: pip install 'zeta-optim[torch]'",
        "zeta routing mlx_model:model": "mlx_model:model needs mlx: pip install 'zeta-optim[mlx]'",
        "zeta routing {tmp}/config.json": "needs torch and transformers: pip install 'zeta-optim[torch,integrations]'",
        "zeta inspect runs/1 --plot x.png": "--plot needs matplotlib: pip install 'zeta-optim[train]'",
        "zeta parity --plot x.png": "--plot needs matplotlib: pip install 'zeta-optim[train]'",
        "zeta convert {witness}/sharded x.safetensors": "needs torch: pip install 'zeta-optim[torch]'",
        "zeta mlx-lm lora": "needs mlx and mlx-lm: pip install 'zeta-optim[mlx,integrations]'",
        TRAIN: "zeta.backends.torch needs torch: pip install 'zeta-optim[torch]'",
    },
    "torch": {
        "zeta routing {tmp}/config.json": "needs transformers: pip install 'zeta-optim[integrations]'",
        TRAIN: "loss.png needs matplotlib: pip install 'zeta-optim[train]'",
    },
    "mlx": {
        "zeta mlx-lm lora": "fine-tuning needs mlx-lm: pip install 'zeta-optim[integrations]'",
        "zeta convert {witness}/sharded x.safetensors": "needs torch: pip install 'zeta-optim[torch]'",
        TRAIN: "loss.png needs matplotlib: pip install 'zeta-optim[train]'",
    },
}


def run(environment: Installed, line: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`line` in an environment: of the command zeta, of python -c, or of a script."""
    for name, text in MODELS.items():
        (tmp_path / name).write_text(text)
    first, *rest = [word.format(tmp=tmp_path, witness=ROOT / "tests/witnesses") for word in line.split()]
    if first == "-c":
        code = block(*README[rest[1]]) if rest[0] == "README" else " ".join(rest)
        return environment.run("-c", code, cwd=tmp_path)
    if first == "zeta":
        return environment.run("-c", COMMAND, *rest, cwd=tmp_path)
    return environment.run(str(ROOT / first), *rest)


@pytest.mark.parametrize("extras, line", [(extras, line) for extras, lines in WORKS.items() for line in lines])
def test_works(installed: dict[str, Installed], extras: str, line: str, tmp_path: Path) -> None:
    done = run(installed[extras], line, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extras, line", [(extras, line) for extras, lines in LACKS.items() for line in lines])
def test_one_line_names_the_extra_that_is_missing(
    installed: dict[str, Installed], extras: str, line: str, tmp_path: Path
) -> None:
    done = run(installed[extras], line, tmp_path)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(f"{LACKS[extras][line]}\n")
    assert not (tmp_path / "run").exists()


def test_the_command_is_the_one_that_the_tests_run(installed: dict[str, Installed]) -> None:
    (command,) = installed[""].about.entry_points
    assert (command.name, command.value) == ("zeta", "zeta.cli:main")


@pytest.mark.parametrize("library", EXTRAS)
def test_an_extra_that_a_message_names_brings_its_library(library: str) -> None:
    assert library in {Requirement(line).name for line in PROJECT["optional-dependencies"][EXTRAS[library]]}
