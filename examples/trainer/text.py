"""The text: which files, which of them are held out, and the batches. Everything is a function of its arguments."""

import sysconfig
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

HELD_OUT = 0.05  # of the text, at least
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Text(NamedTuple):
    train: bytes
    validation: bytes


def load(path: Path | None = None) -> Text:
    """The text of a file or of a folder's files; None is the Python library's own source and documentation.

    Whole files are held out, in the order of a checksum of their names until they hold HELD_OUT of the text, so that a
    file added or removed moves no other. Where no file is small enough (a single one, say) its end is held out.
    Raises ValueError, with a remedy, where there is no text.
    """
    path, pattern = (path, "*") if path else (Path(sysconfig.get_path("stdlib")), "*.py")
    files = read(path, pattern)
    if not any(files.values()):
        raise ValueError(f"there is no text in {path}: --data takes a text file or a folder of them")
    return split(files)


def split(files: dict[str, bytes]) -> Text:
    """Files by name, some of them whole held out: see `load`."""
    total = sum(map(len, files.values()))
    train, validation, held = [], [], 0
    for _, text in sorted(files.items(), key=lambda item: crc32(item[0].encode())):
        if held < HELD_OUT * total and len(text) < 2 * HELD_OUT * total:
            validation.append(text)
            held += len(text)
        else:
            train.append(text)
    if not held:
        whole = b"\n".join(train)
        cut = int(len(whole) * (1 - HELD_OUT))
        return Text(whole[:cut], whole[cut:])
    return Text(b"\n".join(train), b"\n".join(validation))


def read(path: Path, pattern: str = "*") -> dict[str, bytes]:
    """Name below `path` -> contents, for the file itself, or every file there; hidden and binary ones are left out."""
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}: --data takes a text file or a folder of them")
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = {}
    for file in sorted(path.rglob(pattern)):
        inside = file.relative_to(path)
        if file.is_file() and not SKIPPED.intersection(inside.parts) and not file.name.startswith("."):
            text = file.read_bytes()
            if b"\0" not in text:
                files[inside.as_posix()] = text
    return files


def batch(tokens: np.ndarray, step: int, count: int, length: int, seed: int) -> np.ndarray:
    """(count, length) windows of tokens (n,): those of this step, whatever came before it."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length + 1, count)
    return np.stack([tokens[i : i + length] for i in starts]).astype(np.int32)


def windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """(at most count, length) windows spread evenly over tokens (n,), none twice: what validation looks at."""
    whole = len(tokens) // length
    starts = np.linspace(0, whole - 1, min(count, whole)).round().astype(int) * length
    return np.stack([tokens[i : i + length] for i in starts]).astype(np.int32)
