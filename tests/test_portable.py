"""A run that changes libraries continues as if it had not: its losses, its parameters, what its optimizer keeps."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import precision
import pytest
import train_lm
from trainer import settings
from trainer.loop import FILE, learning_rate

from zeta import checkpoint
from zeta.bench import model
from zeta.parity.checks import TOLERANCE

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

pytestmark = pytest.mark.usefixtures("no_pictures")
EXAMPLES = Path(train_lm.__file__).parent
# The rate rises to the end, so that a step's rate is the same whatever --steps says.
FLAGS = "--layers 2 --width 32 --heads 2 --kv-heads 1 --context 32 --batch 4 --warmup 30 --eval-every 10 --sample 0"


@pytest.fixture(autouse=True, scope="module")
def float32() -> Iterator[None]:
    """What is said of no other precision is said of float32's."""
    with precision.default("float32"):
        yield


def command(out: Path, backend: str, steps: int, *flags: str) -> list[str]:
    return ["--out", str(out), "--backend", backend, "--steps", str(steps), "--device", "cpu", *flags]


def run(out: Path, backend: str, steps: int, *flags: str) -> None:
    assert train_lm.main(command(out, backend, steps, *flags)) == 0


def run_as_a_user(out: Path, backend: str, steps: int, *flags: str) -> None:
    script = [sys.executable, str(EXAMPLES / "train_lm.py"), *command(out, backend, steps, *flags)]
    done = subprocess.run(script, env=precision.environment("float32"), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


Run = Callable[..., None]


@pytest.fixture(scope="module")
def first_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a run's first command: a resumed one knows them."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, size, "uint8").tobytes() for size in rng.integers(1, 9, 300)]
    text = tmp_path_factory.mktemp("data") / "text"
    text.write_bytes(b" ".join(words[i] for i in rng.geometric(0.02, 10_000) % 300))
    return [*FLAGS.split(), "--data", str(text)]


def losses(folder: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in checkpoint.read_lines(folder / "metrics.jsonl") if key in line}


def parting(out: Path, whole: Path, key: str = "loss") -> float:
    """The largest relative difference of the losses of the steps that both took."""
    got, want = losses(out, key), losses(whole, key)
    return max(abs(got[step] / want[step] - 1) for step in got.keys() & want.keys())


def assert_same_losses(out: Path, whole: Path, dtype: str = "float32") -> None:
    for key in ("loss", "val_loss"):
        assert losses(out, key).keys() == losses(whole, key).keys()
        assert parting(out, whole, key) <= precision.LOSSES[dtype]


def assert_same_state(out: Path, whole: Path, dtype: str = "float32") -> None:
    """By the distance that a parameter moved, and the size of what the optimizer keeps."""
    (got, _), (want, s) = checkpoint.load(out / FILE), checkpoint.load(whole / FILE)
    assert got.keys() == want.keys()
    sizes = want | {name: want[name] - first for name, first in first_parameters(s).items()}
    for name in want:
        if ".exp_avg." in name and name.replace("exp_avg", "exp_avg_sq") in want:
            sizes[name] = np.sqrt(want[name.replace("exp_avg", "exp_avg_sq")])  # the gradients' own: sums may cancel
        error, size = np.linalg.norm(got[name] - want[name]), np.linalg.norm(sizes[name])
        assert error <= TOLERANCE[dtype].step * size, f"{name} is off by {error:.1e} of {size:.1e}"


def first_parameters(s: dict[str, object]) -> dict[str, np.ndarray]:
    return model.init(model.Config(**{name: s[name] for name in settings.SHAPE} | {"vocab": 256}), s["seed"])


def test_from_mlx_to_torch_and_back_on_the_command_line(tmp_path: Path, first_flags: list[str]) -> None:
    there_and_back(tmp_path, "mlx", "torch", first_flags, run_as_a_user)


@pytest.mark.parametrize(
    "optimizer, first, then", [("zeta", "torch", "mlx"), ("adamw", "mlx", "torch"), ("adamw", "torch", "mlx")]
)
def test_there_and_back(tmp_path: Path, first_flags: list[str], optimizer: str, first: str, then: str) -> None:
    there_and_back(tmp_path, first, then, [*first_flags, "--optimizer", optimizer])


def there_and_back(folder: Path, first: str, then: str, flags: list[str], change: Run = run) -> None:
    """A run of 30 steps, which are those of the run that did not change libraries at steps 10 and 20."""
    whole, changed = folder / "whole", folder / "changed"
    run(whole, first, 10, *flags)
    shutil.copytree(whole, changed)
    run(whole, first, 30, "--resume")  # bit for bit a run that was never stopped: see test_train_lm.py
    change(changed, then, 20, "--resume")
    change(changed, first, 30, "--resume")
    assert_same_losses(changed, whole)
    assert_same_state(changed, whole)


def go_on(out: Path, backend: str, steps: int, *flags: str, off: float = 0.0) -> None:
    """To this step of a run of 200, at the rates that the default recipe gives those, or at wrong ones."""

    def rate(step: int, s: dict[str, object]) -> float:
        return (1 + off) * learning_rate(step, s | {"steps": 200, "warmup": 10})

    with patch("trainer.loop.learning_rate", rate):
        run(out, backend, steps, *flags)


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory: pytest.TempPathFactory, first_flags: list[str]) -> Callable[..., Path]:
    """The folder of 70 steps with MLX at its default dtype; beside it, "whole" continued to step 200."""

    @cache
    def make(optimizer: str, dtype: str) -> Path:
        folder = tmp_path_factory.mktemp("two-hundred")
        with precision.default(dtype):
            flags = [*first_flags, "--layers", "1", "--optimizer", optimizer, "--eval-every", "70"]
            go_on(folder / "begun", "mlx", 70, *flags)
            shutil.copytree(folder / "begun", folder / "whole")
            go_on(folder / "whole", "mlx", 200, "--resume")
        return folder / "begun"

    return make


@pytest.mark.parametrize("optimizer", ["zeta", "eta"])
@pytest.mark.parametrize("dtype", precision.DEFAULTS)
def test_two_hundred_steps_from_mlx_to_torch_and_back(
    tmp_path: Path, two_hundred: Callable[..., Path], dtype: str, optimizer: str
) -> None:
    """The control is a rate that is off in torch, by as much as parts the losses by four bounds."""
    first = two_hundred(optimizer, "float16" if dtype == "float16" else "float32")  # MLX's on a GPU, and on a CPU
    for name in ("changed", "wrong"):
        shutil.copytree(first, tmp_path / name)
    with precision.default(dtype):
        go_on(tmp_path / "changed", "torch", 140, "--resume")
        go_on(tmp_path / "changed", "mlx", 200, "--resume")
        go_on(tmp_path / "wrong", "torch", 140, "--resume", off=60 * precision.LOSSES[dtype])
    assert_same_losses(tmp_path / "changed", first.parent / "whole", dtype)
    assert_same_state(tmp_path / "changed", first.parent / "whole", dtype)
    assert parting(tmp_path / "wrong", first.parent / "whole") > 4 * precision.LOSSES[dtype]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, first_flags: list[str]) -> Path:
    """The folder of 10 steps with MLX; beside it, "whole" continued for 10 more."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder / "begun", "mlx", 10, *first_flags)
    shutil.copytree(folder / "begun", folder / "whole")
    run(folder / "whole", "mlx", 20, "--resume")
    return folder / "begun"


@pytest.mark.parametrize("change", ["nothing", "zero", "lose"])
def test_one_lost_moment_would_show(
    tmp_path: Path, begun: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, key = tmp_path / "out", "optimizer.exp_avg_sq.model.layers.1.mlp.up_proj.weight"
    shutil.copytree(begun, out)
    arrays, s = checkpoint.load(out / FILE)
    arrays |= {key: arrays[key] * (change != "zero")}
    checkpoint.save(out / FILE, {name: a for name, a in arrays.items() if (name, change) != (key, "lose")}, s)
    if change == "lose":
        assert train_lm.main(command(out, "torch", 20, "--resume")) == 2
        assert "but Zeta keeps" in capsys.readouterr().err
        return
    run(out, "torch", 20, "--resume")
    for assert_same in (assert_same_losses, assert_same_state):
        if change == "nothing":
            assert_same(out, begun.parent / "whole")
        else:
            with pytest.raises(AssertionError):
                assert_same(out, begun.parent / "whole")


@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_a_checkpoint_of_another_optimizer_is_named_so(begun: Path, library: str) -> None:
    saved, s = checkpoint.load(begun / FILE)
    config = model.Config(**{name: s[name] for name in settings.SHAPE} | {"vocab": 256})
    other = train_lm.make_trainer(library, config, s | {"device": "cpu", "optimizer": "eta"})
    before = other.arrays()
    with pytest.raises(ValueError, match=r"but Eta keeps .* that wrote it, Zeta, with"):
        other.load(saved)
    assert all(np.array_equal(before[name], array) for name, array in other.arrays().items())


# For muon no more than this holds: torch 2.13 multiplies in bfloat16, MLX 0.32 in the parameter's dtype, and in MLX no
# weight decays (see on_mlx.py), so that the losses of `there_and_back` differ by up to 2.5e-2.
@pytest.mark.parametrize("optimizer", ["zeta", "eta", "adamw", "muon"])
@pytest.mark.parametrize("first, then", [("mlx", "torch"), ("torch", "mlx")])
def test_the_change_itself_loses_no_bit(
    tmp_path: Path, first_flags: list[str], optimizer: str, first: str, then: str
) -> None:
    run(tmp_path, first, 3, *first_flags, "--optimizer", optimizer)
    saved, s = checkpoint.load(tmp_path / FILE)
    config = model.Config(**{name: s[name] for name in settings.SHAPE} | {"vocab": 256})
    other = train_lm.make_trainer(then, config, s | {"device": "cpu"})
    other.load(saved)
    found = other.arrays()
    assert found.keys() == saved.keys()
    for name in saved:
        assert found[name].dtype == saved[name].dtype
        np.testing.assert_array_equal(found[name], saved[name])
