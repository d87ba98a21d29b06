"""The family for torch: each is `Zeta` with another rule for the matrices (`zeta.family`, `zeta.preconditioned`).

Arguments, routing, AdamW for the rest, saved state and half-precision parameters are Zeta's; what lr means is the
rule's to say. Sharded parameters are refused.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from zeta import family, preconditioned
from zeta.core import Hyper
from zeta.layout import Route, piece
from zeta.stages import Keeps, Rule
from zeta.storage import part, viewed

from .torch_newton_schulz import largest, newton_schulz, stack, unstack
from .torch_optimizer import Batch, Pieces, Zeta
from .torch_state import round_back, widen

_DEFAULT = Hyper()


class Family(Zeta):
    """What the classes below have in common."""

    rule: Rule
    _settings: dict[str, Any]  # options of a group that only this rule has

    @property
    def keeps(self) -> Keeps:
        return self.rule.keeps

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with this group's settings."""
        return self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        of = next(base.__name__ for base in type(self).__mro__ if "rule" in vars(base))  # not a user's subclass of it
        self.defaults |= {"rule": of, **getattr(self, "_settings", {})}  # which a copy has in its defaults already
        super().add_param_group(param_group)

    def _complete(self, group: dict[str, Any]) -> None:
        if any(self._ranks.place(p) is not None for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__} takes no parameters that several ranks share: take Zeta, or no process_group"
            )
        super()._complete(group)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self.rule_of(group)  # raises for settings out of range

    def _zeta(self, group: dict[str, Any], batch: Batch, routes: dict[Tensor, Route]) -> None:
        """The rule's `update` for matrices of one shape, in place."""
        rule, views, lr = self.rule_of(group), list(batch.values()), group["lr"]
        params = [piece(p, routes[p], i) for p, i in batch]  # views: what is written to them is written to p
        rests = [piece(self.state[p]["remainder"], routes[p], i) for p, i in batch if "remainder" in self.state[p]]
        kept = {
            key: [part(self.state[p][key], shape, routes[p], i) for p, i in batch] for key, shape in rule.keeps.items()
        }
        state = {key: stack(kept[key], [viewed(shape, v) for v in views]) for key, shape in rule.keeps.items()}
        grad = stack([piece(p.grad, routes[p], i) for p, i in batch], views)
        wide = widen(params, rests) if rests else params

        lr = lr.reshape(()).to(grad.device, non_blocking=True) if isinstance(lr, Tensor) else lr
        hyper = Hyper(lr, group["betas"], group["eps"], group["weight_decay"])
        with torch.autocast(grad.device.type, enabled=False):  # it would round the products without a word
            w, state = rule.update(
                -grad if group["maximize"] else grad,
                state,
                stack(wide, views),
                hyper,
                lambda x: newton_schulz(x, group["coefficients"], group["ns_dtype"]),
            )
        for key, parts in kept.items():
            torch._foreach_copy_(parts, unstack(state[key], parts))
        if rests:
            round_back(params, rests, unstack(w, params))
        else:
            torch._foreach_copy_(params, unstack(w, params))


class Signum(Family):
    """Signum (arXiv 1802.04434): see `zeta.family.signum`."""

    rule = family.signum


class Muon(Family):
    """Muon (Keller Jordan, 2024): see `zeta.family.muon`."""

    rule = family.muon


class AdaMuon(Family):
    """AdaMuon (arXiv 2507.11005): see `zeta.family.adamuon`."""

    rule = family.adamuon


class NorMuon(Family):
    """NorMuon (arXiv 2510.05491): see `zeta.family.normuon`."""

    rule = family.normuon


class Eta(Family):
    """Eta, our own: see `zeta.family.eta`."""

    rule = family.eta
    _zeta = Zeta._zeta

    def _whiten(self, g: Tensor, pieces: Pieces, views: list[tuple[int, ...]], group: dict[str, Any]) -> Tensor:
        """The rule's x, but for a factor that Newton-Schulz takes out, written over the gradient."""
        b1, m = group["betas"][0], pieces("exp_avg")
        torch._foreach_lerp_(m, unstack(g, m), 1 - b1)  # m = b1 m + (1 - b1) g
        rows, cols = (largest(g, (axis,)) != 0 for axis in (-1, -2))
        x = torch.lerp(stack(m, views), g, 1 - b1, out=g)  # b1 m + (1 - b1) g
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x *= rows / norm.masked_fill_(norm == 0, 1)
        norm = (x * x).sum(-2, keepdim=True).sqrt_()  # torch 2.13's vector_norm takes seven times as long along columns
        x *= cols / norm.masked_fill_(norm == 0, 1)
        return x

    def _scale(self, u: Tensor, eps: float) -> Any:
        return 0.2 * sqrt(max(u.shape[-2:]))


class OLion(Family):
    """OLion (arXiv 2602.01105): see `zeta.family.olion`."""

    rule = family.olion


class Shampoo(Family):
    """Shampoo (arXiv 1802.09568): see `zeta.preconditioned.shampoo`."""

    rule = preconditioned.shampoo


class SOAP(Family):
    """SOAP (arXiv 2409.11321): see `zeta.preconditioned.soap`."""

    rule = preconditioned.soap


class Schattor(Family):
    """Schattor's ball form (arXiv 2606.15702): see `zeta.preconditioned.schattor`."""

    rule = preconditioned.schattor()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        betas: tuple[float, float] = _DEFAULT.betas,
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        p: float = 4.0,
        **options: Any,
    ) -> None:
        self._settings = {"p": p}
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return preconditioned.schattor(group["p"])


class AdaGO(Family):
    """AdaGO (arXiv 2509.02981): see `zeta.family.adago`."""

    rule = family.adago()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        betas: tuple[float, float] = _DEFAULT.betas,
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        gamma: float = 1.0,
        floor: float = 0.01,
        **options: Any,
    ) -> None:
        self._settings = {"gamma": gamma, "floor": floor}
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return family.adago(group["gamma"], group["floor"])


class Dion2(Family):
    """Dion2 (arXiv 2512.16928): see `zeta.family.dion2`."""

    rule = family.dion2()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        betas: tuple[float, float] = _DEFAULT.betas,
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        fraction: float = 0.25,
        **options: Any,
    ) -> None:
        self._settings = {"fraction": fraction}
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return family.dion2(group["fraction"])
