"""The model that a command line names: a function to call, or a config of Transformers or mlx-lm."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeta.extras import EXTRAS, need


def find_model(source: str, library: str | None = None) -> Any:
    """The torch or MLX model of "package.module:function" (called without arguments), or of a config.json or its
    folder: Transformers' or mlx-lm's, by `library` ("torch" or "mlx"), whose parameters take no memory.

    Raises ValueError, with a remedy, for anything else; Missing where the model's library is not installed.
    """
    if source.endswith(".json") or Path(source).is_dir():
        return _from_config(Path(source), library or _installed())
    module, _, name = source.partition(":")
    if not name:
        raise ValueError(f"{source!r} names no model: write package.module:function, or the path of a config.json")
    sys.path.insert(0, "")  # as `python -m` does: the user's own files
    try:
        make: Any = import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        _need_library_of(source, error)
        raise ValueError(f"{source!r} could not be found: {error}") from error
    except Exception as error:  # of the user's own code
        raise ValueError(f"{source!r} could not be imported: {type(error).__name__}: {error}") from error
    if not hasattr(make, "parameters") or isinstance(make, type):
        try:
            make = make()
        except Exception as error:
            _need_library_of(source, error)
            raise ValueError(f"{source!r} was called without arguments: {type(error).__name__}: {error}") from error
    if not hasattr(make, "parameters"):
        raise ValueError(f"{source!r} gave {type(make).__name__}, which has no parameters: name what makes a model")
    return make


def _need_library_of(source: str, error: Exception) -> None:
    """Raises Missing where the error says that the user's code imports a library which an extra would bring."""
    if isinstance(error, ModuleNotFoundError) and (library := str(error.name).partition(".")[0]) in EXTRAS:
        need(source, library)


def _installed() -> str:
    return "mlx" if find_spec("mlx_lm") and not find_spec("torch") else "torch"


def _from_config(path: Path, library: str) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    need("a config.json", *(("mlx", "mlx-lm") if library == "mlx" else ("torch", "transformers")))
    try:
        return _of_mlx_lm(file) if library == "mlx" else _on_meta(file)
    except Exception as error:  # neither raises anything narrower
        why = " ".join(f"{type(error).__name__}: {error}".split())
        name = "mlx-lm" if library == "mlx" else "Transformers"
        raise ValueError(f"{file} is no config that {name} can read: {why}") from error


def _of_mlx_lm(file: Path) -> Any:
    """Its arrays are lazy: what they would hold is never computed."""
    import json

    from mlx_lm.utils import _get_classes  # mlx-lm 0.32 has no public way from a config to a model

    config = json.loads(file.read_text())
    model, arguments = _get_classes(config)
    return model(arguments.from_dict(config))


def _on_meta(file: Path) -> Any:
    import torch
    import transformers

    auto: Any = transformers.AutoModel
    config = transformers.AutoConfig.from_pretrained(str(file))
    name = next(iter(getattr(config, "architectures", None) or []), "")
    with torch.device("meta"):
        make = getattr(transformers, name, None) if name else None
        return make(config) if make else auto.from_config(config)
