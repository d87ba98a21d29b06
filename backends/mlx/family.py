"""The family for MLX: each is `Zeta` with another rule for the matrices (`zeta.family`, `zeta.preconditioned`).

Arguments, routing, ranks, AdamW for the rest, saved state and half-precision parameters are Zeta's; what learning_rate
means is the rule's to say.
"""

from zeta import family, preconditioned

from .optimizer import Zeta


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
    """Schattor's ball form (arXiv 2606.15702), of the norm `p` (4): see `zeta.preconditioned.schattor`."""

    make = staticmethod(preconditioned.schattor)
    rule = make()


class AdaGO(Zeta):
    """AdaGO (arXiv 2509.02981), with `gamma` (1) and `floor` (0.01): see `zeta.family.adago`."""

    make = staticmethod(family.adago)
    rule = make()


class Dion2(Zeta):
    """Dion2 (arXiv 2512.16928), of the `fraction` (0.25) of rows or columns: see `zeta.family.dion2`."""

    make = staticmethod(family.dion2)
    rule = make()
