"""The dtype that products run in by default, told to this process or to the children of one: whichever CPU it is.

torch chooses bfloat16 on a CPU that multiplies it and float32 on another, both libraries float16 on a GPU, which is
asked for by name here, on the CPU.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

DEFAULTS = ("float32", "bfloat16", "float16")


@contextmanager
def default(dtype: str) -> Iterator[None]:
    """Inside, an optimizer that is given no `ns_dtype` multiplies as where `dtype` is the default."""
    with ExitStack() as stack:
        if find_spec("torch"):
            answer = dtype == "bfloat16"
            stack.enter_context(patch("zeta.backends.torch_newton_schulz.CPU_HAS_BFLOAT16", answer))
        for library in ("torch", "mlx.core") if dtype == "float16" else ():
            if find_spec(library.partition(".")[0]):
                named = {"ns_dtype": import_module(library).float16}
                init = import_module(f"zeta.backends.{library.partition('.')[0]}").Zeta.__init__
                stack.enter_context(patch.dict(init.__kwdefaults__, named))
        yield


def environment(dtype: str, *folders: str) -> dict[str, str]:
    """That of a child process where `dtype`, float32 or bfloat16, is torch's default; `folders` join its path."""
    path = os.pathsep.join([*folders, os.environ["PYTHONPATH"]])
    return os.environ | {"PYTHONPATH": path, "ZETA_TEST_BFLOAT16": str(int(dtype == "bfloat16"))}
