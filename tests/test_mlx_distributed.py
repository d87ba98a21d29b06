"""MLX's Zeta on two and three ranks of mlx.launch: what one process computes, on every rank, for 1/N of the work."""

import shutil
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx_ranks  # noqa: E402
import train_lm  # noqa: E402
from mlx_launch import launch, results  # noqa: E402
from trainer.loop import FILE  # noqa: E402

from zeta import checkpoint  # noqa: E402
from zeta.parity.checks import TOLERANCE, assert_close  # noqa: E402

FROZEN = f"param.{mlx_ranks.FROZEN}"
TINY = "--layers 1 --width 16 --heads 2 --kv-heads 1 --context 16 --batch 4 --steps 8 --sample 3 --device cpu"
BOUND = TOLERANCE["float32"].step


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return results(mlx_ranks.__file__, tmp_path_factory)


@pytest.fixture(params=[2, 3])
def ranks(request, launched):
    return launched(request.param)


@pytest.fixture(scope="module")
def alone():
    return mlx_ranks.ten_steps()


def assert_same_steps(got, want):
    assert got.keys() == want.keys()
    origins = {f"param.{name}": origin for name, origin in mlx_ranks.parameters().items()}
    for name in want:
        assert_close(got[name], want[name], BOUND, origins.get(name, 0.0) if name != FROZEN else 0.0)


def test_ten_steps_equal_one_process(ranks, alone):
    assert_same_steps(ranks[0]["steps"], alone)


def assert_same_family(got, want, bound):
    origins = mlx_ranks.family_start()
    for name, array in want.items():
        assert_close(got[name], array, bound, origins.get(name.removeprefix("param."), 0.0))


EVERY = [(2, kind) for kind in mlx_ranks.KINDS] + [(3, kind) for kind in mlx_ranks.UNLIKE]


@pytest.mark.parametrize(("ranks", "kind"), EVERY, indirect=["ranks"])
def test_every_class_equals_one_process(ranks, kind):
    want = mlx_ranks.family_steps(kind)
    assert_same_family(ranks[0][f"family {kind}"], want, BOUND)
    for other in ranks[1:]:
        assert all(np.array_equal(other[f"family {kind}"][name], ranks[0][f"family {kind}"][name]) for name in want)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("kind", ["Zeta", "Eta", "NorMuon"])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_in_half_precision_too(ranks, half, kind):
    """An owner multiplies what one process multiplies, and what it sends has the products' dtype already."""
    want = mlx_ranks.family_steps(kind, dtype=getattr(mx, half))
    assert_same_family(ranks[0][f"{half} {kind}"], want, TOLERANCE[half].step)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("mistake", ["dropped", "halved"])
def test_a_lost_result_or_a_matrix_taken_in_halves_is_noticed(ranks, alone, mistake):
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_steps(ranks[0][mistake], alone)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_messages_of_gradients_and_matrices_keep_their_order(ranks):
    for name, want in mlx_ranks.many_messages().items():
        assert_close(ranks[0]["messages"][name], want, BOUND)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_optimizers_beside_one_another_keep_the_order_too(ranks):
    for name, want in mlx_ranks.several_optimizers().items():
        assert_close(ranks[0]["several"][name], want, BOUND)


def test_all_ranks_hold_the_same_bits(ranks):
    for case in ranks[0].keys() & {"steps", "several", "zeta", "adamw", "muon"}:
        for other in ranks[1:]:
            assert all(np.array_equal(other[case][name], array) for name, array in ranks[0][case].items())


def test_each_rank_does_its_part_of_the_work(ranks):
    found, whole = [int(rank["work"]["flops"]) for rank in ranks], mlx_ranks.work()
    assert sum(found) == whole
    np.testing.assert_allclose(found, whole / len(ranks), rtol=0.15)


def test_a_model_trains_as_on_one_rank(ranks):
    for optimizer in ranks[0].keys() & {"zeta", "adamw", "muon"}:
        got, want = ranks[0][optimizer], mlx_ranks.training(optimizer)
        assert list(got["steps"][:, 1]) == [float(step < len(ranks)) for step in range(4)]  # who was told to stop
        np.testing.assert_allclose(got["steps"][:, 0], want["steps"][:, 0], rtol=1e-5)
        np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)


def test_one_rank_sends_nothing(alone, monkeypatch):
    monkeypatch.delattr(mx.distributed, "all_gather")
    monkeypatch.delattr(mx.distributed, "all_sum")
    single = mlx_ranks.ten_steps(mx.distributed.init())
    assert all(np.array_equal(single[name], want) for name, want in alone.items())
    mlx_ranks.training()


# The training script, whose rank 1 is killed in step 6.
KILLED = """
import os, signal, sys
import train_lm
from trainer import on_mlx

def killed(self, *args, **names):
    if next(calls) == 6 and self.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **names)

step, calls = on_mlx.Trainer.step, iter(range(1, 100))
on_mlx.Trainer.step = killed
sys.exit(train_lm.main(sys.argv[1:]))
"""


def losses(folder):
    return np.array([line["loss"] for line in checkpoint.read_lines(folder / "metrics.jsonl") if "loss" in line])


@pytest.mark.parametrize("optimizer", ["zeta", "eta"])
def test_the_training_script_on_two_ranks_is_that_of_one_and_is_continued_by_any(tmp_path, optimizer, monkeypatch):
    examples = Path(train_lm.__file__).parent
    flags = [*TINY.split(), "--data", str(examples / "trainer/loop.py"), "--optimizer", optimizer, "--eval-every", "4"]
    (tmp_path / "killed.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", str(examples))
    printed = launch(2, tmp_path / "killed.py", *flags, "--out", tmp_path / "two")
    assert printed.count(f"parameters, {optimizer} on mlx") == 1  # one rank speaks
    assert checkpoint.load(tmp_path / "two" / FILE)[1]["step"] == 4
    assert train_lm.main([*flags, "--backend", "mlx", "--out", str(tmp_path / "one")]) == 0
    for name, resumed in {"again": (2,), "one rank": ("mlx",), "torch": ("torch",)}.items():
        shutil.copytree(tmp_path / "two", tmp_path / name)
        if resumed == (2,):
            launch(2, examples / "train_lm.py", *flags, "--resume", "--out", tmp_path / name)
        else:
            again = [*flags, "--resume", "--backend", *resumed, "--out", str(tmp_path / name)]
            assert train_lm.main(again) == 0
        got, want = losses(tmp_path / name), losses(tmp_path / "one")
        assert len(got) == 8
        np.testing.assert_allclose(got, want, rtol=1e-4 if name == "torch" else 1e-5)
