"""Zeta for torch on CPU, CUDA and MPS: a fused Newton-Schulz, and `torch.optim.Optimizer`s for all of a model."""

from .torch_family import SOAP, AdaGO, AdaMuon, Dion2, Eta, Muon, NorMuon, OLion, Schattor, Shampoo, Signum
from .torch_groups import param_groups
from .torch_newton_schulz import newton_schulz
from .torch_optimizer import Zeta
from .torch_portable import load_named_state, named_state
from .torch_sharded import load_sharded, save_sharded

__all__ = [
    "SOAP",
    "AdaGO",
    "AdaMuon",
    "Dion2",
    "Eta",
    "Muon",
    "NorMuon",
    "OLion",
    "Schattor",
    "Shampoo",
    "Signum",
    "Zeta",
    "load_named_state",
    "load_sharded",
    "named_state",
    "newton_schulz",
    "param_groups",
    "save_sharded",
]
