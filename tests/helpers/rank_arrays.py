"""Arrays on ranks of torch.distributed: given to them in parts, and read whole."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zeta.backends.torch import Zeta


def scatter(x: torch.Tensor, like: Any) -> DTensor:
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)  # every rank has it


def whole(x: Any) -> np.ndarray:
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return np.asarray(x.detach().double())


def read(model: nn.Module, optimizer: Zeta) -> dict[str, np.ndarray]:
    """Parameters by name, state as "KEY.NAME"."""
    arrays = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        arrays |= {f"{key}.{name}": whole(value) for key, value in optimizer.state.get(p, {}).items()}
    return arrays
