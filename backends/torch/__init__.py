"""Zeta for torch on CPU, CUDA and MPS: its own Newton-Schulz, and `torch.optim.Optimizer`s for all of a model.

The family is Zeta with another rule for the matrices: arguments, routing, ranks, AdamW for the rest, saved state and
half-precision parameters are Zeta's; what lr means is the rule's to say.
"""

from zeta import family, preconditioned

from .groups import param_groups as param_groups
from .optimizer import Zeta as Zeta
from .orthogonalize import newton_schulz as newton_schulz
from .portable import load_named_state as load_named_state
from .portable import named_state as named_state
from .portable import to_numpy as to_numpy
from .sharded import load_sharded as load_sharded
from .sharded import save_sharded as save_sharded
from .trainer import for_trainer as for_trainer


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
