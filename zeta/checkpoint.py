"""A run on disk: named arrays and the settings they belong to, in one safetensors file that any library can read.

A parameter is stored under its name, what the optimizer keeps for it as "optimizer.KEY.NAME". Zeta's keys are the same
in every library (`exp_avg`, `exp_avg_sq`, for AdamW's parameters `step`, in half precision `remainder`), so that a run
can change libraries. A digest beside the settings detects a file that was altered since.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

FORMAT, VERSION = "zeta", "2"  # 1 had no digest
Arrays = dict[str, np.ndarray[Any, Any]]


def save(path: Path | str, arrays: Arrays, settings: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all: what was there before stays until the new one is safely on disk.

    `settings` is whatever JSON can hold: hyper-parameters, shape, step. Raises ValueError for an array with NaN or
    infinity in it, OSError where the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            remedy = "continue from the one there with a lower lr" if path.exists() else "begin anew with a lower lr"
            raise ValueError(f"{name} holds NaN or infinity, so {path} was not written: {remedy}")
    arrays = {name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    header = {"format": FORMAT, "version": VERSION, "settings": json.dumps(settings)}
    # save_file would copy nothing, but where it is killed a file of its own is left (safetensors 0.8)
    content = serialize(arrays, header | {"digest": digest(arrays, header)})
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which is in the path's place when the block ends, and gone where the block raises."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")  # in the same folder, for a rename that is atomic
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} could not be written, and is as it was: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def load(path: Path | str) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, settings) as they were saved. Raises FileNotFoundError, or ValueError for any other kind of file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            check_header(path, header)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, AttributeError, TypeError) as error:  # the last two from dtypes that NumPy lacks
        raise ValueError(f"{path} is cut short, or no safetensors file ({error}): use another copy") from error
    if (actual := digest(arrays, header)) != header["digest"]:
        raise ValueError(
            f"{path} was altered after it was saved: its digest is {header['digest']!r}, that of its content {actual}: "
            "use another copy"
        )
    return arrays, json.loads(header["settings"])


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, outlast a power cut."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def read_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines, but for a last one that a kill cut short. Raises ValueError for others."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(
            f"{path} has a line that is no JSON ({error}): use another copy, or delete the line"
        ) from error


def check_header(path: Path, header: Mapping[str, str]) -> None:
    """Raises ValueError where a safetensors file's header is not one that `save` writes."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no checkpoint of zeta's: its header lacks format={FORMAT}")
    if (version := header.get("version")) != VERSION:
        raise ValueError(f"{path} has version {version}, this zeta reads {VERSION} alone: use the zeta that wrote it")
    if missing := {"settings", "digest"} - header.keys():
        raise ValueError(f"{path} was altered after it was saved: its header lacks {missing}: use another copy")


def digest(arrays: Arrays, header: Mapping[str, str]) -> str:
    """The SHA-256, in hexadecimal, of all that `load` returns: each array's name, dtype, shape and bytes; settings."""
    kinds = [(name, array.dtype.str, array.shape) for name, array in sorted(arrays.items())]
    content = sha256(json.dumps([header["format"], header["version"], header["settings"], kinds]).encode())
    for _, array in sorted(arrays.items()):
        content.update(array.reshape(-1).view(np.uint8).data)
    return content.hexdigest()
