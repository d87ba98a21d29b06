"""The family for torch: each is `Zeta` with another rule for the matrices (`zeta.family`, `zeta.preconditioned`).

Arguments, routing, ranks, AdamW for the rest, saved state and half-precision parameters are Zeta's; what lr means is
the rule's to say.
"""

from zeta import family, preconditioned

from .optimizer import Zeta


class Signum(Zeta):
    rule = family.signum


class Muon(Zeta):
    rule = family.muon


class AdaMuon(Zeta):
    rule = family.adamuon


class NorMuon(Zeta):
    rule = family.normuon


class Eta(Zeta):
    rule = family.eta


class OLion(Zeta):
    rule = family.olion


class Shampoo(Zeta):
    make = staticmethod(preconditioned.shampoo)
    rule = make()


class SOAP(Zeta):
    make = staticmethod(preconditioned.soap)
    rule = make()


class Schattor(Zeta):
    make = staticmethod(preconditioned.schattor)
    rule = make()


class AdaGO(Zeta):
    make = staticmethod(family.adago)
    rule = make()


class Dion2(Zeta):
    make = staticmethod(family.dion2)
    rule = make()
