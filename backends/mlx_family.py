"""The family for MLX: each is `Zeta` with another rule for the matrices (`zeta.family`, `zeta.preconditioned`).

Arguments, routing, ranks, AdamW for the rest, saved state and half-precision parameters are Zeta's; what learning_rate
means is the rule's to say.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from zeta import family, preconditioned
from zeta.core import Hyper

from .mlx_optimizer import Zeta

Rate = float | Callable[[mx.array], mx.array]
_LR = Hyper().lr


class Signum(Zeta):
    """Signum (arXiv 1802.04434): see `zeta.family.signum`."""

    rule = family.signum


class Muon(Zeta):
    """Muon (Keller Jordan, 2024): see `zeta.family.muon`."""

    rule = family.muon


class AdaMuon(Zeta):
    """AdaMuon (arXiv 2507.11005): see `zeta.family.adamuon`."""

    rule = family.adamuon


class NorMuon(Zeta):
    """NorMuon (arXiv 2510.05491): see `zeta.family.normuon`."""

    rule = family.normuon


class Eta(Zeta):
    """Eta, our own: see `zeta.family.eta`."""

    rule = family.eta


class OLion(Zeta):
    """OLion (arXiv 2602.01105): see `zeta.family.olion`."""

    rule = family.olion


class Shampoo(Zeta):
    """Shampoo (arXiv 1802.09568): see `zeta.preconditioned.shampoo`."""

    rule = preconditioned.shampoo


class SOAP(Zeta):
    """SOAP (arXiv 2409.11321): see `zeta.preconditioned.soap`."""

    rule = preconditioned.soap


class Schattor(Zeta):
    """Schattor's ball form (arXiv 2606.15702): see `zeta.preconditioned.schattor`."""

    rule = preconditioned.schattor()

    def __init__(self, learning_rate: Rate = _LR, *args: Any, p: float = 4.0, **options: Any) -> None:
        self.rule = preconditioned.schattor(p)
        super().__init__(learning_rate, *args, **options)


class AdaGO(Zeta):
    """AdaGO (arXiv 2509.02981): see `zeta.family.adago`."""

    rule = family.adago()

    def __init__(
        self, learning_rate: Rate = _LR, *args: Any, gamma: float = 1.0, floor: float = 0.01, **options: Any
    ) -> None:
        self.rule = family.adago(gamma, floor)
        super().__init__(learning_rate, *args, **options)


class Dion2(Zeta):
    """Dion2 (arXiv 2512.16928): see `zeta.family.dion2`."""

    rule = family.dion2()

    def __init__(self, learning_rate: Rate = _LR, *args: Any, fraction: float = 0.25, **options: Any) -> None:
        self.rule = family.dion2(fraction)
        super().__init__(learning_rate, *args, **options)
