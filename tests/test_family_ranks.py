"""Every class on ranks of torch.distributed: however the parameters lie, five steps are those of one process."""

from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import communication  # noqa: E402
import family_ranks  # noqa: E402
from family_ranks import CASES, COUNTED, HALF, KINDS, ONE, RATE, alone, by_default, start  # noqa: E402
from started_ranks import Results  # noqa: E402

from zeta.parity.checks import TOLERANCE, relative_error  # noqa: E402
from zeta.stages import entries  # noqa: E402

BOUND = TOLERANCE["float32"].step  # of the distance moved
# What a CPU with bfloat16 units multiplies by default, one without them, and a GPU.
PRODUCTS = {"default True, rows": "bfloat16", "default False, rows": "float32", "float16, rows": "float16"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(family_ranks.main, tmp_path_factory.mktemp("ranks"))


@cache
def one_process(kind: str, name: str) -> dict[str, np.ndarray]:
    if name.startswith("default"):
        return by_default(lambda: alone(kind, precision=None), "True" in name)
    if name.startswith("float16"):
        return alone(kind, precision=torch.float16)
    options = HALF if "half" in name else RATE if "rate" in name else ONE if "one" in name else {}
    return alone(kind, **(options | ({"names": ("tall", "wide")} if "tensor parallel" in name else {})))


def distance(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any array, relative to how far it moved. All arrays must be there, and finite."""
    assert got.keys() == want.keys()
    return max(relative_error(got[key], want[key], np.asarray(start().get(key, 0.0))) for key in want)


@pytest.mark.parametrize(("ranks", "name", "kind"), CASES)
def test_five_steps_are_those_of_one_process(results: Results, ranks: int, name: str, kind: str) -> None:
    """In half precision, too: an owner multiplies what one process multiplies."""
    got = [rank[f"{kind}: {name}"] for rank in results(ranks)]
    assert distance(got[0], one_process(kind, name)) < bound(name)
    for other in got[1:]:
        assert all(np.array_equal(got[0][key], other[key]) for key in got[0])  # or they would drift apart


@pytest.mark.parametrize(("name", "kind"), [case[1:] for case in CASES if case[1] in PRODUCTS])
def test_a_rate_off_by_four_bounds_is_caught(results: Results, name: str, kind: str) -> None:
    """The control at every precision that is a default."""
    all_arrays = results(2)[0][f"{kind}: {name}"], one_process(kind, name), start()
    got, want, origin = (arrays["wide"] for arrays in all_arrays)
    assert relative_error(origin + (1 + 4 * bound(name)) * (got - origin), want, origin) > bound(name)


def bound(name: str) -> float:
    """That of the products."""
    return TOLERANCE[PRODUCTS.get(name, "float32")].step


@pytest.mark.parametrize("kind", ["Eta", "Mine"])
def test_sums_that_are_overwritten_are_caught(results: Results, kind: str) -> None:
    """The control of the sums: rows and columns that are dead on one rank and alive on another."""
    assert distance(results(2)[0][f"{kind}: mistaken"], one_process(kind, "columns")) > 100 * BOUND


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_what_is_lost_of_a_rank_is_caught(results: Results, name: str) -> None:
    got = {key: array.copy() for key, array in results(2)[0][f"NorMuon: {name}"].items()}
    got["row_sq.wide"][3] *= 1 + 4 * BOUND * len(got["row_sq.wide"])
    assert distance(got, one_process("NorMuon", name)) > BOUND


@pytest.mark.parametrize(("cut", "kind"), COUNTED)
def test_entries_operations_and_state_are_as_planned(results: Results, cut: str, kind: str) -> None:
    """On a 12-layer model and four ranks: what each sends, computes and keeps, counted."""
    rule, ranks = KINDS[kind].rule, 4
    counted = (rank[f"{kind}: counted {cut}"] for rank in results(ranks))
    got = communication.Cost(*map(list, zip(*counted, strict=True)))
    model = communication.MODELS["small"]()
    plan = communication.cost(model, (ranks,), (cut,), rule)
    assert (got.sent, got.state) == (plan.sent, plan.state)
    if rule.orthogonalizes and kind != "Dion2":  # which takes a quarter of a matrix; the others decompose
        assert got.flops == plan.flops and max(got.flops) < 1.15 * sum(got.flops) / ranks
    if cut != "copies":
        whole_state = communication.cost(model, (1,), (cut,), rule).state[0]
        assert max(got.state) < 1.15 * whole_state / ranks or kind in ("Shampoo", "SOAP")  # whose factors are whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_a_rule_that_is_cut_sends_little_more_than_zeta(kind: str, cut: str) -> None:
    rule, model = KINDS[kind].rule, communication.MODELS["small"]()
    zetas, ours = (sum(communication.cost(model, (4,), (cut,), r).sent) for r in (KINDS["Zeta"].rule, rule))
    lines = sum(r.matrices[0] * sum(r.matrices[1:]) for r in communication.routes(model).values())
    if kind in ("Dion2", "Shampoo", "SOAP"):  # not cut: all their state travels
        assert ours > 1.9 * zetas
    elif any(rule.keeps[key] is entries for key in rule.carried):
        assert ours < 2.1 * zetas
    else:  # by a rank and a matrix at most rows + cols; of its variances on both sides Mine sends four
        assert ours <= zetas + 4 * lines * (4 if kind == "Mine" else 1)
