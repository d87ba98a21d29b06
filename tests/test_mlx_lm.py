"""`zeta mlx-lm lora` on a tiny model's folder: killed runs resume bit for bit, and what is wrong costs nothing."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import yaml
from conftest import need

from zeta import cli

lora, trainer = need("mlx_lm.lora"), need("mlx_lm.tuner.trainer")
mx, tiny_chat, lm = need("mlx.core"), need("tiny_chat"), need("zeta.backends.mlx.lm")

SHORT = {"train": True, "iters": 10, "save_every": 3, "batch_size": 4, "steps_per_report": 1, "steps_per_eval": 4}
COSINE = {"name": "cosine_decay", "arguments": [0.02, 10, 1e-3], "warmup": 2}
ONLY_YAML = {"lr_schedule": COSINE, "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.1}}
MOMENTS = ("after iteration 5", "in the second save", "between the files")


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Without compiled kernels, which a C++ compiler makes in seconds on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx_lm")
    tiny_chat.make_model(folder / "model")
    tiny_chat.make_model(folder / "quantised", bits=4)
    tiny_chat.make_model(folder / "wider", columns=64)
    tiny_chat.make_data(folder / "data")
    shutil.copytree(folder / "data", folder / "less")
    shutil.copy(folder / "data/valid.jsonl", folder / "less/train.jsonl")
    return folder


def command(home: Path, folder: Path, how: str, kind: str, optimizer: str, **more: Any) -> list[str]:
    """The arguments of a run of this kind of tuning, by flags, or by a YAML file alone."""
    model = home / ("quantised" if kind == "qlora" else "model")
    options = SHORT | {"model": str(model), "data": str(home / "data"), "adapter_path": str(folder), "num_layers": 1}
    options |= {"fine_tune_type": kind.removeprefix("q"), "optimizer": optimizer} | more
    ours = {"optimizer_config": {optimizer: {"betas": [0.9, 0.95], "weight_decay": 0.05}}}
    both = ONLY_YAML | (ours if optimizer in ("zeta", "eta") else {})
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(both | options if how == "yaml" else both))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "train"]
    return ["-c", str(folder / "run.yaml"), *(["--train", *flags] if how == "flags" else [])]


def losses(log: Path) -> dict[str, Any]:
    """What was reported of every iteration; it must be the same whenever it was reported again."""
    told: dict[str, Any] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        key = f"{'val' if 'val_loss' in entry else 'train'} {entry['iteration']}"
        assert told.setdefault(key, entry) == entry
    return told


def weights(folder: Path) -> dict[str, Any]:
    return dict(mx.load(str(folder / "adapters.safetensors")))


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


CASES = [(kind, *how) for kind in ("lora", "dora", "qlora", "full") for how in (("zeta", "flags"), ("eta", "yaml"))]


@pytest.mark.parametrize("kind, optimizer, how", [*CASES, ("lora", "muon", "flags")])
def test_a_run_killed_three_times_is_the_run(kind: str, optimizer: str, how: str, home: Path, tmp_path: Path) -> None:
    summed = {"grad_accumulation_steps": 2} if kind == "dora" else {}  # so that files are written halfway
    run = partial(command, home, how=how, kind=kind, optimizer=optimizer, **summed)
    compiled = (kind, optimizer) == ("full", "zeta")
    start = partial(killed_runs.is_killed, killed_runs.mlx_lm)
    assert not start("never", tmp_path / "whole.log", compiled, run(folder=tmp_path / "whole"))

    killed = tmp_path / "killed"
    assert start(MOMENTS[0], tmp_path / "log", compiled, run(folder=killed))
    again = run(folder=killed, resume_adapter_file=str(killed / "adapters.safetensors"))
    for moment in MOMENTS[1:]:
        assert start(moment, tmp_path / "log", compiled, again)
    assert not start("never", tmp_path / "log", compiled, again)

    whole = losses(tmp_path / "whole.log")
    assert losses(tmp_path / "log") == whole and len(whole) == 10 + 4
    assert whole["train 10"]["train_loss"] < whole["train 1"]["train_loss"]
    assert len({entry["learning_rate"] for key, entry in whole.items() if "train" in key}) > 3
    assert_same(weights(killed), weights(tmp_path / "whole"))
    assert json.loads((killed / "adapter_config.json").read_text())["optimizer"] == optimizer


@pytest.fixture(scope="module")
def saved(home: Path) -> Path:
    """The folder of a run of Zeta's with LoRA that has ended."""
    assert run(command(home, home / "saved", "flags", "lora", "zeta", iters=4)) == 0
    return home / "saved"


def run(arguments: list[str]) -> int:
    return cli.main(["mlx-lm", "lora", *arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".yaml"}


def cut(folder: Path) -> None:
    state = folder / "adapters.state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])


def lose(folder: Path) -> None:
    (folder / "adapters.state.safetensors").unlink()


UNKNOWN = {"optimizer_config": {"zeta": {"momentum": 0.9}}}
RANKED = {"lora_parameters": {"rank": 2, "scale": 8.0, "dropout": 0.1}}
WRONG: dict[str, tuple[dict[str, Any], str, Callable[[Path], None]]] = {  # options, message, damage
    "name": (
        {"optimizer": "zeeta"},
        "the optimizer is 'zeeta', but must be one of adam, .*, zeta, .*, eta, .*, schattor$",
        content,
    ),
    "schedule": ({"lr_schedule": {"name": "cosine"}}, "lr_schedule: ", content),
    "words": ({"optimizer_config": {"zeta": [1]}}, "optimizer_config of zeta: cannot convert", content),
    "regex": (
        {"optimizer_config": {"zeta": {"overrides": {"(": "adamw"}}}},
        "optimizer_config of zeta.*unterminated",
        content,
    ),
    "dtype": ({"optimizer_config": {"zeta": {"ns_dtype": "int8"}}}, "ns_dtype is 'int8', but must be", content),
    "option": (
        UNKNOWN,
        "optimizer_config of zeta: Zeta takes no momentum: it is the first of betas",
        content,
    ),
    "lost": ({}, r"there is no .*adapters\.state\.safetensors.*: give .*, or leave the flag out", lose),
    "cut": ({}, "adapters.state.safetensors cannot be read.*: use another copy", cut),
    "optimizer": ({"optimizer": "eta"}, "of a run with optimizer zeta, and this one has eta: resume with", content),
    "their own": ({"optimizer": "adam"}, "of a run with optimizer zeta, and this one has adam: resume with", content),
    "rank": (RANKED, "with lora_parameters .*'rank': 4.* and this one has .*'rank': 2", content),
    "batch": ({"batch_size": 2}, "with batch_size 4, and this one has 2", content),
    "model": ({"model": "wider"}, "lora_a has shape .*, but the model's .*: it belongs to another model", content),
    "data": ({"data": "less"}, "with examples 21, and this one has 17", content),
    "iterations": ({"iters": 3}, "is of iteration 4 already: --iters 3 must be at least that", content),
}


ONLY_IN_YAML = ("option", "rank", "schedule", "words", "regex", "dtype")  # mlx-lm has no flag for these


@pytest.mark.parametrize(
    "mistake, how", [(m, how) for m in WRONG for how in ("flags", "yaml") if how == "yaml" or m not in ONLY_IN_YAML]
)
def test_a_mistake_is_one_line_and_costs_nothing(
    mistake: str, how: str, home: Path, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, message, damage = WRONG[mistake]
    folder = tmp_path / "adapters"
    shutil.copytree(saved, folder)
    damage(folder)
    before = content(folder)
    given = {key: str(home / value) if key in ("model", "data") else value for key, value in options.items()}
    given = {"optimizer": "zeta", "resume_adapter_file": str(folder / "adapters.safetensors"), **given}
    arguments = command(home, folder, how, "lora", **given)
    capfd.readouterr()
    assert run(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("zeta mlx-lm lora: ") and re.search(message, line), line
    assert mistake == "data" or content(folder) == before
    assert lora.train is trainer.train and "range" not in vars(trainer)


def other_chain(args: Any) -> None:
    """An mlx-lm that makes its optimizers elsewhere."""


@pytest.mark.parametrize("module, name", [(lora, "main"), (lora, "train_model"), (trainer, "train")])
def test_an_mlx_lm_whose_seams_have_moved_is_refused(
    module: Any, name: str, home: Path, saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(saved)
    monkeypatch.setattr(module, name, other_chain)
    assert run(command(home, saved, "flags", "lora", "zeta")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"mlx_lm.{'lora' if module is lora else 'tuner.trainer'}.{name}" in line
    assert "known are 0.31.1 to 0.32.2" in line and content(saved) == before


def test_help_tells_what_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and told.startswith("usage: zeta mlx-lm lora")
    assert "All of mlx_lm.lora's flags" in told and "--resume-adapter-file takes up both" in told
    assert all(name in told for name in ("zeta", "eta", "normuon", "--grad-checkpoint", "optimizer_config"))


def test_mlx_lms_own_optimizers_are_its_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {name: command(home, tmp_path / name, "flags", "lora", "muon", iters=4) for name in ("ours", "theirs")}
    assert run(arguments["ours"]) == 0
    monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", *arguments["theirs"]])
    lora.main()
    assert_same(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))


def test_weights_of_another_moment_are_named(home: Path, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = home / "mixed"
    shutil.copytree(saved, folder)
    shutil.copy(folder / "0000003_adapters.safetensors", folder / "adapters.safetensors")
    file = folder / "adapters.safetensors"
    assert run(command(home, folder, "flags", "lora", "zeta", iters=4, resume_adapter_file=str(file))) == 0
    assert f"{file} is not of the moment of " in capfd.readouterr().err
    for name in ("adapters.safetensors", "adapters.state.safetensors"):  # no iteration was left
        (now, header), (before, written) = (mx.load(str(at / name), return_metadata=True) for at in (folder, saved))
        assert_same(now, before)
        assert header == written


def test_moments_that_are_lost_are_seen(home: Path, saved: Path) -> None:
    """The control: a resume without the optimizer's state ends elsewhere."""
    folder, name = home / "forgotten", "0000003_adapters.state.safetensors"
    shutil.copytree(saved, folder)
    more = {"iters": 4, "resume_adapter_file": str(folder / "0000003_adapters.safetensors")}
    arrays, header = mx.load(str(folder / name), return_metadata=True)
    for factor in (1, 0):
        moments = {key: a * factor if key.startswith("optimizer.exp_avg.") else a for key, a in arrays.items()}
        mx.save_safetensors(str(folder / name), moments, header)
        assert run(command(home, folder, "flags", "lora", "zeta", **more)) == 0
        now, before = weights(folder), weights(saved)
        assert all(mx.array_equal(now[key], before[key]) for key in before) == bool(factor)


PAGE = (Path(__file__).parent.parent / "examples/mlx-lm.md").read_text()


def test_the_pages_commands_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for a tiny model and few iterations; what follows in a list of flags wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(home / "wider"))
    monkeypatch.setenv("DATA", str(home / "data"))
    Path("full.yaml").write_text(*re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks[1:]).replace("\\\n", "").splitlines()  # the first block installs and names the model
    short = {0: ["--iters=2", "--num-layers=1"], 1: ["--iters=4", "--num-layers=1"], 5: ["--iters=2"]}
    for i, line in enumerate(lines):
        program, *arguments = shlex.split(os.path.expandvars(line))
        monkeypatch.setattr(sys, "argv", [program, *arguments, *short.get(i, [])])
        assert not (cli if program == "zeta" else need(program)).main()
    assert len(lines) == 7 and Path("full/adapters.state.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind, column", [("Zeta", 2), ("Eta", 3)])
def test_the_pages_arithmetic_of_memory(kind: str, column: int, dtype: str) -> None:
    (row,) = (line.split("|")[2:] for line in PAGE.splitlines() if line.startswith(f"| trained, {dtype}"))
    shape, names = (64, 192), [f"layers.{i}.proj.weight" for i in range(8)]
    params = {name: mx.random.normal(shape).astype(getattr(mx, dtype)) for name in names}
    optimizer = getattr(need("zeta.backends.mlx"), kind)(learning_rate=1e-3)
    for _ in range(2):
        after = optimizer.apply_gradients(params, params)
        mx.eval(after, optimizer.state)
    size, kept = 8 * 64 * 192, sum(value.nbytes for name in names for value in optimizer.state[name].values())
    assert kept == size * int(row[column])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(optimizer.apply_gradients(params, params), optimizer.state)
    claimed = re.search(r"at most (\d+)\s+bytes for each trained weight", PAGE)
    assert claimed and mx.get_peak_memory() - before < size * int(claimed[1])
