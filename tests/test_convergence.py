"""bench/convergence.py: its search, its statistics, its runs, and that a kill costs no more than what was running."""

import sys
from importlib import import_module
from math import inf, log2
from pathlib import Path

import killed_runs
import pytest
import torch

from zeta import preconditioned
from zeta.core import Hyper

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))  # whose files import one another by name
contenders, convergence, standings = map(import_module, ("contenders", "convergence", "standings"))
main, needed, read, search, start_of = (
    getattr(convergence, name) for name in ("main", "needed", "read", "search", "start_of")
)
CONTENDERS, Setting = contenders.CONTENDERS, contenders.Setting


def bowl(lr, b1, b2):
    """A loss whose lowest setting is known; lr at log2(lr / 16e-3)."""
    return lambda s: (log2(s.lr / 16e-3) - lr) ** 2 + 30 * (s.b1 - b1) ** 2 + 3 * (s.b2 - b2) ** 2


def played(loss, optimizer="zeta", known=None):
    """All runs that search and fresh seeds ask for, where a run's outcome is `loss`."""
    known, start = dict(known or {}), start_of("lm", optimizer, None)
    while missing := needed(known, start):
        known |= {s: {"final": loss(s), **s._asdict()} for s in missing[:2]}
    return known


@pytest.mark.parametrize("lr, b1, b2", [(0, 0.8, 0.99), (2, 0.6, 0.95), (-3, 0.95, 0.99), (1, 0.5, 0.95)])
def test_the_search_finds_the_lowest_setting_and_stops(lr, b1, b2):
    known = played(bowl(lr, b1, b2))
    best, missing = search(known, start_of("lm", "zeta", None))
    assert not missing and (log2(best.lr / 16e-3), best.b1, best.b2) == (lr, b1, b2)
    assert len(known) <= 8 + 6 + 1 + 10
    other, _ = search(played(bowl(-lr - 1, b1, b2)), best._replace(lr=16e-3, b1=0.7, b2=0.99))
    assert other.lr != best.lr


def test_the_search_stays_on_its_grid_and_away_from_what_diverged():
    best, _ = search(played(bowl(9, 0.8, 0.99)), start_of("lm", "zeta", None))
    assert best.lr == 8e-3 * 2**3
    cliff = played(lambda s: None if s.lr > 0.02 else bowl(9, 0.8, 0.99)(s))
    best, _ = search(cliff, start_of("lm", "zeta", None))
    assert best.lr == 8e-3 * 2 and convergence.final(cliff, best) < inf


def test_what_is_known_is_not_run_again_and_the_end_is_the_same():
    loss = bowl(1, 0.7, 0.95)
    whole = played(loss)
    for kept in range(0, len(whole), 3):
        assert played(loss, known=dict(list(whole.items())[:kept])) == whole
    assert {s.seed for s in whole} == {convergence.SEARCHED, *range(10)}
    assert len({s for s in played(loss, "muon") if s.b2 != 0.99}) == 0  # which has no b2


def test_interval_is_student_s():
    assert standings.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.96324), rel=1e-5)
    assert standings.interval([1, 3]) == pytest.approx((2, 12.706), rel=1e-4)
    assert standings.interval([1, 2, 3, 4, 5])[1] != pytest.approx(1.96 * 1.5811 / 5**0.5, rel=1e-2)  # not the normal's
    assert standings.interval([1, inf]) == (inf, inf)
    assert standings.interval([7]) == (7, inf)


def test_steps_to_a_loss_are_between_two_looks():
    curve = [[10, 4.0], [20, 3.0], [30, 2.0]]
    assert [standings.reached(curve, loss) for loss in (4, 3.25, 2, 1.9)] == [10, 17.5, 30, inf]
    assert standings.reached([[10, None]], 3) == inf
    runs = [{"curve": curve, "final": 2.0, "seed": 0}]
    assert standings.steps_to(runs, [{"final": 2.5, "seed": 0}]) == 25


def test_differences_are_of_one_seed():
    a, b = ([{"seed": i, "final": x} for i, x in enumerate(finals)] for finals in ((1.0, 2.0, 3.0), (0.9, 1.9, 2.9)))
    assert standings.interval(standings.differences(a, b)) == pytest.approx((0.1, 0), abs=1e-9)
    assert standings.interval(standings.losses(a))[1] > 2  # unpaired, the seeds' spread would hide it
    with pytest.raises(ValueError, match="different seeds"):
        standings.differences(a, b[::-1])


def test_the_table_compares_on_the_seeds_that_both_have():
    def runs(loss, seeds):
        cost = dict(lr=1.0, b1=0.9, b2=0.99, state=1.0, step_ms=2.0, optimizer_ms=1.0)
        return [cost | {"seed": i, "final": loss + i / 1000, "curve": [[10, loss + i / 1000]]} for i in range(seeds)]

    tasks = {"eta": runs(1.0, 10), "muon": runs(1.5, 5), "signum": runs(1.75, 3), "adamw": runs(2.0, 5)}
    for against, want in (("eta", ("", "+0.5", "+0.75", "+1.0")), ("muon", ("-0.5", "", "+0.25", "+0.5"))):
        rows = [line.split(" | ") for line in standings.table("lm", tasks, against).splitlines()[2:]]
        assert all(row[4].startswith(less) and bool(row[4]) == bool(less) for row, less in zip(rows, want, strict=True))
        assert [row[5] for row in rows] == ["10", "10", "10", ""]


def test_the_picture_has_all_tasks_and_leaves_out_the_far_off(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(standings.Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    finals = dict(adamw=2.19, muon=1.84, adamuon=1.86, normuon=1.83, zeta=1.83, eta=1.78, soap=None)
    runs = {name: [{"seed": 0, "final": final}, {"seed": 1, "final": final}] for name, final in finals.items()}
    assert standings.close(runs) == [name for name in standings.ranked(runs) if name not in ("adamw", "soap")]
    assert standings.close({"soap": runs["soap"]}) == []
    standings.draw({"vit": runs, "lm": runs, "moe": runs}, tmp_path / "a.png")
    titles = [axes.get_title("left") for axes in kept[0].axes]
    assert titles == ["language model", "mixture of experts", "vision transformer on digits"]
    for axes in kept[0].axes:
        assert [text.get_text() for text in axes.texts] == ["2.19 →", "diverged"]
    assert kept[0].legends[0].get_texts()[0].get_text() == "one seed"


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_bases_made_anew_in_every_step_are_the_family_s(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(14)]

    def path(rule):
        w, state = torch.zeros_like(grads[0]), rule.init(grads[0])
        for g in grads:
            w, state = rule.update(g, state, w, Hyper(lr=0.1))
        return w

    want = path(getattr(preconditioned, name))
    seldom = path(CONTENDERS[name][1])
    monkeypatch.setattr(contenders, "EVERY", 1)
    torch.testing.assert_close(path(CONTENDERS[name][1]), want)
    assert 1e-2 < torch.linalg.norm(seldom - want) / torch.linalg.norm(want) < 1


def test_a_run_learns_and_depends_on_its_setting_alone():
    task = convergence.TASKS["vit"][0]()
    before = contenders.held_out(task.model(0), task)
    for name, state in {"adamw": 2, "zeta": 2, "eta": 1, "soap": 6, "shampoo": 5}.items():
        s = Setting("vit", name, 4e-3, 0.8, 0.99, 0, 6)
        result = contenders.train(s, task, every=6)
        assert result["final"] < before - 1e-3, name
        assert state <= result["state"] < state + 1 and result["step_ms"] >= result["optimizer_ms"] > 0
    assert contenders.train(s, task, every=6)["curve"] == result["curve"]
    assert contenders.train(s._replace(seed=1), task, every=6)["curve"] != result["curve"]
    assert contenders.train(s._replace(lr=1e30), task, every=6)["final"] is None


def test_a_killed_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convergence, "worker", killed_runs.worker)
    out = tmp_path / "runs.jsonl"
    flags = ["--tasks", "vit", "--optimizers", "adamw", "--steps", "2", "--workers", "1", "--out", str(out)]
    assert killed_runs.is_killed(killed_runs.convergence, 4, ["run", *flags])
    before = read(out)
    with out.open("a") as file:
        file.write('{"task": "vit", "opt')  # as a kill while writing leaves it
    assert len(before) == 4 and read(out) == before
    with pytest.raises(SystemExit, match="no optimizer is finished"):
        main(["table", *flags])

    main(["run", *flags])
    lines, found = out.read_text().splitlines(), read(out)
    assert len(lines) == len(found) and list(found.items())[: len(before)] == list(before.items())
    runs = convergence.outcomes(found, [start_of("vit", "adamw", 2)])["vit"]["adamw"]
    assert [r["seed"] for r in runs] == list(range(5)) and len({r["final"] for r in runs}) == 5
    capsys.readouterr()
    main(["run", *flags])
    assert not capsys.readouterr().out and read(out) == found

    main(["table", *flags, "--against", "adamw"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and {row.count("|") for row in rows} == {8} and " ± " in rows[2]
    main(["plot", *flags])
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_readme_says_what_the_runs_show():
    readme = " ".join((BENCH.parent / "README.md").read_text().split())
    starts = [start_of(task, name, None) for task, name in convergence.ORDER]
    tasks = convergence.outcomes(read(BENCH / "convergence.jsonl"), starts)
    for name in ("zeta", "eta"):
        factors = [runs[name][0]["lr"] / runs["adamw"][0]["lr"] for runs in map(tasks.get, ("lm", "moe", "vit"))]
        assert (
            "the best `lr` of Zeta, and of Eta, was {:g}, {:g} and {:g} times AdamW's best".format(*factors) in readme
        )
    for task, name, claim in [
        ("lm", "zeta_nesterov", "Zeta does not separate from Eta on either language model ({}, with experts"),
        (
            "moe",
            "zeta_nesterov",
            "Zeta does not separate from Eta on either language model (0.007 ± 0.012, with experts {})",
        ),
        ("vit", "zeta_nesterov", "and stays behind on the digits ({})"),
        ("lm", "eta_plain", "Eta with plain momentum does not separate from Eta either ({})"),
    ]:
        runs, eta = tasks[task][name], tasks[task]["eta"]
        middle, half = standings.interval(standings.differences(runs, eta[: len(runs)]))
        assert claim.format(f"{middle:.3f} ± {half:.3f}") in readme
        assert (middle - half > 0) == ("behind" in claim)
