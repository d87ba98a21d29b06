"""Bytes a weight, as bench/README.md says them: state as the code computes and every library keeps it, and peaks."""

import re
from pathlib import Path

import memory
import pytest

from zeta.bench.report import side_of
from zeta.bench.tables import gpt
from zeta.storage import totals

pytestmark = pytest.mark.usefixtures("mlx_device")
README = (Path(__file__).parent.parent / "bench/README.md").read_text()
ROWS = {
    name: [float(number) for number in cells.replace("|", " ").split()]
    for name, cells in re.findall(r"^\| `([\w.]+)` \|((?: [\d.]+ \|){2}[\d. ]*\|[\d. ]*\|)$", README, re.MULTILINE)
}
SMALL = gpt(2, 16, 0)  # vectors, too
PEERS = {  # as the README calls them: (library, name)
    "torch.optim.AdamW": ("torch", "AdamW"),
    "torch.optim.Muon": ("torch", "Muon + AdamW"),
    "mlx.optimizers.AdamW": ("mlx", "AdamW"),
    "mlx.optimizers.Muon": ("mlx", "Muon + AdamW"),
}


def side(library):
    pytest.importorskip("mlx.core" if library == "mlx" else library)
    return side_of(library, "cpu")


def test_all_of_the_family_and_its_peers_have_a_row():
    assert ROWS.keys() == {*memory.OURS, *PEERS}


@pytest.mark.parametrize("name", memory.OURS)
def test_state_is_what_the_code_computes(name):
    for dtype, said in zip(memory.WIDTHS, ROWS[name], strict=False):
        assert round(memory.computed(name, dtype, memory.SHAPES) / memory.WEIGHTS, 2) == said


@pytest.mark.parametrize("dtype", memory.WIDTHS)
@pytest.mark.parametrize("name", memory.OURS)
@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_both_libraries_keep_just_that(library, name, dtype):
    step = side(library).step(name, SMALL, dtype)
    step()
    assert step.state() == memory.computed(name, dtype, SMALL)


@pytest.mark.parametrize("name", PEERS)
def test_the_peers_keep_what_the_table_says(name):
    library, own = PEERS[name]
    for dtype, said in zip(memory.WIDTHS, ROWS[name], strict=False):
        shapes = {n: shape for n, shape in SMALL.items() if len(shape) > 1}
        step = side(library).step(own, shapes, dtype)
        step()
        weights = sum(rows * cols for rows, cols in shapes.values())
        assert step.state() / weights == pytest.approx(said, rel=0.02)  # steps and rates are kept beside


@pytest.mark.parametrize("dtype", memory.WIDTHS)
@pytest.mark.parametrize("name", ["Zeta", "Eta"])
def test_a_step_holds_no_more_than_the_table_says(name, dtype):
    torch_side = side("torch")
    if torch_side.machine()["products"] != "bfloat16":
        pytest.skip("the table is of a CPU that multiplies bfloat16")
    _, peak = memory.measured(torch_side, name, dtype)
    said = ROWS[name][2 + list(memory.WIDTHS).index(dtype)]
    assert 0.6 * said < peak < 1.1 * said


def test_totals_count_shared_arrays_once():
    torch = pytest.importorskip("torch")
    from zeta.routing.by_module import routes

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)).bfloat16()
    model[1].weight = model[0].weight
    arrays = dict(model.named_parameters(remove_duplicate=False))
    matrix, vectors, steps = 32, 16, 2
    rest = vectors * (2 * 4 + 2) + 4 * steps
    both = {"Zeta": matrix * 10 + rest, "Eta": matrix * 6 + rest, "AdamW": 2 * 2 * (matrix + vectors)}
    assert totals(arrays, routes(model)) == both
