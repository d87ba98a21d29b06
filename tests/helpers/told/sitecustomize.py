"""Makes torch believe, before it is imported, whether this CPU multiplies bfloat16: ZETA_TEST_BFLOAT16 is 1 or 0.

Python runs a file of this name as it starts, where PYTHONPATH leads to it: so conftest.py reaches every child process.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class Teller(MetaPathFinder):
    """Finds torch.cpu as Python would, and answers for it once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._is_avx512_bf16_supported = module._is_amx_tile_supported = lambda: answer == "1"

        spec.loader.exec_module = exec_module
        return spec


answer = os.environ.get("ZETA_TEST_BFLOAT16", "")
if answer:
    assert answer in ("0", "1"), f"ZETA_TEST_BFLOAT16 is {answer!r}, but must be 0 or 1"
    assert "torch" not in sys.modules, "torch is imported already: ZETA_TEST_BFLOAT16 came too late"
    sys.meta_path.insert(0, Teller())
