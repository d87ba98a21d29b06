"""A run saved by every rank its own part, through torch.distributed.checkpoint, and made one portable file of."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zeta.portable import parameter_of

from .placement import zeros
from .portable import check_saved, load_named_state, named, named_state, owners, to_numpy

SETTINGS = "zeta.json"


def save_sharded(folder: Path | str, params: Any, optimizers: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a new folder, whole or not at all. All ranks call it; `params` and `optimizers` as for `named_state`.

    `settings` is whatever JSON can hold. Raises ValueError where the folder is there already.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    from zeta.checkpoint import sync  # which needs safetensors

    text = json.dumps(dict(settings or {}))
    folder, first = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    part = folder.with_name(f".{folder.name}.part")
    if folder.exists():
        raise ValueError(f"{folder} is there already: give every checkpoint a folder of its own, by its step")
    if first:
        shutil.rmtree(part, ignore_errors=True)  # of a job that was killed
    _barrier()
    save(dict(named_state(params, optimizers)), checkpoint_id=part)
    if first:
        (part / SETTINGS).write_text(text)
        for path in (part / SETTINGS, part):  # torch itself does so for its files
            sync(path)
        os.replace(part, folder)
        sync(folder.parent)
    _barrier()


def load_sharded(folder: Path | str, params: Any, optimizers: Any) -> dict[str, Any]:
    """The settings that `save_sharded` was given; parameters and state continue from it, on any number of ranks.

    Raises ValueError, before anything is changed, where names or shapes do not fit the model.
    """
    saved, model, owner = _saved(Path(folder)), named(params), owners(optimizers)
    check_saved({name: tuple(size) for name, (size, _) in saved.items()}, model, owner)
    arrays: dict[str, Any] = {}
    for full, (size, dtype) in saved.items():
        p = model[parameter_of(full, model)]
        place = owner[p].place(p) if hasattr(owner.get(p), "place") else None
        if size != p.shape or (full not in model and full.startswith("optimizer.step.")):
            arrays[full] = torch.zeros(size, dtype=dtype)
        else:
            arrays[full] = zeros(p, dtype, None if full in model else place)
    _load(arrays, folder)
    settings = _settings(Path(folder))
    load_named_state(params, optimizers, arrays)
    return settings


def convert(folder: Path, file: Path) -> None:
    """Makes the folder of `save_sharded` one file of `zeta.checkpoint`, which every library reads. One process does it.

    Raises ValueError for a folder that is none of `save_sharded`'s, or damaged.
    """
    from zeta import checkpoint

    arrays: dict[str, Any] = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in _saved(folder).items()}
    _load(arrays, folder, alone=True)
    checkpoint.save(file, to_numpy(arrays), _settings(folder))


def _saved(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every array in the folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not (folder / SETTINGS).is_file() or not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no checkpoint of save_sharded: it lacks {SETTINGS} or .metadata")
    with _readable(folder):
        entries: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _load(arrays: dict[str, Any], folder: Path | str, alone: bool = False) -> None:
    """Fills the arrays, by all ranks of a job, or by this process alone."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with _readable(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # torch 2.13 says so of one process
        load(arrays, checkpoint_id=folder, no_dist=alone)


def _settings(folder: Path) -> dict[str, Any]:
    with _readable(folder):
        return dict(json.loads((folder / SETTINGS).read_text()))


@contextmanager
def _readable(folder: Path | str) -> Iterator[None]:
    """Makes a ValueError of whatever torch 2.13, pickle and zipfile raise for a damaged file, or one that is gone."""
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, with a traceback for its text

    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise ValueError(f"{folder} cannot be read, and may be damaged ({reason}): use another copy") from error


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
