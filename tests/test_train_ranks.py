"""The training script under torchrun: killed, and resumed by any number of ranks, it is the run of one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import journal
import numpy as np
import pytest
import train_lm
from loop import FILE

from zeta import checkpoint

pytest.importorskip("torch")
EXAMPLES = Path(train_lm.__file__).parent
FLAGS = (
    "--layers 2 --width 32 --heads 2 --kv-heads 1 --context 16 --batch 4 --steps 40 --warmup 400 --eval-every 5 "
    "--sample 3 --device cpu"
)
PATIENCE = 100.0  # seconds; a job takes five to ten


def torchrun(ranks: int, out: Path, *flags: str) -> "subprocess.Popen[str]":
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(EXAMPLES / "train_lm.py"), "--out", str(out), "--data", str(EXAMPLES / "loop.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*launcher, *script, *FLAGS.split(), *flags], **pipes)


def alone(out: Path) -> list[str]:
    return ["--out", str(out), "--data", str(EXAMPLES / "loop.py"), "--backend", "torch", *FLAGS.split()]


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def workers(job: "subprocess.Popen[str]") -> list[int]:
    """The process of each rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train_lm" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in journal.read(out / "metrics.jsonl") if "loss" in line}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    assert train_lm.main(alone(out)) == 0
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, str]:
    """A run of two ranks of which one was killed: its folder, the seconds until the job ended, and what it said."""
    out = tmp_path_factory.mktemp("killed")
    job = torchrun(2, out)
    wait_for((out / FILE).exists)
    start = time.monotonic()
    os.kill(workers(job)[-1], signal.SIGKILL)
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode not in (0, None)
    return out, time.monotonic() - start, said


def test_a_lost_rank_ends_the_job_with_its_reason(killed: tuple[Path, float, str]) -> None:
    _, seconds, said = killed
    assert seconds < 60
    assert "another rank is gone: go on from the last checkpoint with --resume" in said


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (2, ["--fsdp"]), (4, [])])
def test_any_number_of_ranks_goes_on(
    killed: tuple[Path, float, str], one_process: Path, tmp_path: Path, ranks: int, flags: list[str]
) -> None:
    shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
    _, before = checkpoint.load(tmp_path / FILE)
    assert 0 < before["step"] < 40
    if ranks > 1:
        said, _ = torchrun(ranks, tmp_path, "--resume", *flags).communicate(timeout=PATIENCE)
        assert said.count("parameters, zeta on torch") == 1, said  # one rank speaks
    else:
        assert train_lm.main([*alone(tmp_path), "--resume"]) == 0
    got, want = losses(tmp_path), losses(one_process)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    got, want = checkpoint.load(tmp_path / FILE), checkpoint.load(one_process / FILE)
    assert got[1] == want[1]
    for name, array in want[0].items():
        assert np.linalg.norm(got[0][name] - array) <= 1e-3 * np.linalg.norm(array), name
