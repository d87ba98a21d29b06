"""`zeta bench` as a user and as a machine see it, on tiny shapes; and the reports of devices that are kept."""

import json
import re
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from typing import Any

import pytest

from zeta import cli
from zeta.bench import measure, model, tables
from zeta.bench.report import gate_of

BENCH = Path(__file__).parent.parent / "bench"
DEVICES = sorted((BENCH / "devices").glob("*.json"))
PRINTED = {  # the first cell of a table's head -> what its rows, so many, are lines of
    "CUDA": ("nvidia-h100-torch.txt", 16),
    "float32, torch, cpu": ("amd-epyc-avx512-torch.txt", 8),
    "bfloat16, torch, cpu": ("amd-epyc-avx512-torch.txt", 8),
    "errors, bfloat16": ("amd-epyc-avx512-torch.txt", 16),
    "torch, cpu": ("amd-epyc-avx512-torch.txt", 6),
    "MLX, cpu": ("amd-epyc-avx512-mlx.txt", 7),
    "MLX, cpu, compiled": ("amd-epyc-avx512-mlx.txt", 4),
    "model": ("any.txt", 5),
    "rows": ("any.txt", 4),
    "routers by": ("any.txt", 3),
}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w.])")
TINY = tables.Sizes(
    matrices=[(2, 8, 8), (1, 8, 24)],
    gpt=(1, 8, 32),
    lm=model.Config(vocab=16, context=8, layers=1, width=16, heads=2, kv_heads=1),
    batch=2,
)
LIBRARIES = {"torch": "torch", "mlx": "mlx.core"}


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch, mlx_device):
    pytest.importorskip(LIBRARIES[request.param])
    monkeypatch.setattr(tables, "SIZES", dict.fromkeys(tables.SIZES, TINY))
    return request.param


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for key in ("newton_schulz", "step", "training_step") for row in report[key]["rows"]]


def test_json_is_read_back(library, capsys):
    assert cli.main(["bench", "--json", "--backend", library, "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["library"].startswith(f"{library} ") and report["machine"]["device"] == "cpu"
    assert [row["shape"] for row in report["newton_schulz"]["rows"]] == ["2x8x8", "1x8x24"]
    for key in ("step", "training_step"):
        assert [row["optimizer"].split()[0] for row in report[key]["rows"]] == ["Zeta", "Muon", "AdamW"]
    numbers = [value for row in rows(report) for value in row.values() if not isinstance(value, str)]
    assert numbers and all(isfinite(value) and value >= 0 for value in numbers)
    assert all(0 < row["error"] < 0.1 for row in report["newton_schulz"]["rows"])
    assert all(0 < row["share"] < 1 for row in report["training_step"]["rows"])
    assert report["line"].startswith(f"zeta {report['zeta']}, {report['machine']['library']} on cpu")


def test_a_cpu_that_emulates_bfloat16_is_compared_in_float32(monkeypatch, capsys):
    pytest.importorskip("torch")
    from zeta.bench import on_torch

    monkeypatch.setattr(tables, "SIZES", dict.fromkeys(tables.SIZES, TINY))
    monkeypatch.setattr(on_torch, "CPU_HAS_BFLOAT16", False)
    assert cli.main(["bench", "--json", "--backend", "torch", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"]["rows"][1]["optimizer"] == "Muon in float32 + AdamW"
    assert all(row["Muon in float32's error"] < 1e-4 for row in report["newton_schulz"]["rows"])


def test_the_tables_end_with_the_line_to_paste(library, capsys):
    assert cli.main(["bench", "--backend", library, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    emulated = library == "torch" and not import_module("zeta.bench.on_torch").CPU_HAS_BFLOAT16
    for word in (
        "Newton-Schulz",
        "One step of a GPT",
        "Training step",
        "error",
        "transient MiB",
        "share",
        "Muon in float32 + AdamW" if emulated else "Muon + AdamW",
    ):
        assert word in out
    assert out.splitlines()[-1].startswith("zeta ") and "share of a training step: Zeta" in out.splitlines()[-1]


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_refused_in_a_line(device, capsys):
    torch = pytest.importorskip("torch")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "--backend", "torch", "--device", device])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and f"no device '{device}'" in error.replace("cuda:0", "cuda") and "--device" in error


def test_no_round_begins_after_the_time_is_over():
    turns = dict.fromkeys(["a", "b"], 0)

    def turn(name: str) -> None:
        turns[name] += 1

    measure.medians({name: lambda name=name: turn(name) for name in turns}, rounds=5, seconds=0)
    assert turns == {"a": 2, "b": 2}  # one to warm up, and one that counts
    measure.medians({name: lambda name=name: turn(name) for name in turns}, rounds=5)
    assert turns == {"a": 8, "b": 8}


class Gpu:
    """A device on which the kernel is faster at 1024 rows and from 4096: its contenders return their seconds."""

    def symmetric_products(self):
        for n, seconds in [(512, 1.0), (1024, 3.0), (2048, 1.0), (4096, 3.0)]:
            yield n, {"Triton": lambda: 2.0, "cuBLAS": lambda seconds=seconds: seconds}


def test_the_kernels_gate_is_where_it_stays_faster(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(measure, "timed", lambda run: run())
    rows = tables.symmetric_products(Gpu(), rounds=3)
    assert tables.gate(rows) == 4096 and tables.gate(rows[:3]) == inf and tables.gate(rows[1:2]) == 1024
    machine = {"name": "NVIDIA Some", "library": "torch 9"}
    report = {"zeta": "1", "machine": machine, "symmetric_products": {"rows": rows}}
    assert str(gate_of(report)) == "Gate(name='NVIDIA Some', rows=4096, source='zeta bench 1, torch 9')"


@pytest.mark.parametrize("file", DEVICES, ids=[file.stem for file in DEVICES])
def test_kept_reports_are_whole(file):
    report = json.loads(file.read_text())
    assert {"zeta", "machine", "newton_schulz", "step", "training_step", "line"} <= report.keys()
    assert len(rows(report)) >= 9 and file.stem.endswith(report["machine"]["library"].split()[0])
    assert f"- {report['line']}" in " ".join((file.parents[1] / "README.md").read_text().split())


def shows(line: str, word: str) -> bool:
    """Whether a number of the line is this one, rounded."""
    style = ".1e" if "e" in word else f",.{len(word.partition('.')[2])}f"
    printed = [float(number.replace(",", "")) for number in NUMBER.findall(line)]
    return word in {format(x * (1 + nudge), style) for x in printed for nudge in (0, 1e-9)}


@pytest.mark.parametrize("head", PRINTED)
def test_a_tables_row_is_of_a_line_that_was_printed(head):
    file, count = PRINTED[head]
    lines = (BENCH / "devices" / file).read_text().split("\n")
    tables = (BENCH / "README.md").read_text().split("\n\n")
    rows = [row for table in tables if table.startswith(f"| {head} |") for row in table.split("\n")[2:]]
    assert len(rows) == count
    for row in rows:
        shown = NUMBER.findall(" ".join(row.split("|")[2:]).replace("*", ""))
        assert shown and any(all(shows(line, word) for word in shown) for line in lines), row


def test_there_are_reports_of_both_libraries():
    assert {json.loads(file.read_text())["machine"]["library"].split()[0] for file in DEVICES} == {"torch", "mlx"}
