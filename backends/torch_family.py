"""The family for torch: each is `Zeta` with another rule for the matrices (`zeta.family`, `zeta.preconditioned`).

Arguments, routing, AdamW for the rest, saved state and half-precision parameters are Zeta's; what lr means is the
rule's to say. Sharded parameters are refused.
"""

from typing import Any

import torch
from torch import Tensor

from zeta import family, preconditioned
from zeta.core import Hyper
from zeta.layout import Route, piece
from zeta.stages import Keeps, Rule
from zeta.storage import part, viewed

from .torch import Batch, Pieces, Zeta
from .torch_newton_schulz import largest, newton_schulz, stack, unstack
from .torch_state import round_back, widen

_DEFAULT = Hyper()


class Family(Zeta):
    """What the classes below have in common. `settings` are options of a group that only this rule has."""

    rule: Rule

    @property
    def keeps(self) -> Keeps:
        return self.rule.keeps

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        *args: Any,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._settings = {"rule": type(self).__name__, **(settings or {})}
        super().__init__(params, lr, *args, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with this group's settings."""
        return self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.defaults |= getattr(self, "_settings", {})  # a copy of an optimizer has them in its defaults already
        self.rule_of(self.defaults | param_group)  # raises for settings out of range
        super().add_param_group(param_group)
        if any(self._ranks.place(p) is not None for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"{type(self).__name__} takes no parameters that several ranks share: take Zeta, or no process_group"
            )

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
        self, params: Any, lr: float | Tensor = _DEFAULT.lr, *args: Any, p: float = 4.0, **options: Any
    ) -> None:
        super().__init__(params, lr, *args, settings={"p": p}, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return preconditioned.schattor(group["p"])


class AdaGO(Family):
    """AdaGO (arXiv 2509.02981): see `zeta.family.adago`."""

    rule = family.adago()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        *args: Any,
        gamma: float = 1.0,
        floor: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, *args, settings={"gamma": gamma, "floor": floor}, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return family.adago(group["gamma"], group["floor"])


class Dion2(Family):
    """Dion2 (arXiv 2512.16928): see `zeta.family.dion2`."""

    rule = family.dion2()

    def __init__(
        self, params: Any, lr: float | Tensor = _DEFAULT.lr, *args: Any, fraction: float = 0.25, **options: Any
    ) -> None:
        super().__init__(params, lr, *args, settings={"fraction": fraction}, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        return family.dion2(group["fraction"])
