"""Zeta for torch on CPU, CUDA and MPS: a `torch.optim.Optimizer` for all of a model's parameters."""

import warnings
from collections.abc import Callable, Iterable
from math import inf, sqrt
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from zeta.core import COEFFICIENTS, Coefficients, Hyper
from zeta.routing import Route, batches, route

from .torch_newton_schulz import matrix_norm, newton_schulz

__all__ = ["Zeta", "newton_schulz"]

_DEFAULT = Hyper()


class Zeta(torch.optim.Optimizer):
    """Zeta for the matrices and AdamW for the rest, in one object: `Zeta(model.named_parameters(), lr=1e-3)`.

    `zeta.route` decides from each parameter's name and shape; a group's `treatment` ("zeta" or "adamw") overrules it.
    Moments are float32 or better. Raises ValueError for values out of range, TypeError for sparse or complex gradients,
    always before anything is changed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = _DEFAULT.lr,
        betas: tuple[float, float] = _DEFAULT.betas,
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        coefficients: Coefficients = COEFFICIENTS["jordan"],
        ns_dtype: torch.dtype | None = None,
        treatment: str | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(coefficients=coefficients, ns_dtype=ns_dtype, treatment=treatment, maximize=maximize)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        unknown = sorted(set(group) - set(self.defaults) - {"params", "param_names", "initial_lr"})
        if unknown:
            raise ValueError(f"unknown options {unknown} in a parameter group: known are {sorted(self.defaults)}")
        if group["treatment"] not in (None, "zeta", "adamw"):
            raise ValueError(f'treatment is {group["treatment"]!r}, but must be "zeta", "adamw" or None')
        _hyper(group)
        super().add_param_group(param_group)
        last = self.param_groups[-1]
        if "param_names" not in last and last["treatment"] is None and any(p.ndim > 1 for p in last["params"]):
            warnings.warn(
                "these parameters have no names, so embeddings and output heads cannot be told from other matrices and "
                "all go to Zeta: pass model.named_parameters()",
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_gradients(p for group in self.param_groups for p in group["params"] if p.grad is not None)
        for group in self.param_groups:
            routes = _routes(group)
            self._adamw(group, [p for p, r in routes.items() if r.treatment == "adamw"])
            for batch in batches({p: (r, (p.dtype, p.device)) for p, r in routes.items() if r.treatment == "zeta"}):
                self._zeta(group, batch)
        return loss

    def _zeta(self, group: dict[str, Any], batch: dict[Tensor, tuple[int, ...]]) -> None:
        """`zeta.core.update` for matrices of one shape, in place; the plain formulas stand beside the lines."""
        (b1, b2), eps, lr = group["betas"], group["eps"], group["lr"]
        params, views = list(batch), list(batch.values())
        m, v = self._moments(params)

        g = torch.cat([p.grad.reshape(view) for p, view in batch.items()]).to(m[0].dtype)  # type: ignore[union-attr]
        if group["maximize"]:
            g.neg_()
        moved = (matrix_norm(g, inf) != 0).to(g.dtype)
        grads = _split(g, params, views)
        torch._foreach_lerp_(m, grads, 1 - b1)  # m = b1 m + (1 - b1) g
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)  # v = b2 v + (1 - b2) g g
        x = torch.cat([a.view(s) for a, s in zip(m, views, strict=True)], out=g)
        x /= torch.cat([a.view(s) for a, s in zip(v, views, strict=True)]).sqrt_().add_(eps)  # m / (sqrt(v) + eps)
        u = newton_schulz(x, group["coefficients"], group["ns_dtype"])
        u *= lr * 0.2 * sqrt(u[0].numel()) * moved / (matrix_norm(u) + eps)
        self._apply(params, _split(u, params, views), 1 - lr * group["weight_decay"])

    def _apply(self, params: list[Tensor], steps: list[Tensor], decay: float | Tensor) -> None:
        """w = decay w - step, rounded once to the parameter's dtype."""
        wide = params if params[0].dtype == steps[0].dtype else [p.to(steps[0].dtype) for p in params]
        torch._foreach_mul_(wide, decay)
        torch._foreach_sub_(wide, steps)
        if wide is not params:
            torch._foreach_copy_(params, wide)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """torch's own AdamW on float32 copies of what is narrower."""
        if not params:
            return
        m, v = self._moments(params, step=True)
        wide = [p.to(a.dtype) for p, a in zip(params, m, strict=True)]  # the parameter itself where dtypes agree
        grads = [cast(Tensor, p.grad).to(a.dtype) for p, a in zip(params, m, strict=True)]
        (b1, b2), steps = group["betas"], [self.state[p]["step"] for p in params]
        names: dict[str, Any] = dict(
            lr=group["lr"], beta1=b1, beta2=b2, eps=group["eps"], weight_decay=group["weight_decay"]
        )
        adamw(wide, grads, m, v, [], steps, amsgrad=False, fused=True, maximize=group["maximize"], **names)
        for p, w in zip(params, wide, strict=True):
            if w is not p:
                p.copy_(w)

    def _moments(self, params: list[Tensor], step: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        for p in params:
            if not self.state[p]:
                dtype = torch.promote_types(p.dtype, torch.float32)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
                if step:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
        return [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params]


def _hyper(group: dict[str, Any]) -> Hyper:
    return Hyper(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})


def _routes(group: dict[str, Any]) -> dict[Tensor, Route]:
    """The route of every parameter of the group that has a gradient."""
    names = group.get("param_names") or [""] * len(group["params"])
    routes = {}
    for name, p in zip(names, group["params"], strict=True):
        if p.grad is not None:
            by_rule = route(name, tuple(p.shape))
            routes[p] = by_rule if group["treatment"] is None else _forced(group["treatment"], by_rule, p)
    return routes


def _forced(treatment: str, by_rule: Route, p: Tensor) -> Route:
    if treatment == by_rule.treatment:
        return by_rule
    if treatment == "adamw":
        return Route("adamw", (), "by its group")
    matrix = route("", tuple(p.shape))
    if matrix.treatment != "zeta":
        raise ValueError(f'treatment "zeta" needs matrices, but a parameter of its group has shape {tuple(p.shape)}')
    return matrix


def _split(stack: Tensor, params: list[Tensor], views: list[tuple[int, ...]]) -> list[Tensor]:
    parts = torch.split(stack, [view[0] for view in views])
    return [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]


def _check_gradients(params: Iterable[Tensor]) -> None:
    for p in params:
        grad = cast(Tensor, p.grad)
        if grad.is_sparse or grad.is_complex():
            kind = "sparse" if grad.is_sparse else "complex"
            raise TypeError(f"a parameter of shape {tuple(p.shape)} has a {kind} gradient: Zeta takes dense, real ones")
