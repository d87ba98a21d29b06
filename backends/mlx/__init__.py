"""Zeta for MLX: a fused Newton-Schulz, and `mlx.optimizers.Optimizer`s for all of a model's parameters."""

from .family import SOAP, AdaGO, AdaMuon, Dion2, Eta, Muon, NorMuon, OLion, Schattor, Shampoo, Signum
from .optimizer import Zeta
from .orthogonalize import newton_schulz

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
    "newton_schulz",
]
