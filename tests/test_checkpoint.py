"""A checkpoint comes back as it was, or is refused; a failed save costs nothing (a killed one: test_durability.py)."""

import json
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from zeta import checkpoint

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "optimizer.exp_avg.layer.weight": np.full((2, 3), 1e-300),
    "optimizer.step.layer.weight": np.array(7, np.float32),
}
SETTINGS = {"step": 7, "lr": 0.1, "betas": [0.95, 0.99], "data": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "a.safetensors", ARRAYS, SETTINGS)
    return tmp_path / "a.safetensors"


def assert_same(path: Path) -> None:
    arrays, settings = checkpoint.load(path)
    assert settings == SETTINGS and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        np.testing.assert_array_equal(arrays[name], array)


def test_comes_back_as_it_was(path: Path) -> None:
    assert_same(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "array", [ARRAYS["layer.weight"].T, np.arange(3, dtype=">f4"), np.zeros((0, 3)), np.array(True), np.float16([[1]])]
)
def test_arrays_of_any_kind_keep_their_values(path: Path, array: np.ndarray) -> None:
    checkpoint.save(path, {"a": array}, {})
    found = checkpoint.load(path)[0]["a"]
    assert found.dtype == array.dtype.newbyteorder("<") and found.shape == array.shape
    np.testing.assert_array_equal(found, array)


def test_is_plain_safetensors(path: Path) -> None:
    np.testing.assert_array_equal(load_file(path)["layer.weight"], ARRAYS["layer.weight"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_cut_short_is_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.load(path)


HEADER = {"format": "zeta", "version": checkpoint.VERSION, "settings": "{}"}
BFLOAT16 = {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}  # NumPy has none


def raw(header: dict[str, Any]) -> bytes:
    """A safetensors file of two bytes of data."""
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + bytes(2)


FOREIGN = {
    "nothing": (b"", "cut short"),
    "text": (b"ten bytes, and more", "no safetensors file"),
    "a pickle": (pickle.dumps(ARRAYS), "no safetensors file"),
    "safetensors": (serialize(ARRAYS), "no checkpoint of zeta's"),
    "another program's": (serialize(ARRAYS, {"format": "pt"}), "no checkpoint of zeta's"),
    "a model in bfloat16": (raw(BFLOAT16), "no checkpoint of zeta's"),
    "ours in bfloat16": (raw(BFLOAT16 | {"__metadata__": HEADER | {"digest": ""}}), "bfloat16"),
    "version 1": (serialize(ARRAYS, HEADER | {"version": "1"}), "has version 1, this zeta reads 2 alone"),
    "version 999": (serialize(ARRAYS, HEADER | {"version": "999"}), "use the zeta that wrote it"),
    "no digest": (serialize(ARRAYS, HEADER), "its header lacks {'digest'}"),
    "no settings": (serialize(ARRAYS, {"format": "zeta", "version": "2", "digest": ""}), "its header lacks"),
    "another's digest": (
        serialize(ARRAYS, HEADER | {"digest": "f00"}),
        "altered after it was saved: its digest is 'f00'",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_what_is_not_there_is_told(path: Path) -> None:
    for absent in (path.parent, path.parent / "b"):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            checkpoint.load(absent)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_numbers_do_not_replace_good_ones(path: Path, value: float) -> None:
    broken = ARRAYS | {"b": np.array([1.0, value])}
    told = r"b holds NaN or infinity, so .* was not written: continue from the one there"
    with pytest.raises(ValueError, match=told):
        checkpoint.save(path, broken, SETTINGS)
    assert_same(path)
    with pytest.raises(ValueError, match=r"new was not written: begin anew"):
        checkpoint.save(path.with_name("new"), broken, SETTINGS)
    assert not path.with_name("new").exists()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files end at `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_nothing(path: Path) -> None:
    with disk_of(10_000), pytest.raises(OSError, match="could not be written, and is as it was: "):
        checkpoint.save(path, {"a": np.zeros(10_000)}, SETTINGS)
    assert_same(path)
    assert list(path.parent.iterdir()) == [path]
