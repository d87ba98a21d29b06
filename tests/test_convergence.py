"""bench/convergence.py: its search, its statistics, its runs, and that a kill costs no more than what was running."""

import re
import sys
from functools import partial
from importlib import import_module
from math import inf, log2, prod
from pathlib import Path

import killed_runs
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))  # whose files import one another by name
names = ("contenders", "convergence", "search", "standings", "tasks")
contenders, convergence, searching, standings, tasks = map(import_module, names)
main, outcomes, read = convergence.main, convergence.outcomes, convergence.read
needed, search, start_of = searching.needed, searching.search, searching.start_of
CONTENDERS, Setting, SEARCHED = contenders.CONTENDERS, contenders.Setting, contenders.SEARCHED


def away(s):
    """Where a setting lies in units of the grid: (lr, adamw_lr, b1, weight_decay), zero at the search's start."""
    base = start_of("vit", s.optimizer)
    there = (s.lr / base.lr, s.adamw_lr / base.adamw_lr, (1 - s.b1) / (1 - base.b1), s.weight_decay / base.weight_decay)
    return [round(log2(factor)) for factor in there]


def bowl(*lowest):
    """A loss whose lowest setting is known, whose axes lean on one another."""

    def loss(s):
        x = [a - b for a, b in zip(away(s), lowest, strict=True)]
        return sum(a * a for a in x) + 0.9 * x[0] * x[1] - 0.5 * x[1] * x[2] + s.seed / 1e4

    return loss


def played(loss, names=("zeta",), asked=("vit",), known=None):
    """All runs that are asked for, where a run's outcome is `loss`."""
    known = dict(known or {})
    while missing := needed(known, asked, names):
        known |= {s: {"final": loss(s), **s._asdict()} for s in missing[:2]}
    return known


@pytest.mark.parametrize("lowest", [(0, 0, 0, 0), (2, -2, 1, 0), (-3, 1, -2, 3), (1, 2, 1, -2)])
@pytest.mark.parametrize("name", ["zeta", "adamw"])
def test_the_search_ends_where_no_neighbour_is_better(name, lowest):
    loss = bowl(*lowest)
    known = played(loss, [name])
    best, missing = search(known, start_of("vit", name))
    assert not missing and tuple(away(best)) == lowest
    near = [s for axis in searching.AXES for s in searching.beside(best, axis)]
    assert len(near) == 8 and all(known[s]["final"] > known[best]["final"] for s in near)
    assert len(known) <= 9 + 5 + 5 * sum(map(abs, lowest))
    assert {s.seed for s in known} == {SEARCHED, *range(5)}


def test_axes_end_where_nothing_changes_any_more():
    s = start_of("vit", "zeta")
    least = s._replace(weight_decay=0.0015625)
    assert [t.weight_decay for t in searching.beside(least, "weight_decay")] == [0.003125]
    assert [t.b1 for t in searching.beside(s._replace(b1=0.2), "b1")] == [0.6]
    assert [t.b1 for t in searching.beside(s._replace(b1=0.9875), "b1")] == [0.975]


def test_the_search_stays_away_from_what_diverged():
    cliff = played(lambda s: None if s.lr > 0.04 else bowl(9, 0, 0, 0)(s))
    best, _ = search(cliff, start_of("vit", "zeta"))
    assert best.lr == 0.032 and searching.final(cliff, best) < inf


def test_what_is_known_is_not_run_again_and_the_end_is_the_same():
    loss = bowl(1, -1, 1, 0)
    whole = played(loss)
    for kept in range(0, len(whole), 3):
        known = played(loss, known=dict(list(whole.items())[:kept]))
        assert search(known, start_of("vit", "zeta")) == search(whole, start_of("vit", "zeta"))
        assert len(known) <= len(whole) + 4


def test_a_search_that_ended_in_a_worse_place_goes_to_the_better():
    start, calls = start_of("vit", "zeta"), []

    def loss(s):
        calls.append(s)
        return min(bowl(0, 0, 0, 0)(s), bowl(4, 0, 0, 0)(s) - 1)

    near = played(loss)
    assert away(search(near, start)[0]) == [0, 0, 0, 0]
    far = start._replace(lr=16 * start.lr)
    assert away(search(played(loss, known=near | {far: {"final": loss(far)}}), start)[0]) == [4, 0, 0, 0]


def test_a_size_begins_where_the_one_below_ended_and_the_largest_takes_that():
    small, middle, large = tasks.SIZES

    def loss(s):
        return bowl(2, 1, 0, 1)(s) if s.task == small else bowl(1, 1, -1, 1)(s)

    known = played(loss, ["eta", "adamw"], list(tasks.SIZES))
    searched = {task: [s for s in known if s.task == task and s.seed == SEARCHED] for task in tasks.SIZES}
    assert next(away(s) for s in searched[middle] if s.optimizer == "eta") == [2, 1, 0, 1]
    assert not searched[large] and len(searched[middle]) < len(searched[small])
    ran = {s.optimizer: away(s) for s in known if s.task == large}
    assert ran == {"eta": [1, 1, -1, 1], "adamw": [1, 1, -1, 1]}
    assert list(outcomes(known)) == list(tasks.SIZES)
    order = [s.task for s in known]
    assert order == sorted(order)


def test_a_gpu_s_size_begins_where_a_cpu_s_largest_ended_and_moves_the_rate_alone():
    def loss(s):
        return bowl(1, 1, -1, 1)(s) if s.task in tasks.SIZES else bowl(-1, 1, 1, 1)(s)

    known = played(loss, ["eta"], [*tasks.SIZES, *tasks.FOR_GPU])
    there = [s for s in known if s.task in tasks.FOR_GPU]
    searched, fresh = ([s for s in there if (s.seed == SEARCHED) == own] for own in (True, False))
    assert away(searched[0]) == [1, 1, -1, 1] and {tuple(away(s)[1:]) for s in searched} == {(1, -1, 1)}
    assert [away(s)[0] for s in fresh] == [min((loss(s), away(s)[0]) for s in searched)[1]] * 5


@pytest.mark.parametrize("name", tasks.SIZES)
def test_a_size_sees_ten_bytes_a_parameter_and_holds_two_splits_out(name):
    task, (_, steps) = tasks.TASKS[name][0](), tasks.TASKS[name]
    parameters = sum(p.numel() for p in task.model(0).parameters())
    assert 10 <= steps * task.tokens / parameters < 10.1 and task.tokens == 2048
    search, claims = (torch.cat([rows for (rows,) in part]) for part in (task.search, task.claims))
    assert claims[:, 1:].numel() > 60_000 and search.shape == claims.shape
    seen = {bytes(row.tolist()) for row in search}
    assert not seen.intersection(bytes(row.tolist()) for row in claims)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's, of what it traces
def test_a_gpu_s_task_in_small_is_the_model_that_is_not_compiled(monkeypatch):
    pytest.importorskip("trl")
    (size,) = tasks.FOR_GPU.values()
    small = size._replace(layers=1, width=16, rows=4, context=16, windows=8, packages=("trl",))
    compiled, plain = (partial(torch.compile, backend="eager"), lambda function, **_: function)
    losses = []
    for compile_ in (compiled, plain):
        monkeypatch.setattr(torch, "compile", compile_)
        task = tasks.lm(small)
        model = task.model(0)
        loss = model(*task.batch(1, 0))
        loss.backward()
        losses.append([loss.item(), *(p.grad.norm().item() for p in model.parameters())])
    assert losses[0] == losses[1] and loss.dtype == torch.float32
    assert task.tokens == 64 and len(task.search[0][0]) == len(task.claims[0][0]) == 8
    parameters = sum(prod(shape) for shape in tasks.model.shapes(size.config).values())
    assert 10 <= size.steps * size.rows * size.context / parameters < 10.1
    with pytest.raises(SystemExit, match=r"no_such not in .*, whose sources are this task's text: make test"):
        tasks.sources(("no_such", "trl"))


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
    assert standings.steps_to(runs, [{"final": 2.5, "seed": 0}]) == "25"
    assert standings.steps_to(runs, [{"final": 1.5, "seed": 0}]) == "0 of 1"
    assert standings.steps_to(runs, [{"final": 2.5, "seed": 1}]) == ""


def test_differences_are_of_one_seed():
    a, b = ([{"seed": i, "final": x} for i, x in enumerate(finals)] for finals in ((1.0, 2.0, 3.0), (0.9, 1.9, 2.9)))
    assert standings.interval(standings.differences(a, b)) == pytest.approx((0.1, 0), abs=1e-9)
    assert standings.interval(standings.losses(a))[1] > 2  # unpaired, the seeds' spread would hide it
    assert standings.differences(a, b[:0:-1]) == pytest.approx([0.1, 0.1]) and standings.differences(a, []) == []
    assert standings.losses([{"final": 1.0, "claims": 2.0}]) == [2]  # where a split is for claims, they are made on it


def test_the_table_compares_on_the_seeds_that_both_have():
    def runs(loss, seeds):
        cost = dict(lr=1.0, adamw_lr=1.0, weight_decay=0.1, b1=0.9, b2=0.99, state=1.0, step_ms=2.0, optimizer_ms=1.0)
        return [cost | {"seed": i, "final": loss + i / 1000, "curve": [[10, loss + i / 1000]]} for i in range(seeds)]

    lm = {"eta": runs(1.0, 10), "muon": runs(1.5, 5), "signum": runs(1.75, 3), "adamw": runs(2.0, 5)}
    for against, want in (("eta", ("", "+0.5", "+0.75", "+1.0")), ("muon", ("-0.5", "", "+0.25", "+0.5"))):
        rows = [line.split(" | ") for line in standings.table("lm", lm, against).splitlines()[2:]]
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


def test_a_run_learns_and_depends_on_its_setting_alone():
    task = tasks.TASKS["vit"][0]()
    before = contenders.held_out(task.model(0), task.search)
    for name, state in {"adamw": 2, "zeta": 2, "eta": 1, "soap": 6, "shampoo": 5}.items():
        s = start_of("vit", name, 6)._replace(lr=4e-3, adamw_lr=4e-3, seed=0)
        result = contenders.train(s, task)
        assert result["final"] < before - 1e-3, name
        assert state <= result["state"] < state + 1 and result["step_ms"] >= result["optimizer_ms"] > 0
    assert contenders.train(s, task)["curve"] == result["curve"] and len(result["curve"]) == 6
    for other in ({"seed": 1}, {"adamw_lr": 8e-3}, {"weight_decay": 1.0}, {"b1": 0.6}):
        assert contenders.train(s._replace(**other), task)["curve"] != result["curve"], other
    assert contenders.train(s._replace(lr=1e30), task)["final"] is None


def test_claims_are_for_fresh_seeds_alone():
    task = tasks.TASKS["vit"][0]()
    task = task._replace(claims=[tuple(x[:50] for x in batch) for batch in task.search])
    results = [contenders.train(start_of("vit", "eta", 2)._replace(seed=seed), task) for seed in (SEARCHED, 0)]
    assert "claims" not in results[0] and len(results[0]["curve"]) == 1
    assert results[1]["claims"] not in (None, results[1]["final"])


def test_a_killed_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convergence, "worker", killed_runs.worker)
    monkeypatch.setattr(searching, "AXES", searching.AXES[:2])  # as there
    out = tmp_path / "runs.jsonl"
    flags = ["--tasks", "vit", "--optimizers", "adamw", "--steps", "2", "--workers", "1", "--out", str(out)]
    assert killed_runs.is_killed(killed_runs.convergence, 4, ["run", *flags])
    before = read(out)
    with out.open("a") as file:
        file.write('{"task": "vit", "opt')  # as a kill while writing leaves it
    assert len(before) == 4 and read(out) == before
    with pytest.raises(SystemExit, match="no fresh seed"):
        main(["table", *flags])

    main(["run", *flags])
    lines, known = out.read_text().splitlines(), read(out)
    assert len(lines) == len(known) and list(known.items())[: len(before)] == list(before.items())
    assert all({"commit", "cpu", "tokens_per_parameter", "seconds"} <= set(line) for line in known.values())
    runs = outcomes(known)["vit"]["adamw"]
    assert [r["seed"] for r in runs] == list(range(5)) and len({str(r["curve"]) for r in runs}) == 5
    capsys.readouterr()
    main(["run", *flags])
    assert not capsys.readouterr().out and read(out) == known

    main(["table", *flags, "--against", "adamw"])
    rows, told = capsys.readouterr().out.strip().split("\n\n")
    assert rows.count("\n") == 2 and {row.count("|") for row in rows.splitlines()} == {8} and " ± " in rows
    searched = len(known) - 5
    assert f"{searched} (AdamW {searched}), which looked at the search's split {searched} times" in told
    main(["plot", *flags])
    assert out.with_suffix(".png").stat().st_size > 10_000

    with pytest.raises(SystemExit, match="no fresh seed"):
        main(["table", "--out", str(out), "--tasks", "vit"])  # of full length
    out.write_text(out.read_text().replace('"data": "', '"data": "other'))
    with pytest.raises(SystemExit, match="data of checksum"):
        main(["run", *flags])


def test_the_picture_of_sizes_is_drawn_of_what_there_is(tmp_path):
    def lines(task, name, loss, seeds):
        s, size = start_of(task, name), tasks.SIZES[task]
        cost = {"parameters": 1000 * size.width, "tokens_per_parameter": 10.0, "seconds": 30.0}
        curve = [[1, 2.0], [2, loss]]
        return {s._replace(seed=i): {"final": loss, "curve": curve, "seed": i} | cost for i in seeds}

    small, middle, _ = tasks.SIZES
    known = lines(small, "eta", 1.5, range(5)) | lines(small, "muon", 1.51, range(3)) | lines(middle, "soap", 1.4, [0])
    known |= lines(middle, "muon", None, [0])
    import_module("figures").draw(outcomes(known), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_readme_says_what_the_runs_show():
    readme, findings = (" ".join((folder / "README.md").read_text().split()) for folder in (BENCH.parent, BENCH))
    old = outcomes(read(BENCH / "convergence.jsonl"))
    for name in ("zeta", "eta"):
        factors = [runs[name][0]["lr"] / runs["adamw"][0]["lr"] for runs in map(old.get, ("lm", "moe", "vit"))]
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
        runs, eta = old[task][name], old[task]["eta"]
        middle, half = standings.interval(standings.differences(runs, eta))
        assert claim.format(f"{middle:.3f} ± {half:.3f}") in findings
        assert (middle - half > 0) == ("behind" in claim)


@pytest.mark.parametrize(
    "file, tasks, section",
    [
        ("budgets.jsonl", ["lm_100k", "lm_300k", "lm_600k"], "## What they show"),
        ("convergence.jsonl", ["lm", "moe", "vit"], "## Shorter runs"),
    ],
)
def test_the_tables_are_what_the_runs_give(file, tasks, section, capsys):
    main(["table", "--out", str(BENCH / file), "--tasks", *tasks])
    given = {line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    after = (BENCH / "README.md").read_text().partition(f"\n{section}\n")[2]
    assert given == {line for line in re.split(r"\n#+ ", after)[0].splitlines() if line.startswith("|")}


def test_the_rates_at_ten_million_parameters_are_what_the_runs_give():
    known, section = read(BENCH / "budgets.jsonl"), (BENCH / "README.md").read_text().partition("## Ten million")[2]
    head, _, *rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][:6]
    shown = {}
    for label, *cells in rows:
        name = next(name for name, (own, _) in CONTENDERS.items() if own == label.strip())
        losses = {float(lr): cell.strip() for lr, cell in zip(head[1:], cells, strict=True) if cell.strip()}
        best = min(losses, key=lambda lr: losses[lr].strip("*"))
        assert {lr for lr, cell in losses.items() if "*" in cell} == {best} != {min(losses), max(losses)}
        shown |= {(name, lr): cell.strip("*") for lr, cell in losses.items()}
    there = {s: line for s, line in known.items() if s.task == "lm_10m" and s.seed == SEARCHED}
    assert shown == {(s.optimizer, s.lr): f"{line['final']:.4f}" for s, line in there.items()}


# What bench/README.md says of differences: (the words, with {} for each), (task, optimizer, less which).
SMALL, MIDDLE, LARGE = tasks.SIZES
FINDINGS = [
    (
        "Eta's lead over tuned Muon is {}, {} and {} from the smallest size to the largest",
        [(size, "muon", "eta") for size in tasks.SIZES],
    ),
    (
        "Zeta is behind Eta ({}) and behind Muon ({}) at the smallest size",
        [(SMALL, "zeta", "eta"), (SMALL, "zeta", "muon")],
    ),
    (
        "separates from neither ({} behind Eta and {} before it, {} and {} before Muon)",
        [(MIDDLE, "zeta", "eta"), (LARGE, "eta", "zeta"), (MIDDLE, "muon", "zeta"), (LARGE, "muon", "zeta")],
    ),
    (
        "NorMuon is before Zeta at the smallest size ({}) and behind Eta at the middle one ({})",
        [(SMALL, "zeta", "normuon"), (MIDDLE, "normuon", "eta")],
    ),
    (
        "({} behind Eta at the smallest, {} behind Zeta at the middle one, {} and {} behind the two at the largest)",
        [(SMALL, "normuon", "eta"), (MIDDLE, "normuon", "zeta"), (LARGE, "normuon", "eta"), (LARGE, "normuon", "zeta")],
    ),
    (
        "nor from Muon at any ({} before it, {} and {} behind)",
        [(SMALL, "muon", "normuon"), (MIDDLE, "normuon", "muon"), (LARGE, "normuon", "muon")],
    ),
    (
        "Zeta with Nesterov momentum separates from none of Eta, Muon and Zeta ({} and {} behind, {} before it)",
        [(SMALL, "zeta_nesterov", "eta"), (SMALL, "zeta_nesterov", "muon"), (SMALL, "zeta", "zeta_nesterov")],
    ),
    ("AdaMuon is ahead of it by {} at the smallest size, no difference found", [(SMALL, "adamw", "adamuon")]),
    ("AdamW and Signum do not separate ({})", [(SMALL, "signum", "adamw")]),
    ("nor do NorMuon and Muon ({}, NorMuon before it)", [(SMALL, "muon", "normuon")]),
    (
        "do not separate, neither before it ({}) nor after it ({}; rank 1 ahead in both)",
        [(SMALL, "zeta", "rank1_before"), (SMALL, "whiten_after", "rank1_after")],
    ),
    (
        "separates from Muon (the others {}, {} and {} behind)",
        [(SMALL, kind, "muon") for kind in ("rank1_before", "rank1_after", "whiten_after")],
    ),
    (
        "from either side alone ({} behind before, {} behind after), and is behind Muon by {}",
        [(SMALL, "rank1_both", "rank1_before"), (SMALL, "rank1_both", "rank1_after"), (SMALL, "rank1_both", "muon")],
    ),
    ("AdaMuon is behind Muon by {}", [(SMALL, "adamuon", "muon")]),
    ("with these it does not separate from AdamW ({} behind)", [(SMALL, "soap", "adamw")]),
    (
        "in every step it gains {}, does not separate from Muon ({} behind) and is behind Eta ({})",
        [(SMALL, "soap", "soap_1"), (SMALL, "soap_1", "muon"), (SMALL, "soap_1", "eta")],
    ),
]


@pytest.mark.parametrize("words, pairs", FINDINGS)
def test_the_findings_are_differences_that_the_runs_have(words, pairs):
    text = " ".join((BENCH / "README.md").read_text().partition("# Convergence")[2].split())
    ran = outcomes(read(BENCH / "budgets.jsonl"))
    shown = [standings.interval(standings.differences(ran[task][a], ran[task][b])) for task, a, b in pairs]
    assert words.format(*(standings.show(*both) for both in shown)) in text


def test_every_difference_in_the_findings_is_held():
    text = (BENCH / "README.md").read_text().partition("# Convergence")[2].partition("## Routers")[0]
    words = " ".join(line for line in text.split("\n") if not line.startswith("|")).split()
    claims = re.findall(r"\d\.\d{4} ± \d\.\d{4}", " ".join(words))
    assert len(claims) == sum(len(pairs) for _, pairs in FINDINGS) > 7
