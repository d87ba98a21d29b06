"""Zeta for MLX: a fused Newton-Schulz, and `mlx.optimizers.Optimizer`s for all of a model's parameters."""

from .family import SOAP, AdaGO, AdaMuon, Dion2, Eta, Muon, NorMuon, OLion, Schattor, Shampoo, Signum
from .optimizer import Zeta
from .orthogonalize import newton_schulz
from .portable import load_named_state, named_state, to_numpy

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
    "named_state",
    "newton_schulz",
    "to_numpy",
]
