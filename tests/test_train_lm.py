"""The training script from outside: what it writes, that a resumed run is the uninterrupted one, and how it refuses."""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import killed_runs
import numpy as np
import pytest
import train_lm
from trainer import text
from trainer.loop import FILE, learning_rate

from zeta import checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")
EXAMPLES = Path(train_lm.__file__).parent
SIZES = "--layers 1 --width 16 --heads 2 --kv-heads 1 --context 16 --batch 2"
SHORT = f"{SIZES} --steps 8 --eval-every 3 --sample 5 --device cpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short text, for a validation looks at all that is held out."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_bytes((EXAMPLES / "trainer/text.py").read_bytes())
    return folder


@pytest.fixture(params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param if request.param == "torch" else "mlx.core")
    return str(request.param)


def run(out: Path, data: Path, flags: str = "", backend: str = "torch") -> int:
    fixed = ["--out", str(out), "--data", str(data), "--backend", backend]
    return train_lm.main([*fixed, *SHORT.split(), *flags.split()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert run(out, data) == 0
    return out


def lines(out: Path) -> list[dict[str, Any]]:
    """What two runs must agree on: all but the speed."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"}
        for line in checkpoint.read_lines(out / "metrics.jsonl")
    ]


def assert_same_run(out: Path, whole: Path) -> None:
    """Bit for bit: every loss, every parameter, every moment."""
    assert lines(out) == lines(whole)
    got, want = checkpoint.load(out / FILE), checkpoint.load(whole / FILE)
    assert got[1] == want[1]
    assert got[0].keys() == want[0].keys()
    for name, array in want[0].items():
        np.testing.assert_array_equal(got[0][name], array)


def test_writes_all_it_promises(
    tmp_path: Path, data: Path, backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "plot")  # this one is to be drawn
    assert run(tmp_path, data, backend=backend) == 0
    written = checkpoint.read_lines(tmp_path / "metrics.jsonl")
    steps = [line for line in written if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(line.keys() == {"step", "loss", "lr", "tokens_per_second"} for line in steps)
    assert [line["step"] for line in written if "val_loss" in line] == [3, 6, 8]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "loss.png", "metrics.jsonl"]
    shown = capsys.readouterr().out
    assert "validation loss" in shown and "tokens/s" in shown and "def " in shown


def interrupt(monkeypatch: pytest.MonkeyPatch, backend: str, moments: list[int], number: int = signal.SIGINT) -> None:
    """Sends the signal in each of these calls of the trainer's `step`."""
    trainer = import_module(f"trainer.on_{backend}").Trainer
    take, calls = trainer.step, iter(range(1, 100))

    def step(self: Any, tokens: np.ndarray, lr: float, stop: bool) -> Any:
        if next(calls) in moments:
            os.kill(os.getpid(), number)
        return take(self, tokens, lr, stop)

    monkeypatch.setattr(trainer, "step", step)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("optimizer, moments", [("zeta", [1, 4, 6]), ("eta", [4]), ("adamw", [4]), ("muon", [4])])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, data: Path, backend: str, optimizer: str, moments: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--optimizer {optimizer}"
    assert run(tmp_path / "whole", data, flags, backend) == 0
    interrupt(monkeypatch, backend, moments)
    out = tmp_path / "parts"
    assert run(out, data, flags, backend) == 130
    for status in (*[130] * (len(moments) - 1), 0, 0):  # the last one finds nothing left to do
        assert run(out, data, f"{flags} --resume", backend) == status
    assert_same_run(out, tmp_path / "whole")


def test_sigterm_saves_too(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, "torch", [5], signal.SIGTERM)
    assert run(tmp_path, data) == 130
    assert checkpoint.load(tmp_path / FILE)[1]["step"] == 5


MOMENTS = {"in a step": 3, "before the first checkpoint": 0, "in the second save": 3, "after the second save": 6}


@pytest.mark.parametrize(("moment", "saved"), MOMENTS.items())
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, trained: Path, data: Path, moment: str, saved: int
) -> None:
    flags = ["--out", str(tmp_path), "--data", str(data), *SHORT.split()]
    assert killed_runs.is_killed(killed_runs.train_lm, moment, flags)
    assert (checkpoint.load(tmp_path / FILE)[1]["step"] if saved else 0) == saved
    assert run(tmp_path, data, "--resume" if saved else "") == 0
    assert_same_run(tmp_path, trained)


def test_steps_and_rates_may_change_on_resume(tmp_path: Path, data: Path) -> None:
    assert run(tmp_path, data, "--steps 3") == 0
    assert run(tmp_path, data, "--resume --steps 5 --lr 0.002") == 0
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]
    assert checkpoint.load(tmp_path / FILE)[1]["lr"] == 0.002


BAD = {
    "--data /nowhere": "there is no file or folder /nowhere",
    "--data {empty}": "there is no text in",
    "--data {blank}": "there is no text in",
    "--data {short}": "give more text",
    "--context 100000": "give more text",
    "--backend mlx --device tpu": "choose --device",
    "--device tpu": "choose --device",
    "--device cuda:99": "choose --device",
    "--width 18": "does not divide",
    "--heads 2 --kv-heads 3": "cannot share",
    "--layers 0": "must be at least 1",
    "--steps 0": "must be at least 1",
    "--batch -1": "must be at least 1",
    "--lr nan": "must be finite",
    "--lr -1": "must be finite",
    "--seed -1": "must be finite",
    "--betas 0.9 1.0": "below 1",
    "--tokenizer /nowhere": "there is no tokenizer",
    "--tokenizer {short}": "is no tokenizer.json",
    "--vocab 10": "give more than 256",
    "--resume": "leave --resume out",
    "--out {short}": "choose another --out",
    "--out {short}/below": "choose another --out",
    "--lr 1e30 --warmup 0": "lower --lr than 1e+30 or a longer --warmup; no checkpoint was saved",
    "--vocab 300 --tokenizer {short}": "leave one of them out",
    "--width 400000000": "out of memory: choose a smaller",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(tmp_path: Path, data: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("")
    (tmp_path / "short").write_text("ten bytes.")
    paths = {name: str(tmp_path / name) for name in ("empty", "blank", "short")}
    assert run(tmp_path / "out", data, flags.format(**paths)) == 2
    assert_one_line(capsys, BAD[flags])


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("train_lm: ") and error.count("\n") == 1 and message in error


def test_an_absent_library_is_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zeta.extras.find_spec", lambda name: None)
    assert run(tmp_path, data, backend="mlx") == 2
    assert_one_line(capsys, "zeta.backends.mlx needs mlx: pip install 'zeta-optim[mlx]'")


SPOILERS = {
    "": "continue from it with --resume",
    "--resume --width 32": "the checkpoint's width is 16, not 32: leave --width out",
    "--resume --layers 2": "the checkpoint's layers is 1, not 2: leave --layers out",
    "--resume --tied": "the checkpoint's tied is False, not True: leave --tied out",
    "--resume --optimizer adamw": "the checkpoint's optimizer is zeta, not adamw: leave --optimizer out",
    "--resume --dtype float64": "the checkpoint's dtype is float32, not float64: leave --dtype out",
    "--resume --size 124m": "the checkpoint's vocab is None, not 50304: leave --size out",
    "--resume --steps 7": "--steps is 7, but the checkpoint is of step 8 already: give more, or leave --steps out",
    "--resume --steps 30 --eval-every 20 --lr 1e30": "or a longer --warmup; the checkpoint of step 8 is as",
    "--resume --data {other}": "the text is not",
    "--resume --device tpu": "choose --device",
}


@pytest.mark.parametrize("flags", SPOILERS)
def test_no_refusal_costs_a_checkpoint(
    tmp_path: Path, trained: Path, data: Path, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").write_text("another text " * 1000)
    before = (trained / FILE).read_bytes()
    capsys.readouterr()
    assert run(trained, data, flags.format(other=tmp_path / "other")) == 2
    assert_one_line(capsys, SPOILERS[flags])
    assert (trained / FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_spoilt_checkpoint_is_refused(
    tmp_path: Path, trained: Path, data: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes((trained / FILE).read_bytes()[:-100] if content is None else content)
    capsys.readouterr()
    assert run(tmp_path, data, "--resume") == 2
    assert_one_line(capsys, "cut short")


def test_what_another_program_saved_is_refused(
    tmp_path: Path, trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, _ = checkpoint.load(trained / FILE)
    checkpoint.save(tmp_path / FILE, arrays, {"step": 8})
    capsys.readouterr()
    assert run(tmp_path, data, "--resume") == 2
    assert_one_line(capsys, "train_lm.py did not write this checkpoint, which lacks ['context',")


def test_says_what_a_run_does_not_do(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, data, "--steps 3 --warmup 3") == 0
    assert "warm-up" not in capsys.readouterr().out
    assert run(tmp_path, data, "--steps 3 --warmup 4 --lr 0.002 --resume") == 0
    shown = capsys.readouterr().out
    assert "the warm-up of 4 steps is longer than the run of 3: no step has --lr 0.002" in shown
    assert "step 3 of 3 was reached before: give more --steps to continue" in shown


def test_a_full_disk_is_one_line(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, data, "--steps 3") == 0
    before, soft = (tmp_path / FILE).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, soft[1]))
    try:
        assert run(tmp_path, data, "--steps 5 --resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert_one_line(capsys, "could not be written, and is as it was")
    assert (tmp_path / FILE).read_bytes() == before
    assert run(tmp_path, data, "--steps 5 --resume") == 0


def test_a_vocabulary_is_kept_beside_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    assert run(tmp_path / "whole", data, "--vocab 300") == 0
    assert len(json.loads((tmp_path / "whole/tokenizer.json").read_text())["model"]["vocab"]) == 300
    interrupt(monkeypatch, "torch", [4])
    assert run(tmp_path / "parts", data, "--vocab 300") == 130
    assert run(tmp_path / "parts", data, "--resume") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    same = f"--tokenizer {tmp_path / 'whole/tokenizer.json'}"
    assert run(tmp_path / "given", data, same) == 0
    assert lines(tmp_path / "given") == lines(tmp_path / "whole")
    assert run(tmp_path / "given", data, f"{same} --resume") == 0
    capsys.readouterr()
    assert run(tmp_path / "given", data, f"--tokenizer {data / 'text.txt'} --resume") == 2
    assert_one_line(capsys, "leave --tokenizer out")


def test_whole_files_are_held_out() -> None:
    source = text.load()
    assert 0.04 < len(source.validation) / len(source.train) < 0.15
    files = text.read(Path(os.__file__).parent, "*.py")
    assert sum(content in source.train for content in files.values() if len(content) > 5000) > 100
    held_out = [content for content in files.values() if len(content) > 5000 and content in source.validation]
    assert held_out and not any(content in source.train for content in held_out)


def test_the_schedule_rises_and_falls() -> None:
    rates = [learning_rate(step, dict(lr=1.0, warmup=10, steps=100)) for step in range(1, 101)]
    assert rates[9] == 1.0 and rates[4] == 0.5
    assert sorted(rates[9:], reverse=True) == rates[9:] and 0 < rates[-1] < 1e-3


def test_runs_from_any_folder(tmp_path: Path, data: Path) -> None:
    fastest = "mlx" if find_spec("mlx") else "torch"  # to start: torch takes three seconds
    flags = ["--data", str(data), "--backend", fastest, *SHORT.split()]
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), *flags]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    assert (tmp_path / "runs/1" / FILE).exists()


def test_runs_are_numbered(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags in ([], [], ["--resume"]):
        assert train_lm.main(["--data", str(data), *SHORT.split(), *flags]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]


def test_runs_that_begin_together_take_folders_of_their_own(tmp_path: Path) -> None:
    assert [train_lm.claim(tmp_path / "runs/1").name for _ in range(3)] == ["1", "2", "3"]


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("too short")
    assert train_lm.main(["--data", "text", *SHORT.split()]) == 2
    assert not list((tmp_path / "runs").iterdir())


def test_of_runs_with_a_gap_the_newest_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1", "9", "10", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / FILE).touch()
    (tmp_path / "runs/12").mkdir()  # without a checkpoint
    assert train_lm.choose_folder({"resume": True}) == Path("runs/10")
    assert train_lm.choose_folder({}) == Path("runs/11")  # the newest, from then on


def test_several_runs_in_one_picture(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(EXAMPLES / "plot.py"), str(trained), str(trained), "--out", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
