"""What users of several ranks fall into: it is refused by all of them before anything changes, or it works."""

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import traps_ranks  # noqa: E402
from killed_runs import context  # noqa: E402
from torch.multiprocessing import start_processes  # noqa: E402
from traps_ranks import ARRANGEMENTS, OPTIONS, Model, read, train  # noqa: E402

from zeta.backends.torch import Zeta, param_groups  # noqa: E402
from zeta.parity.checks import TOLERANCE, relative_error  # noqa: E402

BOUND = TOLERANCE["float32"].step  # of the distance moved
PLANS = ("half_later", "removed", "resumed", "not_a_number")
HOW = pytest.mark.parametrize("how", ARRANGEMENTS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """{case: what came of it} of each of two ranks, which are started once."""
    folder = tmp_path_factory.mktemp("traps")
    context()  # where ranks start with torch in place
    start_processes(traps_ranks.main, (2, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@cache
def one_process(case: str) -> dict[str, np.ndarray]:
    """What the same steps give where nobody shares anything."""
    return getattr(traps_ranks, case)("alone")


def distance(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any array, relative to how far it moved. All arrays must be there."""
    start = {name: p.detach().double().numpy() for name, p in Model().named_parameters()}
    assert got.keys() == want.keys()
    return max(relative_error(got[key], want[key], start.get(key, np.zeros(()))) for key in want)


def equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    return got.keys() == want.keys() and all(np.array_equal(got[k], want[k], equal_nan=True) for k in want)


SQUARE = r" \(\(24, 24\), torch.float32, .+, in group 0, for Zeta as \(1, 24, 24\)\)"
TALL = r" \(\(24, 40\), torch.float32, .+, in group 0, for Zeta as \(1, 24, 40\)\)"
WIDE = r" \(\(40, 24\), {}, .+, in group 0, for {}\)"
DIFFERENT = {  # what the first rank has where the second has what
    "reverse": ("first.weight" + SQUARE, "tall.weight" + TALL),
    "swapped": ("first.weight" + SQUARE, "second.weight" + SQUARE),
    "nameless": ("a parameter" + SQUARE, "a parameter" + TALL),
    "one_more": ("nothing", "tall.weight" + TALL),
    "frozen": ("tall.weight" + TALL, "nothing"),
    "other_dtype": (
        "wide.weight" + WIDE.format("torch.float32", ".*"),
        "wide.weight" + WIDE.format("torch.bfloat16", ".*"),
    ),
    "other_treatment": ("first.weight" + SQUARE, "wide.weight" + WIDE.format("torch.float32", "AdamW")),
    "other_groups": ("first.weight" + SQUARE, r"first.bias \(\(24,\), .+, in group 0, for AdamW\)"),
}


@pytest.mark.parametrize(
    ("what", "how"),
    [
        (what, how) for what in DIFFERENT for how in ARRANGEMENTS if (what, how) != ("other_dtype", "rows")
    ],  # FSDP2's one
)
def test_other_parameters_on_a_rank_are_refused_by_all_before_anything_changes(ranks, what, how):
    first, second = DIFFERENT[what]
    text = f"RuntimeError: the ranks have different parameters: where rank 0 has {first}, rank 1 has {second}; give"
    for rank in ranks:
        result = rank[f"refused {what} {how}"]
        assert re.match(text, result["error"]), result["error"]
        assert result["unchanged"]


@pytest.mark.parametrize(
    "case, text",
    [
        ("refused comm_dtype", "the ranks have different parameters: .* copied, in .* copied, sent as torch.bfloat16,"),
        ("refused shard_state", "the ranks have different parameters: .* copied, in .* state sharded, in"),
        ("refused optimizers", r"the ranks have different parameters: .* \(\(24, 24\), .* \(\(40, 24\), "),
        ("later a new group", "the ranks have gradients of different parameters"),
        ("later no gradient", "the ranks have gradients of different parameters"),
    ],
)
def test_other_options_and_later_changes_of_one_rank_are_refused_by_all(ranks, case, text):
    for rank in ranks:
        assert re.match(f"RuntimeError: {text}", rank[case]["error"]), rank[case]["error"]
        assert rank[case]["unchanged"]


@HOW
def test_the_host_waits_for_the_other_ranks_in_the_first_step_alone(ranks, how):
    for rank in ranks:
        first, *later = rank[f"asked once {how}"]  # places of sharded state are read, too
        assert first and not any(later)


def test_the_order_between_process_groups_may_differ(ranks):
    model = Model()
    opt = Zeta([(f"{n}.weight", model.get_parameter(f"{n}.weight")) for n in ("first", "wide")], **OPTIONS)
    train(model, opt)
    want = {name: array for name, array in read(model, opt).items() if name in ("first.weight", "wide.weight")}
    for rank in ranks:
        assert distance(rank["two meshes"], want) < BOUND


@pytest.mark.parametrize("how", ["rows", "copies"])
def test_a_compiled_step_is_one_graph_equal_to_eager_and_is_not_compiled_again(ranks, how):
    """AdamW is in it; what ranks send one another stands between graphs. Neither rate nor step compiles it again."""
    for rank in ranks:
        result = rank[f"compiled {how}"]
        assert result["graphs"] == [1] * traps_ranks.STEPS
        assert distance(result["compiled"], result["eager"]) < BOUND
        matrices = [name for name in result["eager"] if "weight" in name]
        assert all(np.array_equal(result["compiled"][name], result["eager"][name]) for name in matrices)


@pytest.mark.parametrize("kind", ["Zeta", "NorMuon", "AdaMuon"])
def test_a_set_dtype_passes_a_full_state_on_the_cpu_and_is_json(ranks, kind):
    for rank in ranks:
        result = rank[f"full state dict {kind}"]
        assert equal(result["stopped"], result["straight"])
        assert json.loads(result["json"])[0]["ns_dtype"] == "bfloat16"
    assert "Error: " in ranks[0][f"full state dict {kind}"]["with a dtype"]  # or the test proves nothing


def test_a_state_saved_with_a_torch_dtype_is_read():
    model = Model()
    opt = Zeta(param_groups(model), **OPTIONS)
    train(model, opt, range(1))
    saved = opt.state_dict()
    saved["param_groups"][0]["ns_dtype"] = torch.bfloat16
    opt.load_state_dict(saved)
    assert [group["ns_dtype"] for group in opt.param_groups] == ["bfloat16", "float32"]
    train(model, opt, range(1, 2))


@pytest.mark.parametrize("how", ["rows", "copies"])
def test_a_device_without_a_backend_is_refused_at_construction(ranks, how):
    text = r'ValueError: a parameter of shape .* is on the device "cpu", but .* has the backends "cuda:gloo" alone: add'
    for rank in ranks:
        assert re.match(text, rank[f"no backend {how}"])


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (case, how) for case in PLANS for how in ARRANGEMENTS if (case, how) != ("removed", "rows")
    ],  # FSDP2 keeps its own
)
def test_plans_are_those_of_the_parameters_as_they_are(ranks, case, how):
    want = one_process(case)
    lost = {name for name, array in want.items() if np.isnan(array).any()}
    assert lost == ({"first.weight", "exp_avg.first.weight", "exp_avg_sq.first.weight"} if "number" in case else set())
    for rank in ranks:
        got = rank[f"{case} {how}"]
        assert {name for name, array in got.items() if np.isnan(array).any()} == lost
        got, other = ({k: x for k, x in arrays.items() if k not in lost} for arrays in (got, want))
        assert distance(got, other) < BOUND
        assert equal(got, {k: x for k, x in ranks[0][f"{case} {how}"].items() if k not in lost})
