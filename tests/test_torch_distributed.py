"""Ranks of torch.distributed: however the parameters lie on them, ten steps are those of one process."""

import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_ranks  # noqa: E402
from started_ranks import Results  # noqa: E402
from torch_ranks import Model, mlp, optimizer, read, start, taking_turns, train, train_mlp  # noqa: E402

from zeta import checkpoint, cli  # noqa: E402
from zeta.backends.torch import AdaMuon, Eta, load_named_state, load_sharded, named_state, save_sharded, to_numpy  # noqa: E402
from zeta.parity.checks import relative_error  # noqa: E402

FLOAT32 = 6e-5  # of the distance moved: that of float32 products in zeta/parity/targets.py
ONCE_ROUNDED = 4e-3  # updates rounded to bfloat16 on the way, 2 ** -9 each
HALF = ["half precision", "half precision, state sharded"]
ROWS = ["rows, then columns"]  # FSDP2, which takes no scalars
MORE_ROWS = ["rows", "columns", "partial gradients", "full state dict", "state of one process in rows"]
COPIES = ["copies", "taking turns", "tensor parallel", "state of one process sharded"]
CASES = [(ranks, name) for ranks in (1, 2, 4) for name in ["copies, state sharded", *ROWS]]
CASES += [(1, "half precision"), (2, "experts"), (4, "experts"), (4, "rows, twice"), (4, "tensor parallel, rows")]
CASES += [(2, name) for name in [*MORE_ROWS, *COPIES, *HALF]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(torch_ranks.main, tmp_path_factory.mktemp("ranks"))


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
    """The largest difference of any array, relative to how far it moved. All arrays must be there, and finite."""
    before = start() if not name.startswith("tensor parallel") else {k: p.detach() for k, p in mlp().named_parameters()}
    if name in [*ROWS, *MORE_ROWS, "rows, twice"]:
        want = {key: array for key, array in want.items() if not key.endswith("scalar")}
    assert got.keys() == want.keys()
    return max(relative_error(got[key], want[key], np.asarray(before.get(key, 0.0))) for key in want)


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_ten_steps_are_those_of_one_process(results: Results, ranks: int, name: str) -> None:
    got = [rank[name] for rank in results(ranks)]
    assert distance(name, got[0], one_process(name)) < FLOAT32
    for other in got[1:]:
        assert all(np.array_equal(got[0][key], other[key]) for key in got[0])  # or they would drift apart


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.0, None])
def test_wrong_and_missing_arrays_are_caught(wrong: float | None) -> None:
    want = one_process("taking turns")
    got = {key: array.copy() for key, array in want.items()}
    if wrong is None:
        del got["exp_avg.wide"]
        with pytest.raises(AssertionError):
            distance("taking turns", got, want)
    else:
        got["exp_avg.wide"][0, 0] = wrong
        assert not distance("taking turns", got, want) < FLOAT32


def test_updates_can_travel_in_half_precision(results: Results) -> None:
    name = "half precision on the way"
    assert FLOAT32 < distance(name, results(2)[0][name], one_process(name)) < ONCE_ROUNDED


def test_shards_taken_for_matrices_are_caught(results: Results) -> None:
    got, want = results(2)[0]["shards alone"], one_process("rows")
    assert relative_error(got["wide"], want["wide"], start()["wide"]) > 1000 * FLOAT32


REFUSED = {
    "other gradients": "RuntimeError: the ranks have gradients of different parameters",
    "no gradients": "RuntimeError: the ranks have gradients of different parameters",
    "a copy": "TypeError: shard_state=True leaves each rank the state of a part",
    "a part": "ValueError: state of shape .* but this optimizer keeps it whole on each rank",
    "columns as rows": "ValueError: state of shape .* but this optimizer keeps it placed as",
    "FSDP1 True": "ValueError: the parameter .* shard the model with .*fully_shard",
    "FSDP1 True, named": "ValueError: the parameter .* shard the model with .*fully_shard",
    "FSDP1 False": "ValueError: the parameter .* shard the model with .*fully_shard",
    "FSDP1 False, named": "ValueError: the parameter .* shard the model with .*fully_shard",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_ranks_cannot_do_is_refused_on_all_of_them(results: Results, what: str) -> None:
    for rank in results(2):
        assert re.match(REFUSED[what], rank["refused"][what])


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
        with pytest.raises(ValueError, match=f"but {wrong.__name__} keeps .* the optimizer that wrote it, Zeta, with"):
            load_named_state(model, other, saved)


def test_half_precision_becomes_portable(results: Results) -> None:
    """bfloat16, which NumPy lacks, as float32; the remainder joins a parameter that has room for it."""
    model = Model(torch.bfloat16)
    opt = optimizer(model)
    train(model, opt, range(5))
    arrays = to_numpy(named_state(model, opt))
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
    with patch("zeta.backends.torch.mail.dist"), patch("zeta.backends.torch.placement.dist") as dist:
        model = Model()
        train(model, optimizer(model), range(1))
    assert not dist.mock_calls
