"""Every diagnostic on a matrix whose answer is known in closed form, with a control that must give another one."""

import json
import re
from math import exp, sqrt
from pathlib import Path

import numpy as np
import plot
import pytest
import train_lm
from matplotlib.text import Text
from trainer.loop import learning_rate

from zeta import checkpoint, cli, core
from zeta.coefficients import polynomial
from zeta.core import COEFFICIENTS, Hyper
from zeta.routing.layout import Route
from zeta.whitening import plot as portrait
from zeta.whitening.measures import examine, inspect, read_series
from zeta.whitening.uniformity import chi_square_tail, evenness

JORDAN = COEFFICIENTS["jordan"]


def hadamard(n):
    """Orthogonal rows, every entry 1 or -1."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def state(name="layers.0.up.weight", m=None, v=None, w=None):
    m = np.eye(8) if m is None else m
    v, w = np.ones_like(m) if v is None else v, np.ones_like(m) if w is None else w
    moments = {"exp_avg": m, "exp_avg_sq": v}
    return {name: w} | {f"optimizer.{key}.{name}": array for key, array in moments.items()}


def look(m, v=None, coefficients=JORDAN):
    """(before, after) of one matrix."""
    (record,) = inspect(state(m=m, v=v), lr=1e-2, coefficients=coefficients)
    return record["before"], record["after"]


@pytest.mark.parametrize(
    "x, freedom, p", [(3.841459, 1, 0.05), (18.307038, 10, 0.05), (124.342113, 100, 0.05), (10.827566, 1, 0.001)]
)
def test_the_tail_of_chi_square_is_the_tables(x, freedom, p):
    assert chi_square_tail(x, freedom) == pytest.approx(p, rel=1e-6)
    assert chi_square_tail(x, freedom + 1) != pytest.approx(p, rel=1e-2)
    assert chi_square_tail(x, 2) == pytest.approx(exp(-x / 2), rel=1e-14)
    assert chi_square_tail(0, freedom) == 1


def test_large_rows_are_uneven_rows_and_even_columns():
    x = np.ones((4, 6))
    x[:2] *= -10
    found = evenness(x)
    assert found["rows"][:2] == (24, 3) and found["rows"].effect == sqrt(21 / 24)  # chi2 is the number of entries
    assert found["rows"].p == pytest.approx(chi_square_tail(24, 3)) and found["rows"].p < 1e-4
    assert found["cols"] == (0, 5, 1, 0)
    assert evenness(x.T)["cols"] == found["rows"]


def test_a_checkerboard_of_blocks_has_even_rows_and_columns():
    x = 1 + np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((3, 5)))
    found = evenness(x)
    assert found["rows"].chi2 == found["cols"].chi2 == 0 and found["blocks"][:2] == (24 * 40, 63)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_ties_and_zeros_hide_nothing(share):
    x = np.zeros((8, 5))
    x[: int(8 * share)] = 1
    assert evenness(x)["rows"].chi2 == pytest.approx(40) and evenness(x)["cols"].chi2 == 0
    for alike in (np.zeros((4, 4)), hadamard(4), np.ones((1, 7))):
        assert all(one.effect == 0 and one.p == 1 for one in evenness(alike).values())


def test_chance_gives_a_mean_of_one_a_degree_of_freedom_and_no_effect(rng):
    samples = [evenness(rng.standard_normal((32, 48)))["rows"] for _ in range(200)]
    assert np.mean([one.chi2 / one.freedom for one in samples]) == pytest.approx(1, abs=0.08)  # four errors of the mean
    assert np.mean([one.p < 0.05 for one in samples]) < 0.12 and np.mean([one.effect for one in samples]) < 0.05
    scaled = [evenness(np.exp(rng.standard_normal((32, 1))) * rng.standard_normal((32, 48)))["rows"] for _ in range(20)]
    assert all(one.p < 1e-6 and one.effect > 0.3 for one in scaled)


def test_known_singular_values_give_condition_error_and_share(rng):
    q, r = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (12, 20))
    s = np.geomspace(1, 1e-4, 12)
    before, after = look((q * s) @ r[:12], np.full((12, 20), 4.0))
    p = polynomial(s / np.linalg.norm(s), JORDAN)
    for view in (before, after):  # an even V changes the size alone
        assert view["rank"] == 12 and view["condition"] == pytest.approx(1e4)
        assert view["spectrum"][0] / view["spectrum"][-1] == pytest.approx(1e4)
        assert view["error"] == pytest.approx(sqrt(np.mean((p - 1) ** 2)), rel=1e-9)
        assert view["left"] == np.mean(p < 0.5) > 0
        assert view["cosine"] == pytest.approx(p.sum() / (np.linalg.norm(p) * sqrt(12)), rel=1e-9)
    off = tuple((1.01 * a, b, c) for a, b, c in JORDAN)
    assert look((q * s) @ r[:12], coefficients=off)[0]["error"] != pytest.approx(before["error"], rel=1e-3)


def test_whitening_undoes_scales_of_rows_and_columns():
    """M = diag(r) H diag(c) / 4 and V = M * M: X is H, of which every number is known."""
    n, r, c = 16, 2.0 ** np.arange(16)[:, None], 3.0 ** -(np.arange(16) % 4)[None]
    m = r * hadamard(n) / 4
    before, after = look(m, m**2)
    assert before["condition"] == pytest.approx(2**15) and after["condition"] == pytest.approx(1, abs=1e-5)
    assert before["rows"]["effect"] > 0.9 and after["rows"]["effect"] == 0
    assert after["error"] == pytest.approx(abs(polynomial(0.25, JORDAN) - 1), rel=1e-5)
    assert after["cosine"] == pytest.approx(1)  # scaled rows leave H the polar factor of both
    both = look(m * c, (m * c) ** 2)[1]
    assert both["condition"] == pytest.approx(1, abs=1e-3) and both["cosine"] < 0.9  # now the target moves


def test_whitening_an_orthogonal_momentum_spoils_it(rng):
    """The control: a V without row and column structure raises the condition number that was one."""
    before, after = look(hadamard(64) / 8, np.exp(2 * rng.standard_normal((64, 64))))
    assert before["condition"] == pytest.approx(1) and before["left"] == 0 and before["cosine"] == pytest.approx(1)
    assert after["condition"] > 3 and after["cosine"] < 0.95


def test_of_low_rank_what_is_rounding_is_left_out(rng):
    m = (rng.standard_normal((24, 3)) @ rng.standard_normal((3, 40))).astype(np.float32)
    before, after = look(m, (1 + rng.random((24, 40))).astype(np.float32))
    assert before["rank"] == 3 and before["condition"] < 100 and before["left"] == 0
    assert after["rank"] == 24  # the quotient of two matrices has any rank
    assert look(np.outer(np.arange(1, 9), np.ones(6)))[0]["spectrum"] == pytest.approx([1] * 33)


def test_a_fused_parameter_is_shown_as_the_matrices_that_it_holds():
    parts = [np.eye(6) * [1, 1, 1, 1, 1, k] for k in (2, 4, 8)]
    m = np.stack(parts, axis=1).reshape(18, 6)  # their rows take turns
    fused = {"a.weight": Route("zeta", (1, 18, 6), "", (1, 1, 1), -2, 6)}
    found = list(inspect(state("a.weight", m), lr=1.0, routes=fused))
    assert [one["matrix"] for one in found] == ["a[0]", "a[1]", "a[2]"]
    assert [one["before"]["condition"] for one in found] == pytest.approx([2, 4, 8])
    whole = list(inspect(state("a.weight", m), lr=1.0))
    assert len(whole) == 1 and whole[0]["before"]["condition"] != pytest.approx(8)
    stack = list(inspect(state("b.qkv.weight", np.concatenate(parts)), lr=1.0))  # by its name
    assert [one["before"]["condition"] for one in stack] == pytest.approx([2, 4, 8])


def test_the_change_is_the_step_that_zeta_takes(rng):
    w, g = rng.standard_normal((2, 12, 20))
    hyper = Hyper(lr=0.02, weight_decay=0)
    new, moments = core.update(g, core.init(w), w, hyper)
    found = examine(moments["exp_avg"], moments["exp_avg_sq"], w, hyper.lr, hyper.eps, JORDAN)
    assert found["change"] == pytest.approx(np.linalg.norm(new - w) / np.linalg.norm(w), rel=1e-6)
    assert found["update_rms"] == pytest.approx(sqrt(np.mean((new - w) ** 2)), rel=1e-6)
    assert found["weight_rms"] == pytest.approx(sqrt(np.mean(w**2)))
    u = core.newton_schulz(moments["exp_avg"] / (np.sqrt(moments["exp_avg_sq"]) + hyper.eps))
    polar = np.linalg.svd(moments["exp_avg"], full_matrices=False)
    cosine = np.sum(u * (polar[0] @ polar[2])) / (np.linalg.norm(u) * sqrt(12))
    assert found["after"]["cosine"] == pytest.approx(cosine, rel=1e-9)


def test_what_has_no_answer_is_left_out_or_refused():
    idle, busy = state("experts.0.up.weight", np.zeros((4, 4))), state("experts.1.up.weight", np.eye(4))
    assert [one["matrix"] for one in inspect(idle | busy, lr=1.0)] == ["experts.1.up"]
    with pytest.raises(ValueError, match="both moments"):
        list(inspect({"a.weight": np.eye(4), "optimizer.momentum_buffer.a.weight": np.eye(4)}, lr=1.0))
    with pytest.raises(ValueError, match="a or its moments hold NaN"):
        list(inspect(state("a.weight", np.full((4, 4), np.nan)), lr=1.0))
    for lost in ("a.weight", "optimizer.exp_avg.a.weight"):
        rest = {name: array for name, array in state("a.weight", np.eye(4)).items() if name != lost}
        with pytest.raises(ValueError, match=f"but no \\['{lost}'\\]"):
            list(inspect(rest, lr=1.0))
    with pytest.raises(ValueError, match="lr is nan"):
        list(inspect(busy, lr=float("nan")))


@pytest.fixture
def run(tmp_path, rng):
    """A run's folder with a checkpoint: three matrices and what goes to AdamW."""
    arrays, shapes = {}, {"layers.1.up": (16, 8), "layers.10.up": (8, 8), "layers.2.up": (8, 8)}
    for name, shape in {**shapes, "layers.1.norm": (8,), "embed": (9, 8)}.items():
        arrays |= state(f"{name}.weight", *(rng.standard_normal((3, *shape)).astype(np.float32) ** 2))
    checkpoint.save(tmp_path / "checkpoint.safetensors", arrays, {"lr": 0.01, "step": 7})
    return tmp_path


def test_the_command_prints_tables(run, capsys):
    assert cli.main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    for word in ("step 7", "layers.*", "1.up", "2.up", "16x8", "uneven rows", "cosine to polar(M)", "of 3", "p < 0.05"):
        assert word in out
    assert "norm" not in out and "embed" not in out


def test_json_is_what_inspect_gives_and_knows_the_rate(run, capsys):
    assert cli.main(["inspect", str(run / "checkpoint.safetensors"), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    arrays, _ = checkpoint.load(run / "checkpoint.safetensors")
    want = {record["matrix"]: record for record in inspect(arrays, lr=0.01, step=7)}
    assert [record["matrix"] for record in records] == ["layers.1.up", "layers.2.up", "layers.10.up"]
    assert all(record == json.loads(json.dumps(want[record["matrix"]])) for record in records)
    assert cli.main(["inspect", str(run), "--json", "--lr", "0.02"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["change"] == pytest.approx(2 * records[0]["change"])


def test_a_series_comes_before_the_checkpoint_and_is_drawn_over_time(run, capsys):
    arrays, _ = checkpoint.load(run / "checkpoint.safetensors")
    assert cli.main(["inspect", str(run), "--plot", str(run / "state.png")]) == 0
    lines = [json.dumps(record) for step in (3, 5) for record in inspect(arrays, lr=0.01, step=step)]
    (run / "inspect.jsonl").write_text("\n".join([*lines, '{"step": 9, "cut sh']))
    assert cli.main(["inspect", str(run), "--plot", str(run / "maps.png")]) == 0
    assert "step 5" in capsys.readouterr().out
    for name in ("state.png", "maps.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_show_each_side_where_they_say_and_name_every_axis(run):
    arrays, _ = checkpoint.load(run / "checkpoint.safetensors")
    series = [record for step in (3, 5) for record in inspect(arrays, lr=0.01, step=step)]
    state, maps = portrait.state(series[:3]), portrait.heat_maps(series)
    of_m, of_x = [[one[side]["cosine"] for one in series[:3]] for side in ("before", "after")]
    dumbbells, (*_, m, x) = state.axes[-1], maps.axes[: 2 * len(portrait.SHOWN)]
    assert of_m != of_x
    for i, (letter, axis, want) in enumerate((("M", m, of_m), ("X", x, of_x))):
        assert dumbbells.collections[1 + i].get_offsets()[:, 0].tolist() == want
        assert axis.images[0].get_array()[:, 1].tolist() == want and f"of {letter}" in axis.get_title("left")
    for figure in (state, maps):
        words = "\n".join(text.get_text() for text in figure.findobj(Text))
        assert portrait.M in words and portrait.X in words
        assert all(words.count(meaning) == 1 for meaning in portrait.SHOWN.values())
    assert all(bar.get_xlabel() for bar in maps.axes[2 * len(portrait.SHOWN) :])


def test_the_loss_s_unit_is_that_of_the_run_s_tokens(tmp_path):
    for name in ("bytes", "tokens"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokens" / "tokenizer.json").touch()
    runs = {name: tmp_path / name for name in ("bytes", "tokens")}
    assert [plot.unit({name: run}) for name, run in runs.items()] == ["byte", "token"]
    assert plot.unit(runs) == "byte or token"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none", None, "there is no checkpoint"),
        ("short.safetensors", b"nonsense", "cut short, or no safetensors"),
        ("empty.jsonl", b"", "no record yet"),
        ("other.jsonl", b"nonsense\n", "is no inspect.jsonl"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n', "is no inspect.jsonl"),
        ("list.jsonl", b"[1]\n", "is no inspect.jsonl"),
        (
            "views.jsonl",
            b'{"step": 1, "matrix": "a", "shape": [2, 2], "change": 0, "before": {}, "after": {}}\n',
            "is no",
        ),
    ],
)
def test_what_cannot_be_shown_ends_with_status_2_and_one_line(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        cli.main(["inspect", str(tmp_path / name)])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert message in err and len(re.findall(r"^(?!usage|\s)", err.rstrip("\n"), re.M)) == 1  # usage, and one line


def test_a_state_that_never_saw_a_gradient_is_told(tmp_path, capsys):
    checkpoint.save(tmp_path / "idle.safetensors", state("a.weight", np.zeros((4, 4))), {"step": 1})
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path / "idle.safetensors"), "--json"])
    assert "every gradient was zero so far" in capsys.readouterr().err


SMALL = "--layers 1 --width 16 --heads 2 --kv-heads 1 --context 16 --batch 2 --eval-every 4 --sample 0 --device cpu"


@pytest.mark.parametrize("backend, optimizer", [("torch", "zeta"), ("mlx", "zeta"), ("torch", "adamw")])
def test_a_training_run_writes_the_series_and_a_resumed_one_goes_on(tmp_path, capsys, backend, optimizer):
    pytest.importorskip("torch" if backend == "torch" else "mlx.core")
    (tmp_path / "data.txt").write_text(Path(train_lm.__file__).read_text())
    fixed = f"--data {tmp_path}/data.txt --out {tmp_path}/run --backend {backend} --optimizer {optimizer} {SMALL}"
    assert train_lm.main(f"{fixed} --steps 5 --inspect 2".split()) == 0
    assert train_lm.main(f"{fixed} --steps 8 --resume".split()) == 0  # it continues to inspect
    records = read_series(tmp_path / "run" / "inspect.jsonl")
    assert [record["step"] for record in records] == [step for step in (2, 4, 6, 8) for _ in range(7)]
    arrays, settings = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    saved = {record["matrix"]: record for record in inspect(arrays, lr=1.0)}
    for got in records[-7:]:
        for key in ("before", "after", "weight_rms"):
            assert got[key] == saved[got["matrix"]][key]
    assert records[-1]["update_rms"] == pytest.approx(0.2 * learning_rate(8, settings))
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0
    assert "step 8" in capsys.readouterr().out


def test_muon_is_refused_before_it_trains(tmp_path, capsys):
    assert train_lm.main(f"--out {tmp_path / 'run'} --optimizer muon --inspect 2 {SMALL}".split()) == 2
    assert "second moments" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_state_without_second_moments_is_told(tmp_path, capsys):
    arrays = {"a.weight": np.eye(4), "optimizer.momentum_buffer.a.weight": np.eye(4)}
    checkpoint.save(tmp_path / "muon.safetensors", arrays, {"lr": 0.01})
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path / "muon.safetensors")])
    assert "both moments" in capsys.readouterr().err
