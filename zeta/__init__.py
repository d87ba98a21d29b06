"""Zeta: one matrix optimizer, the same algorithm on NumPy, torch and MLX."""

import platform
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from zeta import adamw, family
from zeta.coefficients import auto_coefficients
from zeta.core import COEFFICIENTS, Hyper, init, newton_schulz, update
from zeta.extras import need
from zeta.routing.by_module import routes
from zeta.routing.by_name import route
from zeta.routing.layout import Route
from zeta.routing.report import report

__all__ = [
    "COEFFICIENTS",
    "Hyper",
    "Route",
    "adamw",
    "auto_coefficients",
    "backend",
    "family",
    "init",
    "newton_schulz",
    "report",
    "route",
    "routes",
    "update",
]


def backend(name: str = "auto") -> ModuleType:
    """`zeta.backends.torch` or `zeta.backends.mlx`; "auto" is MLX on an Apple GPU, else torch, else MLX.

    Raises ValueError for any other name, ModuleNotFoundError where the library is not installed.
    """
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        order = ["mlx", "torch"] if apple else ["torch", "mlx"]
        name = next((library for library in order if find_spec(library)), order[0])
    if name not in ("torch", "mlx"):
        raise ValueError(f'there is no backend {name!r}: choose "auto", "torch" or "mlx"')
    need(f"zeta.backends.{name}", name)
    return import_module(f"zeta.backends.{name}")
