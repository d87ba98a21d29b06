"""The training script under torchrun: killed, and resumed by any number of ranks, it is the run of one process."""

import faulthandler
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import killed_runs
import numpy as np
import precision
import pytest
import train_lm
from trainer.loop import FILE

from zeta import checkpoint

torch = pytest.importorskip("torch")
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_pictures")
EXAMPLES = Path(train_lm.__file__).parent
FLAGS = (
    "--layers 2 --width 32 --heads 2 --kv-heads 1 --context 16 --batch 4 --steps 20 --warmup 400 --eval-every 5 "
    "--sample 3 --device cpu"
)
Main = Callable[[list[str]], int]
PATIENCE = 100  # seconds; a job takes five to ten, and ranks wait ten minutes for one another

# The script under torchrun, whose rank 1 is killed.
KILLED = "import sys, killed_runs; killed_runs.train_lm('in step 8, rank 1 alone', sys.argv[1:])"


def arguments(out: Path, *flags: str) -> list[str]:
    return ["--out", str(out), "--data", str(EXAMPLES / "trainer/loop.py"), *FLAGS.split(), *flags]


def torchrun(script: Path, *arguments: str) -> tuple[int, str]:
    """The exit status of a job of two ranks, and what it said."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = precision.environment("float32", EXAMPLES, killed_runs.HERE)
    done = subprocess.run([*launcher, str(script), *arguments], env=environment, timeout=PATIENCE, **pipes)
    return done.returncode, done.stdout


@pytest.fixture(autouse=True, scope="module")
def float32() -> Iterator[None]:
    """What is said of no other precision is said of float32's."""
    with precision.default("float32"):
        yield


@pytest.fixture(scope="module", params=["zeta", "eta"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> Path:
    out = tmp_path_factory.mktemp("one")
    assert train_lm.main(arguments(out, "--backend", "torch", "--optimizer", optimizer)) == 0
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> tuple[Path, str]:
    """A job of two ranks of which one was killed: its folder, and what it said; Eta's is one of torchrun."""
    folder = tmp_path_factory.mktemp("killed")
    if optimizer == "eta":
        (folder / "killed.py").write_text(KILLED)
        code, said = torchrun(folder / "killed.py", *arguments(folder / "out", "--optimizer", optimizer))
        assert code == 1, said
        return folder / "out", said
    (folder / "out").mkdir()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        job(2, folder / "out", "float32", "--optimizer", optimizer, main=killed_in_step_8)
    (folder / "out/ranks").unlink()  # by which they met
    return folder / "out", ""


@pytest.mark.parametrize("optimizer", ["eta"], indirect=True)
def test_a_lost_rank_ends_the_job_with_its_reason(killed: tuple[Path, str]) -> None:
    assert "another rank is gone: continue from the last checkpoint, if any, with --resume" in killed[1]


def killed_in_step_8(arguments: list[str]) -> int:
    return killed_runs.train_lm("in step 8, rank 1 alone", arguments)


def job(ranks: int, out: Path, dtype: str, *flags: str, main: Main = train_lm.main) -> str:
    """What the job's ranks said: processes as torchrun starts them, but from one that has imported torch."""
    method = killed_runs.context().get_start_method()
    start_processes(rank, (ranks, out, dtype, flags, main), nprocs=ranks, start_method=method)
    return "".join((out / f"said-{number}").read_text() for number in range(ranks))


def rank(number: int, ranks: int, out: Path, dtype: str, flags: tuple[str, ...], main: Main) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # ranks that wait for one another would do so for minutes
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_RUN_ID"], train_lm.LAUNCHED, sys.modules["plot"] = "a job", "torch", Mock()
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/ranks", rank=number, world_size=ranks)
    with (out / f"said-{number}").open("w") as said, redirect_stdout(said), precision.default(dtype):
        assert main(arguments(out, *flags)) == 0
    torch.distributed.destroy_process_group()


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in checkpoint.read_lines(out / "metrics.jsonl") if "loss" in line}


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (1, ["--backend", "mlx"]), (2, ["--fsdp"]), (4, [])])
def test_any_number_of_ranks_goes_on(
    killed: tuple[Path, str], one_process: Path, tmp_path: Path, ranks: int, flags: list[str], optimizer: str
) -> None:
    if "mlx" in flags:
        pytest.importorskip("mlx.core")
    shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
    assert checkpoint.load(tmp_path / FILE)[1]["step"] == 5
    if ranks == 2 and optimizer == "eta":
        code, said = torchrun(EXAMPLES / "train_lm.py", *arguments(tmp_path, "--resume", *flags))
        assert code == 0 and said.count(f"parameters, {optimizer} on torch") == 1, said
    elif ranks > 1:
        said = job(ranks, tmp_path, "float32", "--resume", *flags)
        assert said.count(f"parameters, {optimizer} on torch") == 1, said  # one rank speaks
    else:
        assert train_lm.main(arguments(tmp_path, "--backend", "torch", "--resume", *flags)) == 0
    got, want = losses(tmp_path), losses(one_process)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=precision.LOSSES["float32"])
    got, want = checkpoint.load(tmp_path / FILE), checkpoint.load(one_process / FILE)
    assert got[1] == want[1]
    for name, array in want[0].items():
        assert np.linalg.norm(got[0][name] - array) <= 1e-3 * np.linalg.norm(array), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_ranks_are_one_process_in_half_precision(tmp_path: Path, optimizer: str, dtype: str) -> None:
    """The control is a rate off by one in twenty."""
    rates = {"two": "6e-3", "one": "6e-3", "wrong": "6.3e-3"}
    for name, rate in rates.items():
        (tmp_path / name).mkdir()
        flags = ["--optimizer", optimizer, "--lr", rate, "--warmup", "0"]
        if name == "two":
            job(2, tmp_path / name, dtype, *flags)
        else:
            with precision.default(dtype):
                assert train_lm.main(arguments(tmp_path / name, "--backend", "torch", *flags)) == 0
    two, one, wrong = (losses(tmp_path / name) for name in rates)
    assert two.keys() == one.keys()
    partings = [max(abs(other[step] / one[step] - 1) for step in one) for other in (two, wrong)]
    assert partings[0] <= precision.LOSSES[dtype] < 4 * precision.LOSSES[dtype] < partings[1]
