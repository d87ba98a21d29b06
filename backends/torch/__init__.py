"""Zeta for torch on CPU, CUDA and MPS: a fused Newton-Schulz, and `torch.optim.Optimizer`s for all of a model."""

from .family import SOAP, AdaGO, AdaMuon, Dion2, Eta, Muon, NorMuon, OLion, Schattor, Shampoo, Signum
from .groups import param_groups
from .optimizer import Zeta
from .orthogonalize import newton_schulz
from .portable import load_named_state, named_state, to_numpy
from .sharded import load_sharded, save_sharded
from .trainer import for_trainer

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
    "for_trainer",
    "load_named_state",
    "load_sharded",
    "named_state",
    "newton_schulz",
    "param_groups",
    "save_sharded",
    "to_numpy",
]
