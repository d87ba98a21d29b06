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
        8192,
        "measured, torch 2.11, x x^T in float16, times cuBLAS's speed: 0.61 for one of 2048 rows, 0.64 for eight, 1.00 "
        "for one of 4096, 1.03 for one of 8192; added to a matrix 0.82, 0.84, 0.96. Eight of 4096 rows: 1.24, added "
        "1.13, but a step takes matrices of that size one by one",
    ),
    Gate("", 8192, "not measured: the H100's"),
)


@cache
def kernel_rows(device: torch.device) -> float:
    """The gate of this CUDA device; inf without Triton, and before Ampere, whose tensor cores it does not drive."""
    if torch.cuda.get_device_capability(device) < (8, 0) or find_spec("triton") is None:
        return inf
    name = torch.cuda.get_device_name(device)
    return next(gate.rows for gate in GATES if gate.name in name)
