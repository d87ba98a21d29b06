"""Which of a torch model's parameters goes where: `param_groups`, and what a group of `Zeta` may hold."""

from typing import Any

from torch import Tensor

from zeta.core import Hyper
from zeta.layout import Route, check
from zeta.routing import overruled, route, warn_of_doubts
from zeta.steps import steps_for
from zeta.tree import Overrides, routes

# What torch's schedulers write into a group, and names that people give them.
FOREIGN = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name"}


def param_groups(
    model: Any, overrides: Overrides | None = None, *, per_head: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """The groups for `Zeta(param_groups(model), lr=...)`: the model's matrices, then all that goes to AdamW.

    `overrides` and `per_head` are those of `zeta.routes`, and so are the errors and the warning. `options` (lr, betas,
    eps, weight_decay, ...) go into both groups; change one group's for it alone.
    """
    found = routes(model, overrides, per_head=per_head)
    groups = []
    for treatment in ("zeta", "adamw"):
        named = [(n, p) for n, p in model.named_parameters() if n in found and found[n].treatment == treatment]
        plain = [tuple(found[name]) for name, _ in named]  # tuples, because torch.load takes no other classes
        if named:
            groups.append({"params": named, "routes": plain, "treatment": treatment, **options})
    return groups


def check_group(group: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError for unknown options and for values out of range."""
    unknown = sorted(set(group) - known - {"params", "param_names", "routes"} - FOREIGN)
    if unknown:
        raise ValueError(f"unknown options {unknown} in a parameter group: known are {sorted(known)}")
    if group["treatment"] not in (None, "zeta", "adamw"):
        raise ValueError(f'treatment is {group["treatment"]!r}, but must be "zeta", "adamw" or None')
    Hyper(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
    steps_for(group["coefficients"], 1, 1)  # checks the word


def group_routes(group: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The route of every parameter of the group, as a plain tuple: given, or from name, shape and treatment."""
    params: list[Tensor] = group["params"]
    if "routes" in group:
        given = [check(Route(*r), tuple(p.shape)) for r, p in zip(group["routes"], params, strict=True)]
        return [tuple(r) for r in given]
    names = group.get("param_names") or [""] * len(params)
    found = [route(name, tuple(p.shape)) for name, p in zip(names, params, strict=True)]
    if group["treatment"] is not None:
        found = [overruled(r, group["treatment"], tuple(p.shape)) for r, p in zip(found, params, strict=True)]
    warn_of_doubts(dict(zip(names, found, strict=True)), "pass zeta.backends.torch.param_groups(model) instead")
    return [tuple(r) for r in found]


def check_gradients(groups: list[dict[str, Any]]) -> None:
    """Raises TypeError for sparse and complex gradients."""
    for p in (p for group in groups for p in group["params"] if p.grad is not None):
        if p.grad.is_sparse or p.grad.is_complex():
            kind = "sparse" if p.grad.is_sparse else "complex"
            raise TypeError(f"a parameter of shape {tuple(p.shape)} has a {kind} gradient: Zeta takes dense, real ones")
