"""Zeta for MLX: its own Newton-Schulz, and `mlx.optimizers.Optimizer`s for all of a model's parameters.

The family is Zeta with another rule for the matrices: arguments, routing, ranks, AdamW for the rest, saved state and
half-precision parameters are Zeta's; what learning_rate means is the rule's to say.
"""

from zeta import family, preconditioned

from .optimizer import Zeta as Zeta
from .orthogonalize import newton_schulz as newton_schulz
from .portable import load_named_state as load_named_state
from .portable import named_state as named_state
from .portable import to_numpy as to_numpy


class Signum(Zeta, rule=family.signum): ...


class Muon(Zeta, rule=family.muon): ...


class AdaMuon(Zeta, rule=family.adamuon): ...


class NorMuon(Zeta, rule=family.normuon): ...


class Eta(Zeta, rule=family.eta): ...


class OLion(Zeta, rule=family.olion): ...


class AdaGO(Zeta, rule=family.adago): ...


class Dion2(Zeta, rule=family.dion2): ...


class Shampoo(Zeta, rule=preconditioned.shampoo): ...


class SOAP(Zeta, rule=preconditioned.soap): ...


class Schattor(Zeta, rule=preconditioned.schattor): ...
