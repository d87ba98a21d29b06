"""MLX's optimizers under `nn.fully_shard`: on two ranks, each with its rows, what one process computes."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx_sharded_ranks as script  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_launch import results  # noqa: E402

import zeta  # noqa: E402
from zeta.backends.mlx import Zeta, named_state  # noqa: E402
from zeta.parity.checks import TOLERANCE, assert_close  # noqa: E402

FAMILY = [f"family {kind}" for kind in (*script.KINDS, "in half precision")]
MODEL = [f"model {case}" for case in ("Zeta", "Eta", "NorMuon", "compiled")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return results(script.__file__, tmp_path_factory)


@pytest.fixture(scope="module")
def alone():
    return script.cases(mx.distributed.init())


def assert_same(ranks, case, want, bound=TOLERANCE["float32"].step):
    """Rows make up the whole, and what a rank holds whole is the same on all."""
    before = script.start() if case.startswith("family") else dict(tree_flatten(script.Model().parameters()))
    assert all(rank[case].keys() == want.keys() for rank in ranks)
    for name, array in want.items():
        rows = [rank[case][name] for rank in ranks]
        if rows[0].shape == array.shape:
            assert all(np.array_equal(own, rows[0]) for own in rows)
        else:
            rows = [np.concatenate(rows)]
        assert_close(rows[0], array, bound, np.asarray(before.get(name.removeprefix("param."), 0.0)))


@pytest.mark.parametrize("case", FAMILY)
def test_every_class_equals_one_process(launched, alone, case):
    bound = TOLERANCE["bfloat16" if case.endswith("half precision") else "float32"].step
    assert_same(launched(2), case, alone[case], bound)


@pytest.mark.parametrize("kind", script.SOME)
def test_three_ranks_too(launched, alone, kind):
    assert_same(launched(3), f"family {kind}", alone[f"family {kind}"])


@pytest.mark.parametrize("case", MODEL)
def test_a_model_trains_as_in_one_process(launched, alone, case):
    assert_same(launched(2), case, alone[case])


def test_rows_that_are_taken_for_a_matrix_are_noticed(launched, alone):
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(launched(2), "model by rows", alone["model Zeta"])


class TwoRanks:
    """A group that is asked for its size alone."""

    def size(self):
        return 2

    def rank(self):
        return 0


def test_one_ranks_rows_without_what_says_so_are_refused():
    model = script.Model()
    routes, group = zeta.routes(model), TwoRanks()
    layer = model.layers[0] = nn.fully_shard(model.layers[0], group=group)
    with pytest.raises(ValueError, match=r"layers\.0 is sharded.*before nn\.fully_shard"):
        zeta.routes(model)
    with pytest.raises(ValueError, match=r"the model is sharded.*before nn\.fully_shard"):
        zeta.routes(layer)
    with pytest.raises(ValueError, match=r"layers\.0 is sharded.*save and load each rank's own"):
        named_state(model, Zeta(1e-2, routes=routes, group=group))
    params = model.trainable_parameters()
    for options, message in [
        ({}, "pass routes=.*read before"),
        ({"routes": routes}, "pass group="),
        ({"routes": {"up.weight": routes["middle.weight"]}, "group": group}, "routes has no"),
        ({"routes": {name: routes["middle.weight"] for name in routes}, "group": group}, "do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            Zeta(1e-2, **options).init(params)
