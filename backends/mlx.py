"""Zeta for MLX: a fused Newton-Schulz, and `mlx.optimizers.Optimizer`s for all of a model's parameters."""

from .mlx_family import SOAP, AdaGO, AdaMuon, Dion2, Eta, Muon, NorMuon, OLion, Schattor, Shampoo, Signum
from .mlx_newton_schulz import newton_schulz
from .mlx_optimizer import Zeta

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
