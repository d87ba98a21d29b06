"""The plans alone: who holds what, who owns what, what travels."""

import communication
import pytest
from communication import MODELS, cost, gathered

from zeta import Route
from zeta.routing.layout import batches
from zeta.sharding import Unit, balance, held, overlap, plan, sent, units

MATRIX = Route("zeta", (1, 10, 6), "matrix")


def boxes(shape, mesh, cuts, order=None):
    return [tuple((s.start, s.stop) for s in h.box) for h in held(shape, mesh, cuts, order)]


def test_shards_are_those_of_chunk():
    assert boxes((10, 6), (4,), (0,)) == [((0, 3), (0, 6)), ((3, 6), (0, 6)), ((6, 9), (0, 6)), ((9, 10), (0, 6))]
    assert boxes((2, 6), (4,), (0,))[2:] == [((2, 2), (0, 6))] * 2  # nothing is left for the last
    assert boxes((8, 6), (2, 2), (0, 0))[1] == ((2, 4), (0, 6))
    assert boxes((8, 6), (2, 2), (0, 0), order=(1, 0))[1] == ((4, 6), (0, 6))  # the second axis cuts first
    assert [h.copy for h in held((8, 6), (2, 2), (None, 0))] == [(0,), (0,), (1,), (1,)]


def test_a_stack_is_cut_where_the_ranks_parts_are():
    stack = Route("zeta", (6, 16, 12), "stack")
    assert [u.shape[0] for u in units("e", (6, 16, 12), stack, held((6, 16, 12), (4,), (0,)))] == [1, 1, 1, 1, 2]
    assert [u.shape[0] for u in units("e", (6, 16, 12), stack, held((6, 16, 12), (2,), (1,)))] == [3, 3]
    convolution = Route("zeta", (1, 8, 36), "convolution")
    assert [u.shape for u in units("c", (8, 4, 3, 3), convolution, held((8, 4, 3, 3), (2,), (0,)))] == [(8, 4, 3, 3)]


def test_parts_of_a_unit():
    unit = Unit("w", 3, (4, 6), MATRIX)
    assert overlap((slice(0, 5), slice(2, 4)), unit) == (slice(0, 2), slice(2, 4))
    assert overlap((slice(7, 9), slice(0, 6)), unit) is None


def test_work_is_balanced_and_stays_where_it_can():
    assert sorted(balance([5, 1, 1, 1, 1, 1], 2)) == [0, 1, 1, 1, 1, 1]
    assert balance([1, 1, 1, 1], 2, [[1], [1], [0], [0]]) == [1, 1, 0, 0]
    assert sorted(balance([1, 1, 1, 1], 4, [[0], [0], [0], [0]])) == [0, 1, 2, 3]  # one rank alone would do it all


def traffic(shape, mesh, cuts):
    """Entries sent for one stack of matrices."""
    holders = held(shape, mesh, cuts)
    arrays = {"w": (shape, Route("zeta", shape, "stack"), None, holders)}
    return sent(plan(arrays), {"w": holders})


def test_whole_experts_do_not_travel():
    assert traffic((8, 16, 12), (4,), (0,)) == [0, 0, 0, 0]
    assert traffic((8, 16, 12), (2, 2), (0, 1))[0] > 0  # halves of experts do


@pytest.mark.parametrize("name", [n for n in MODELS if n != "small"])
def test_every_rank_has_work_and_less_travels_than_if_all_gathered_all(name):
    found = cost(MODELS[name](), (8,), ("rows",))
    assert max(found.flops) < 1.15 * sum(found.flops) / 8
    assert max(found.sent) < 0.6 * gathered(MODELS[name](), (8,), ("rows",))


def test_copies_of_shares_all_work():
    """HSDP: 2 copies, each sharded over 4 ranks."""
    found = cost(MODELS["small"](), (2, 4), ("copies", "rows"))
    assert max(found.flops) < 1.15 * sum(found.flops) / 8
    assert sum(found.flops) == sum(cost(MODELS["small"](), (1,), ("rows",)).flops)
    assert communication.cost(MODELS["small"](), (1,), ("rows",)).sent == [0]


@pytest.mark.parametrize("width, count", {4096: 1, 2048: 5, 1024: 46, 512: 50}.items())
def test_a_batch_has_a_most_of_operations_or_an_eighth_of_all_entries(width, count):
    """2 rows^2 cols operations a matrix: one of 4096 x 4096 takes 1.4e11 and goes alone."""
    routes = {i: (Route("zeta", (1, width, width), ""), None) for i in range(400)}
    assert {len(batch) for batch in list(batches(routes))[:-1]} == {count}
