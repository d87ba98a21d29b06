"""Which extra of `pip install 'zeta-optim[EXTRA]'` brings a library that something here needs."""

from importlib.util import find_spec

EXTRAS = {
    "torch": "torch",
    "mlx": "mlx",
    "matplotlib": "train",
    "tokenizers": "train",
    "transformers": "integrations",
    "mlx-lm": "integrations",
}


class Missing(ModuleNotFoundError):
    """A library is not installed. The message, one line, names what needs it and the command that brings it."""


def need(what: str, *libraries: str) -> None:
    """Raises Missing where one of the libraries, all of them keys of EXTRAS, is not installed."""
    missing = [library for library in libraries if not find_spec(library.replace("-", "_"))]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[library] for library in missing))
        raise Missing(f"{what} needs {' and '.join(missing)}: pip install 'zeta-optim[{extras}]'", name=missing[0])
