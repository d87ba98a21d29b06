"""Which of a torch model's parameters goes where: `param_groups`, and what a group of `Zeta` may hold."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zeta.coefficients import check_coefficients
from zeta.core import Hyper
from zeta.routing.by_module import Overrides, routes
from zeta.routing.by_name import overruled, route, warn_of_doubts
from zeta.routing.layout import Route, check_route

# What torch.optim.AdamW takes beside what Zeta's __init__ names: (the value that is refused, why). No other value has
# an effect: a step is always fused, and of as few operators as foreach would make it.
ADAMW: dict[str, tuple[Any, str]] = {
    "fused": (None, ""),
    "foreach": (None, ""),
    "capturable": (None, ""),  # see `check_capturable`
    "differentiable": (True, "writes in place, where no gradient can pass"),
    "amsgrad": (True, "keeps no maximum of its variance"),
    "decoupled_weight_decay": (False, "decays weights apart from their gradients"),  # in AdamW's groups
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of parameters, products and messages


def param_groups(
    model: Any,
    overrides: Overrides | None = None,
    *,
    per_head: bool = False,
    options: Callable[[str, Tensor], Mapping[str, Any] | None] | None = None,
    **common: Any,
) -> list[dict[str, Any]]:
    """The groups for `Zeta(param_groups(model), lr=...)`: the model's matrices, then all that goes to AdamW.

    `overrides` and `per_head` are those of `zeta.routes`, and so are the errors and the warning. `options` of a name
    and parameter gives that parameter's own, such as {"lr": 1e-4, "weight_decay": 0.0}: all that have the same share a
    group. `common` (lr, betas, eps, weight_decay, ...) goes into every group.
    Raises TypeError for parameters that are not real, ValueError for FSDP1's.
    """
    check_parameters(model.named_parameters())
    by_name = routes(model, overrides, per_head=per_head)
    groups: list[dict[str, Any]] = []
    for treatment in ("zeta", "adamw"):
        for name, p in model.named_parameters():
            if name in by_name and by_name[name].treatment == treatment:
                own = common | dict((options and options(name, p)) or {})
                if "treatment" in own:
                    raise ValueError(f"{name} is given the treatment {own['treatment']!r}: give overrides= instead")
                own["treatment"] = treatment
                group = next((g for g in groups if _without_params(g) == own), None)
                if group is None:
                    groups.append(group := own | {"params": [], "routes": []})
                group["params"].append((name, p))
                group["routes"].append(tuple(by_name[name]))  # because torch.load takes no other classes
    return groups


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "routes")}


def apart(group: dict[str, Any], given: Collection[str], adamw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The group, or where it has matrices and others a group of each; AdamW's with `adamw` where it was not `given`."""
    parts = []
    for treatment in ("zeta", "adamw"):
        chosen = [i for i, r in enumerate(group["routes"]) if r[0] == treatment]
        lists = {key: [group[key][i] for i in chosen] for key in ("params", "param_names", "routes") if key in group}
        own = {key: value for key, value in adamw.items() if key not in given} if treatment == "adamw" else {}
        if chosen:
            parts.append(group | lists | own)
    return parts or [group]


def check_group(group: dict[str, Any], defaults: dict[str, Any], owner: str) -> None:
    """Raises ValueError for what the optimizer would have to ignore, and warns of an option that is misspelt.

    Keys of the user's own stay in the group, unread, as in torch's optimizers.
    """
    check_carried(group, owner)
    if "adamw" in group:
        raise ValueError("a group has the key adamw, which stands in the constructor: give the group's own options")
    for key in ("rule", "version"):
        if key in group and group[key] != defaults.get(key):
            raise ValueError(f"a group's {key} is {group[key]!r}, but {owner} writes that key itself: leave it out")
    if group.get("treatment") not in (None, "zeta", "adamw"):
        raise ValueError(f'treatment is {group["treatment"]!r}, but must be "zeta", "adamw" or None')
    known = {*defaults, *ADAMW, "params", "param_names", "routes", "ns_steps"}
    for key in group.keys() - known:
        if meant := near(key, known):
            warnings.warn(f"a group's {key} has no effect: did you mean {meant}?", stacklevel=4)


def near(key: str, known: Collection[str]) -> str | None:
    """The known option that an unknown key may be meant for."""
    other_words = {"learning_rate": "lr", "momentum": "betas"}
    return other_words.get(key) or next(iter(get_close_matches(key, known, 1, cutoff=0.85)), None)


def check_carried(options: dict[str, Any], owner: str) -> None:
    """Raises ValueError where one of AdamW's options would change the algorithm."""
    for key, (refused, why) in ADAMW.items():
        if refused is not None and options.get(key, not refused) == refused:
            raise ValueError(f"{key} is {refused}, but {owner} {why}: leave it out")


def check_capturable(group: dict[str, Any], decomposes: bool, shared: bool, owner: str) -> None:
    """Raises ValueError where a step with capturable=True would be none for a CUDA graph."""
    why = "waits for the GPU to decompose matrices" if decomposes else "waits for other ranks" if shared else ""
    if group.get("capturable") and why:
        raise ValueError(f"capturable is True, but {owner} {why}, which no CUDA graph can replay: leave it out")


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
            raise ValueError(f"{name} is {value!r}, but must be a number or a tensor of one element")
    Hyper(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
    check_coefficients(group["coefficients"])
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
            types = f"{p.dtype}, but only {', '.join(map(str, FLOATS))} can be stepped"
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
    given, wish = "routes" in group, group["treatment"]
    if given:
        found = [check_route(Route(*r), tuple(p.shape)) for r, p in zip(group["routes"], params, strict=True)]
    else:
        found = [route(name, tuple(p.shape)) for name, p in zip(names, params, strict=True)]
    for i, p in enumerate(params):
        if wish is not None and not (given and found[i].treatment == wish):
            found[i] = overruled(found[i], wish, tuple(p.shape))
    if not given:
        warn_of_doubts(dict(zip(names, found, strict=True)), "pass zeta.backends.torch.param_groups(model) instead")
    return [tuple(r) for r in found]


def check_gradients(groups: list[dict[str, Any]], owner: str) -> None:
    """Raises TypeError for sparse and complex gradients."""
    for group in groups:
        for i, p in enumerate(group["params"]):
            if p.grad is not None and (p.grad.is_sparse or p.grad.is_complex()):
                kind = "sparse" if p.grad.is_sparse else "complex"
                raise TypeError(f"the gradient of {name_of(group, i)} is {kind}: {owner} takes dense, real ones")


def check_shapes(groups: list[dict[str, Any]], known: dict[int, torch.Size]) -> None:
    """Raises ValueError where a parameter's shape is not the `known` one, by its id, or does not fit its route."""
    for group in groups:
        for i, (p, way) in enumerate(zip(group["params"], group["routes"], strict=False)):
            if id(p) not in known:  # put in another's place, as accelerate does when it shards a model
                try:
                    check_route(Route(*way), tuple(p.shape))
                except ValueError as error:
                    raise ValueError(f"{name_of(group, i)} was put into a group by hand: {error}") from error
                known[id(p)] = p.shape
            if p.shape != known[id(p)]:
                raise ValueError(
                    f"{name_of(group, i)} has shape {tuple(p.shape)}, but had {tuple(known[id(p)])} when the optimizer "
                    "was made: make it anew"
                )


def name_of(group: dict[str, Any], i: int) -> str:
    """How an error calls a group's i-th parameter."""
    names = group.get("param_names")
    return f"the parameter {names[i]}" if names else f"a parameter of shape {tuple(group['params'][i].shape)}"
