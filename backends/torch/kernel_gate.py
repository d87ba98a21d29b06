"""From how many rows a GPU's symmetric products are the Triton kernel's, and not cuBLAS's: a table with its sources.

`zeta bench --device cuda` measures both and prints the line of its GPU.
"""

from functools import cache
from importlib.util import find_spec
from math import inf
from typing import NamedTuple

import torch


class Gate(NamedTuple):
    name: str  # is part of the device's
    rows: float
    source: str


GATES = (
    Gate(
        "H100",
        4096,
        "published for a kernel like ours, one matrix in bfloat16: 0.69 to 0.78 of cuBLAS's speed up to 2048 rows, "
        "1.26 times it at 4096, 1.46 at 8192 (https://github.com/pytorch/pytorch/pull/184886)",
    ),
    Gate("", 4096, "not measured: the H100's"),
)


@cache
def kernel_rows(device: torch.device) -> float:
    """The gate of this CUDA device; inf without Triton, and before Ampere, whose tensor cores it does not drive."""
    if torch.cuda.get_device_capability(device) < (8, 0) or find_spec("triton") is None:
        return inf
    name = torch.cuda.get_device_name(device)
    return next(gate.rows for gate in GATES if gate.name in name)
