"""The dtype that products run in by default, told to this process or to its children: whichever machine it is.

torch chooses bfloat16 on a CPU that multiplies it and float32 on another; on a GPU both libraries choose float16.
"""

import os
import runpy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

DEFAULTS = ("float32", "bfloat16", "float16")
# What the losses of a run may part by, relative, where it changes its library or its number of ranks. Measured over 200
# steps from MLX to torch and back: up to 6e-7, 4.0e-4 and 5.2e-5. They part further, in float32 too, where the loss
# leaps: up to 2.3e-3, 3.5e-2 and 1.2e-1 on texts that are learnt by heart.
LOSSES = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 2e-4}
CHOOSERS = {"torch": ["torch.orthogonalize"], "mlx.core": ["mlx.orthogonalize", "mlx.optimizer"]}
TOLD = str(Path(__file__).with_name("told"))
if TOLD not in os.environ.get("PYTHONPATH", ""):  # not in a child process, where Python has run it by now
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TOLD, os.environ.get("PYTHONPATH")]))
    runpy.run_path(f"{TOLD}/sitecustomize.py")


@contextmanager
def default(dtype: str) -> Iterator[None]:
    """Inside, what is given no `ns_dtype` is multiplied, on this CPU, as where `dtype` is the default."""
    with ExitStack() as stack:
        for name, files in CHOOSERS.items():
            if not find_spec(name.partition(".")[0]):
                continue
            library = import_module(name)
            for module in (import_module(f"zeta.backends.{file}") for file in files):
                if name == "torch" and dtype != "float16":
                    stack.enter_context(patch.object(module, "CPU_HAS_BFLOAT16", dtype == "bfloat16"))
                elif dtype == "float16" or library.default_device() == library.gpu:  # MLX has no bfloat16 by default
                    chosen = library.float16 if dtype == "float16" else library.float32
                    stack.enter_context(patch.object(module, "working_dtype", partial(_unless_wide, chosen)))
        yield


def _unless_wide(dtype: Any, x: Any) -> Any:
    return x.dtype if "float64" in str(x.dtype) else dtype


def environment(dtype: str, *folders: Any) -> dict[str, str]:
    """That of a child process where `dtype`, float32 or bfloat16, is torch's default; `folders` join its path."""
    path = os.pathsep.join([*map(str, folders), os.environ["PYTHONPATH"]])
    return os.environ | {"PYTHONPATH": path, "ZETA_TEST_BFLOAT16": str(int(dtype == "bfloat16"))}
