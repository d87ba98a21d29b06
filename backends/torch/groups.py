"""Which of a torch model's parameters goes where: `param_groups`, and what a group of `Zeta` may hold."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zeta.coefficients import check as check_steps
from zeta.core import Hyper
from zeta.routing.by_module import Overrides, routes
from zeta.routing.by_name import overruled, route, warn_of_doubts
from zeta.routing.layout import Route, check

# What torch's schedulers write into a group, and names that people give them.
FOREIGN = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of parameters, products and messages


def param_groups(
    model: Any, overrides: Overrides | None = None, *, per_head: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """The groups for `Zeta(param_groups(model), lr=...)`: the model's matrices, then all that goes to AdamW.

    `overrides` and `per_head` are those of `zeta.routes`, and so are the errors and the warning. `options` (lr, betas,
    eps, weight_decay, ...) go into both groups; change one group's for it alone. Raises TypeError for
    parameters that are not real, ValueError for FSDP1's.
    """
    check_parameters(model.named_parameters())
    found = routes(model, overrides, per_head=per_head)
    groups = []
    for treatment in ("zeta", "adamw"):
        named = [(n, p) for n, p in model.named_parameters() if n in found and found[n].treatment == treatment]
        plain = [tuple(found[name]) for name, _ in named]  # tuples, because torch.load takes no other classes
        if named:
            groups.append({"params": named, "routes": plain, "treatment": treatment, **options})
    return groups


def check_group(group: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError for unknown options."""
    unknown = sorted(set(group) - known - {"params", "param_names", "routes"} - FOREIGN)
    if unknown:
        raise ValueError(f"unknown options {unknown} in a parameter group: known are {sorted(known)}")
    if group["treatment"] not in (None, "zeta", "adamw"):
        raise ValueError(f'treatment is {group["treatment"]!r}, but must be "zeta", "adamw" or None')


def check_values(group: dict[str, Any]) -> None:
    """Raises ValueError for values out of range and for missing routes. Nothing is read from a GPU."""
    given = len(group.get("routes", group["params"]))
    if given != len(group["params"]):
        raise ValueError(
            f"a group has {given} routes for {len(group['params'])} parameters: give each its own, and add parameters "
            "with add_param_group"
        )
    for name in ("lr", "weight_decay"):
        value = group[name]
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"{name} is {value!r}, but must be a number or a tensor of one")
    Hyper(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
    check_steps(group["coefficients"])
    check_dtype("ns_dtype", group["ns_dtype"])


def word(dtype: Any) -> Any:
    """torch.bfloat16 as "bfloat16": what stands in a group is JSON, and torch.distributed.checkpoint's to flatten."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def dtype_of(word: Any) -> Any:
    """torch.bfloat16 of "bfloat16", or of itself."""
    return getattr(torch, word) if isinstance(word, str) else word


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for anything but None and torch's floating-point types of 16 bits and more."""
    if dtype is not None and word(dtype) not in map(word, FLOATS):
        raise ValueError(f"{name} is {dtype!r}, but must be None or one of {', '.join(map(str, FLOATS))}")


def check_parameters(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises TypeError for parameters that are to be trained and not real, ValueError for FSDP1's."""
    for name, p in named:
        if p.requires_grad and p.dtype not in FLOATS:
            types = f"{p.dtype}, but Zeta steps {', '.join(map(str, FLOATS))}"
            raise TypeError(
                f"the parameter {name or tuple(p.shape)} is {types}: store it as one of those, or freeze it"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"the parameter {name} is part of a flat one of FullyShardedDataParallel, which shows no matrices: "
                "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )


def group_routes(group: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The route of every parameter of the group, as a plain tuple: given, or from name, shape and treatment."""
    params: list[Tensor] = group["params"]
    names = group.get("param_names") or [""] * len(params)
    check_parameters(zip(names, params, strict=True))
    if "routes" in group:
        given = [check(Route(*r), tuple(p.shape)) for r, p in zip(group["routes"], params, strict=True)]
        return [tuple(r) for r in given]
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
