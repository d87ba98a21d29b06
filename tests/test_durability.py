"""No damage to a checkpoint passes for the checkpoint, and no kill costs one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import killed_saves
import numpy as np
import pytest

from zeta import checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "layer.weight": RNG.standard_normal((8, 8), np.float32),
    "optimizer.exp_avg.layer.weight": RNG.standard_normal((8, 8)),
    "optimizer.step.layer.weight": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
SETTINGS = {"step": 7, "lr": 0.1, "betas": [0.95, 0.99], "data": None, "prompt": "\ndéf "}


def flips(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    for at, bit in product(range(len(content)), range(8)):
        yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def other_bytes(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    for at, change in enumerate(rng.integers(1, 256, len(content))):
        yield content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]


def truncations(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    return (content[:size] for size in range(len(content)))


def insertions(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    for at in rng.integers(0, len(content) + 1, 1000):
        yield content[:at] + rng.bytes(rng.integers(1, 9)) + content[at:]
    for size in (1, 8, 4096):
        yield content + bytes(size)


def deletions(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    for at in rng.integers(0, len(content), 1000):
        yield content[:at] + content[at + rng.integers(1, 9) :]


def lost_blocks(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """A stretch that reads as zeros, or as another stretch of the file."""
    for at, source, size in rng.integers(0, len(content), (500, 3)):
        for block in (bytes(size), content[source:][:size]):
            yield content[:at] + block[: len(content) - at] + content[at + len(block) :]


SAME_LENGTH = [flips, other_bytes, lost_blocks]
Damage = Callable[[bytes, np.random.Generator], Iterator[bytes]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "a.safetensors", ARRAYS, SETTINGS)
    return tmp_path / "a.safetensors"


def refused(path: Path, content: bytes) -> bool:
    """Whether `load` refuses this content; what it does not refuse must be what was saved, bit for bit."""
    with path.open("r+b") as file:  # ext4 waits for the disk after a file was emptied and written anew
        file.write(content)
        file.truncate()
    try:
        arrays, settings = checkpoint.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    assert settings == SETTINGS and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    return False


@pytest.mark.parametrize("damage", [*SAME_LENGTH, truncations, insertions, deletions])
def test_no_damage_passes_for_the_checkpoint(path: Path, damage: Damage) -> None:
    content = path.read_bytes()
    found = [refused(path, altered) for altered in damage(content, np.random.default_rng(0))]
    assert len(found) >= 1000 and sum(found) > 0.9 * len(found)


@pytest.mark.parametrize("damage", SAME_LENGTH)
def test_damage_would_pass_without_the_digest(path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()
    monkeypatch.setattr(checkpoint, "digest", lambda arrays, header: header["digest"])
    with pytest.raises(AssertionError):
        for altered in damage(content, np.random.default_rng(0)):
            refused(path, altered)


def kill_savers(folder: Path, *how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, killed_saves.__file__, str(folder), *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_no_kill_costs_a_checkpoint(tmp_path: Path) -> None:
    done = kill_savers(tmp_path)
    assert done.returncode == 0, done.stderr
    kills, writing, saves = (int(word) for word in done.stdout.split() if word.isdigit())
    assert kills == 200 and writing >= 20 and saves >= 100  # measured: 73 to 121, 269 to 352


def test_a_kill_would_cost_what_is_written_in_place(tmp_path: Path) -> None:
    done = kill_savers(tmp_path, "in-place")
    assert done.returncode == 1 and "use another copy" in done.stderr
