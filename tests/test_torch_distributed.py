"""Ranks of torch.distributed: however the parameters lie on them, ten steps are those of one process."""

from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import communication  # noqa: E402
import torch_ranks  # noqa: E402
from torch.multiprocessing import start_processes  # noqa: E402
from torch_ranks import Model, mlp, optimizer, read, start, taking_turns, train, train_mlp  # noqa: E402

from zeta import checkpoint, cli  # noqa: E402
from zeta.backends.torch import AdaMuon, Eta, load_named_state, load_sharded, named_state, save_sharded  # noqa: E402
from zeta.backends.torch_portable import whole  # noqa: E402

FLOAT32 = 6e-5  # of the distance moved: that of float32 products in zeta/machine.py
ONCE_ROUNDED = 4e-3  # updates rounded to bfloat16 on the way, 2 ** -9 each
EVERYWHERE = ["copies", "copies, state shared out", "rows", "columns", "experts", "partial gradients"]
EVERYWHERE += ["rows, then columns"]
HALF = ["half precision", "half precision, state shared out"]
CASES = [(ranks, name) for ranks in (1, 2, 4) for name in EVERYWHERE]
CASES += [(ranks, name) for ranks in (1, 2) for name in ["full state dict", "taking turns", *HALF]]
CASES += [(2, "tensor parallel"), (4, "rows, twice"), (4, "tensor parallel, rows")]


class Results:
    """{arrangement: arrays} of each rank, given their number, which is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, {}
        get_context("forkserver").set_forkserver_preload(["torch_ranks"])  # torch is imported once for all ranks

    def __call__(self, ranks: int) -> list[dict[str, Any]]:
        if ranks not in self.found:
            start_processes(torch_ranks.main, (ranks, str(self.folder)), nprocs=ranks, start_method="forkserver")
            files = [self.folder / f"{ranks}-{rank}.pt" for rank in range(ranks)]
            self.found[ranks] = [torch.load(file, weights_only=False) for file in files]
        return self.found[ranks]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("ranks"))


def one_process(name: str) -> dict[str, np.ndarray]:
    if name.startswith("tensor parallel"):
        return train_mlp(mlp())
    if name == "taking turns":
        return taking_turns()
    model = Model(torch.bfloat16 if name in HALF else torch.float32)
    opt = optimizer(model)
    train(model, opt)
    return read(model, opt)


def distance(name: str, got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any array, relative to how far it moved."""
    before = start() if not name.startswith("tensor parallel") else {k: p.detach() for k, p in mlp().named_parameters()}

    def far(key: str) -> float:
        moved = np.linalg.norm(want[key] - np.asarray(before.get(key, 0)))
        return float(np.linalg.norm(got[key] - want[key]) / (moved or 1))

    return max(map(far, got))


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_ten_steps_are_those_of_one_process(results: Results, ranks: int, name: str) -> None:
    got = [rank[name] for rank in results(ranks)]
    assert distance(name, got[0], one_process(name)) < FLOAT32
    for other in got[1:]:
        assert all(np.array_equal(got[0][key], other[key]) for key in got[0])  # or they would drift apart


@pytest.mark.parametrize("ranks", [2, 4])
def test_updates_can_travel_in_half_precision(results: Results, ranks: int) -> None:
    name = "half precision on the way"
    assert FLOAT32 < distance(name, results(ranks)[0][name], one_process(name)) < ONCE_ROUNDED


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_taken_for_matrices_are_caught(results: Results, ranks: int) -> None:
    name = "shards alone"
    assert distance(name, results(ranks)[0][name], one_process(name)) > 1000 * FLOAT32


@pytest.mark.parametrize("cut", communication.AXES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_work_and_state_are_shared_out_and_bytes_are_as_told(results: Results, ranks: int, cut: str) -> None:
    """On a 12-layer model: entries sent, operations and state of each rank, counted."""
    got = communication.Cost(*map(list, zip(*(rank[f"counted {cut}"] for rank in results(ranks)), strict=True)))
    model = communication.MODELS["small"]()
    assert got == communication.cost(model, (ranks,), (cut,))
    alone = communication.cost(model, (1,), (cut,))
    assert max(got.flops) < 1.15 * alone.flops[0] / ranks
    if cut != "copies":
        assert max(got.state) < 1.15 * alone.state[0] / ranks


def test_a_sharded_checkpoint_becomes_one_file_for_all(results: Results, tmp_path: Path) -> None:
    """Saved by four ranks after five steps, converted on the command line, continued by one process."""
    results(4)
    folder, file = results.folder / "saved-4", tmp_path / "one.safetensors"
    assert cli.main(["convert", str(folder), str(file)]) == 0
    arrays, settings = checkpoint.load(file)
    assert settings == {"step": 5}
    model = Model()
    del model.scalar
    opt = optimizer(model)
    load_named_state(model, opt, arrays)
    train(model, opt, range(5, 10))
    assert distance("rows", read(model, opt), one_process("rows")) < FLOAT32


def test_a_checkpoint_of_another_model_is_refused(results: Results) -> None:
    results(4)
    model = Model()  # with a parameter that the checkpoint lacks
    before = read(model, optimizer(model))
    with pytest.raises(ValueError, match=r"lacks \['scalar'\]: it belongs to another model"):
        load_sharded(results.folder / "saved-4", model, optimizer(model))
    with pytest.raises(ValueError, match="no checkpoint of save_sharded"):
        load_sharded(results.folder, model, optimizer(model))
    with pytest.raises(ValueError, match="is there already: give every checkpoint a folder of its own"):
        save_sharded(results.folder / "saved-4", model, optimizer(model))
    assert all(np.array_equal(before[name], array) for name, array in read(model, optimizer(model)).items())


def test_another_optimizers_state_is_refused() -> None:
    model = Model()
    opt = optimizer(model)
    train(model, opt, range(1))
    saved = named_state(model, opt)
    for wrong in (AdaMuon, Eta):
        other = wrong([{**opt.param_groups[0], "params": list(model.named_parameters())}])
        with pytest.raises(ValueError, match=f"but {wrong.__name__} keeps .*: it belongs to another optimizer"):
            load_named_state(model, other, saved)


def test_half_precision_becomes_portable(results: Results) -> None:
    """bfloat16, which NumPy lacks, as float32; the remainder joins a parameter that has room for it."""
    model = Model(torch.bfloat16)
    opt = optimizer(model)
    train(model, opt, range(5))
    arrays = whole(named_state(model, opt))
    assert arrays["wide"].dtype == np.float32
    again, wide = Model(torch.bfloat16), Model()
    opts = [optimizer(again), optimizer(wide)]
    for other, o in zip((again, wide), opts, strict=True):
        load_named_state(other, o, arrays)
    train(model, opt, range(5, 10))
    train(again, opts[0], range(5, 10))
    assert all(np.array_equal(a, read(model, opt)[name]) for name, a in read(again, opts[0]).items())
    exact = arrays["wide"] + arrays["optimizer.remainder.wide"]
    assert np.array_equal(wide.wide.detach().numpy(), exact) and not np.array_equal(exact, arrays["wide"])


def test_one_process_asks_no_process_group() -> None:
    with patch("zeta.backends.torch_wire.dist"), patch("zeta.backends.torch_places.dist") as dist:
        model = Model()
        train(model, optimizer(model), range(1))
    assert not dist.mock_calls
