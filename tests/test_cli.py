"""`zeta parity` as a user and as a machine see it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_models

import zeta.routing.model
from zeta import cli
from zeta.parity import targets as machine
from zeta.parity.targets import Absent, Target, numpy_target


@pytest.fixture
def only_numpy(monkeypatch):
    """A machine with NumPy in float64 and nothing else: the suite itself runs in test_parity."""
    here = [numpy_target("float64"), Absent("torch", "cpu", "not installed")]
    monkeypatch.setattr(machine, "targets", lambda: iter(here))
    return here


def test_prints_a_table_and_what_was_skipped(only_numpy, capsys):
    assert cli.main(["parity"]) == 0
    out, err = capsys.readouterr()
    for word in ("backend", "device", "dtype", "check", "error", "bound", "verdict", "numpy", "float64", "ok"):
        assert word in out
    assert "all within bounds" in out and "FAIL" not in out
    assert "skipped: torch cpu (not installed)" in err


def test_verbose_has_a_line_for_every_check(only_numpy, capsys):
    assert cli.main(["parity", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "newton-schulz: condition 1e+06 long" in out
    counts = out.partition("Checks through each path")[2]
    assert "core" in counts and "+45" in counts


def test_json_is_a_list_of_objects_with_exactly_these_keys(only_numpy, capsys):
    assert cli.main(["parity", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results) > 50
    for result in results:
        assert list(result) == ["library", "device", "dtype", "check", "error", "bound", "ok", "paths"]
        assert result["ok"] is True and 0 <= result["error"] <= result["bound"]


@pytest.mark.parametrize("control", ["coefficient", "transpose", "axis", "bias", "rule"])
def test_controls_end_with_status_1(only_numpy, control, capsys):
    assert cli.main(["parity", "--control", control]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_control_of_a_path_that_nothing_has_is_refused(only_numpy, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["parity", "--control", "restart"])
    assert exit.value.code == 2 and "--control restart" in capsys.readouterr().err


def test_every_control_is_offered(capsys):
    from zeta.parity.mistakes import CONTROLS

    with pytest.raises(SystemExit):
        cli.main(["parity", "--help"])
    assert f"{{{','.join(CONTROLS)}}}" in "".join(capsys.readouterr().out.split())


def test_what_is_known_to_be_absent_is_left_out_and_other_absences_are_named(only_numpy, capsys):
    only_numpy.append(Absent("mlx", "gpu", "this is an Apple machine, but MLX would run on its CPU", expected=True))
    assert cli.main(["parity", "--without", "mlx:gpu"]) == 0
    assert "skipped: torch cpu" in capsys.readouterr().err
    assert cli.main(["parity", "--without", "mlx:gpu", "--without", "torch:cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_a_note_is_told_beside_the_table(only_numpy, capsys):
    only_numpy[0] = replace(only_numpy[0], note="training rounds otherwise")
    assert cli.main(["parity", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "note: numpy cpu float64: training rounds otherwise" in err


def test_a_path_that_no_check_takes_is_a_failure(only_numpy, capsys):
    only_numpy[0] = replace(only_numpy[0], paths=("core", "gram", "adamw"))
    assert cli.main(["parity", "--verbose"]) == 1
    assert "no check went through gram" in capsys.readouterr().out


def test_a_check_that_raises_is_a_failure_and_no_traceback(only_numpy, capsys):
    def broken(x, coefficients):
        raise RuntimeError("no such kernel")

    only_numpy[0] = replace(only_numpy[0], newton_schulz=broken)
    assert cli.main(["parity", "--json"]) == 1
    failed = [r for r in json.loads(capsys.readouterr().out) if not r["ok"]]
    assert any("no such kernel" in r["check"] and r["error"] is None for r in failed)


def test_an_apple_machine_whose_mlx_runs_on_the_cpu_is_a_failure(only_numpy, capsys):
    only_numpy.append(Absent("mlx", "gpu", "this is an Apple machine, but MLX would run on its CPU", expected=True))
    assert cli.main(["parity"]) == 1
    assert "Apple" in capsys.readouterr().out


def test_plot_writes_a_picture(only_numpy, tmp_path, capsys):
    file = tmp_path / "parity.png"
    assert cli.main(["parity", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["parity", "--nonsense"],
        ["routing"],
        ["parity", "--control", "nonsense"],
        ["parity", "--plot", "/no/such/folder/x.png"],
        ["parity", "--plot", "x.xyz"],
        ["parity", "--without", "mlx:tpu"],
        ["inspect", "x", "--plot", "x.xyz"],
        ["convert", "/no/such/folder", "x.safetensors"],
    ],
)
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("zeta") and "--help" in error


WITNESSES = Path(__file__).with_name("witnesses")


@pytest.mark.parametrize("damage", ["none", ".metadata", "__0_0.distcp", "__1_0.distcp", "zeta.json"])
@pytest.mark.parametrize("how", ["junk", "gone"])
def test_a_damaged_folder_is_not_converted(damage, how, tmp_path, capsys):
    pytest.importorskip("torch")
    folder, file = tmp_path / "saved", tmp_path / "one.safetensors"
    shutil.copytree(WITNESSES / "sharded", folder)
    if damage == "none":
        assert cli.main(["convert", str(folder), str(file)]) == 0
        return
    (folder / damage).unlink()
    if how == "junk":
        (folder / damage).write_text("junk")
    with pytest.raises(SystemExit) as exit:
        cli.main(["convert", str(folder), str(file)])
    assert exit.value.code == 2 and not file.exists()
    said = capsys.readouterr().err.splitlines()[-1]
    unlike = how == "gone" and "distcp" not in damage
    assert f"{folder} {'is no checkpoint of save_sharded' if unlike else 'cannot be read, and may be damaged'}" in said


@pytest.mark.parametrize(
    "name, message",
    [
        ("sharded", "make one file of it, zeta convert"),
        ("portable-Shampoo.safetensors", "no matrix has both moments"),
        ("torch-Zeta.pt", "no safetensors file"),
        ("mlx-Zeta.safetensors", "no checkpoint of zeta's"),
        ("binary.jsonl", "binary.jsonl is no inspect.jsonl"),
    ],
)
def test_what_inspect_cannot_show_is_called_what_it_is(name, message, tmp_path, capsys):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\n")
    path = tmp_path / name if name == "binary.jsonl" else WITNESSES / name
    with pytest.raises(SystemExit) as exit:
        cli.main(["inspect", str(path)])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_library_that_cannot_be_imported_is_a_failure_beside_the_others(monkeypatch):
    def broken():
        raise ImportError("libmlx.so is missing")
        yield

    monkeypatch.setattr(machine, "_mlx", broken)
    found = [target for target in machine.targets() if target.library in ("mlx", "numpy")]
    assert [type(target) for target in found] == [Target, Target, Absent]
    assert found[-1] == Absent("mlx", "cpu", "libmlx.so is missing", expected=True)


def test_the_installed_command_runs():
    out = subprocess.run(
        [sys.executable, "-c", "import zeta.cli; zeta.cli.main(['parity', '--help'])"], capture_output=True
    )
    assert out.returncode == 0 and b"--control" in out.stdout


def test_routing_prints_every_parameter_of_a_function_s_model(capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.ModuleDict({'lm_head': nn.Linear(3, 5), 'c_attn': nn.Linear(4, 12)})\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["routing", "my_model:make"]) == 0
    out = capsys.readouterr().out
    head, bias, fused, _ = [line for line in out.splitlines() if "weight" in line or "bias" in line]
    assert all(word in head for word in ("lm_head.weight", "5x3", "adamw", "output head"))
    assert all(word in bias for word in ("lm_head.bias", "vector"))
    assert all(word in fused for word in ("c_attn.weight", "12x4", "zeta", "3x4x4", "0.2 lr", "query, key, value"))
    rest = 8 * (15 + 5 + 12) + 4 * 3  # AdamW's moments and counts
    state = {"Zeta": rest + 8 * 48, "Eta": rest + 4 * 48, "AdamW": 8 * (15 + 5 + 12 + 48)}
    assert "State: " + ", ".join(f"{name} {count / 1000:.2f} kB" for name, count in state.items()) in out


def test_routing_of_a_config(capsys, tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 1,
        "n_embd": 768,
        "vocab_size": 50257,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["routing", str(tmp_path / "config.json")]) == 0
    assert "1x768x768 + 1x768x768 + 1x768x768" in capsys.readouterr().out


@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_routing_of_a_folder_in_either_library(capsys, tmp_path, library):
    """Layers alike stand once, unless all are asked for; a sum says what goes where."""
    pytest.importorskip("transformers" if library == "torch" else "mlx_lm")
    config = small_models.MLX_LLAMA | dict(model_type="llama", architectures=["LlamaForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=False)))
    command = ["routing", str(tmp_path), "--library", library]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj.weight x2" in out
    assert "to Zeta as 14 matrices" in out and "no doubts" in out
    assert cli.main([*command, "--all"]) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    up = next(row for row in json.loads(capsys.readouterr().out) if "up_proj" in row["name"])
    assert (up["count"], up["shape"], up["matrices"]) == (2, [48, 32], [[1, 48, 32]])


def test_routing_says_that_a_config_has_no_head(capsys, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(small_models.LLAMA | dict(model_type="llama")))
    assert cli.main(["routing", str(tmp_path)]) == 0
    assert "LlamaModel has no output head" in capsys.readouterr().err


def test_routing_knows_that_mlx_lm_s_head_may_be_the_embedding(capsys, tmp_path):
    pytest.importorskip("mlx_lm")
    config = small_models.MLX_LLAMA | dict(model_type="llama", tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["routing", str(tmp_path), "--library", "mlx"]) == 0
    assert not capsys.readouterr().err


def test_routing_takes_mlx_lm_s_model_where_torch_is_not_installed(monkeypatch):
    monkeypatch.setattr(zeta.routing.model, "find_spec", lambda name: None if name == "torch" else name)
    assert zeta.routing.model._installed() == "mlx"


def test_routing_reports_what_is_ambiguous_and_fails(capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "fused.py").write_text(
        "from torch import nn\nmodel = nn.ModuleDict({'query_key_value': nn.Linear(4, 12)})\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["routing", "fused:model"]) == 1
    assert "ambiguous: query_key_value.weight fuses" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        "nonsense",
        "no.such.module:f",
        "zeta:no_such_function",
        "/no/such/config.json",
        "fractions:Fraction",  # makes something without parameters
        "zeta:update",  # needs arguments
    ],
)
def test_routing_of_no_model_ends_with_status_2(model, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["routing", model])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("zeta ")


def test_alone_it_shows_what_to_run_first(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("zeta parity")


def test_version(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"zeta {version('zeta-optim')}\n"


def test_inspect_takes_the_only_checkpoint_of_a_folder(tmp_path):
    from zeta.whitening.report import _in_folder

    assert _in_folder(tmp_path).name == "checkpoint.safetensors"
    (tmp_path / "mine.safetensors").touch()
    assert _in_folder(tmp_path).name == "mine.safetensors"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ValueError, match=r"several checkpoints, such as mine\.safetensors: name one"):
        _in_folder(tmp_path)
