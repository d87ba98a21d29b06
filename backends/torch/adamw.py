"""AdamW for the parameters that are no matrices: torch's own, for any dtype, layout and place."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .placement import Place, gradient, mine
from .state import round_back, widen


class Part(NamedTuple):
    """What this rank keeps of a parameter and its state: plain tensors, views."""

    p: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    step: Tensor
    remainder: Tensor | None
    vector: bool


def own_part(p: Tensor, state: dict[str, Tensor], place: Place | None, vector: bool) -> Part:
    """What this rank keeps of a parameter, which has a gradient."""
    rest = mine(state["remainder"], place) if "remainder" in state else None
    m, v = (mine(state[key], place) for key in ("exp_avg", "exp_avg_sq"))
    return Part(mine(p, place), mine(gradient(p), place), m, v, state["step"], rest, vector)


def adamw(own: list[Part], group: dict[str, Any]) -> None:
    """One step, in place; vectors are decayed where the group says so."""
    if group["decay_vectors"]:
        _step(own, group)
        return
    for vector in (False, True):
        decay = 0.0 if vector else group["weight_decay"]
        _step([part for part in own if part.vector == vector], group | {"weight_decay": decay})


def _step(own: list[Part], group: dict[str, Any]) -> None:
    """On float32 copies of what is narrower."""
    exact, narrow = ([part for part in own if (part.remainder is None) == whole] for whole in (True, False))
    if exact:
        params = [part.p for part in exact]
        _contiguous(params, [part.grad.to(part.p.dtype) for part in exact], exact, group)
    if narrow:
        params, rests = [part.p for part in narrow], [part.remainder for part in narrow if part.remainder is not None]
        wide = widen(params, rests)
        _contiguous(wide, widen([part.grad for part in narrow]), narrow, group)
        round_back(params, rests, wide)


def _contiguous(params: list[Tensor], grads: list[Tensor], own: list[Part], group: dict[str, Any]) -> None:
    """torch's AdamW, in place, on contiguous copies of what is not so: the fused form, torch 2.13, ignores strides."""
    names: dict[str, Any] = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
    b1, b2 = group["betas"]
    traced = torch.compiler.is_compiling()  # torch.compile, torch 2.13, does not trace into the fused form
    names |= dict(fused=not traced, foreach=traced, capturable=traced, amsgrad=False)
    m, v = [part.m for part in own], [part.v for part in own]
    w, g, a, b = ([t.contiguous() for t in tensors] for tensors in (params, grads, m, v))
    if isinstance(names["weight_decay"], Tensor):  # which torch 2.13 would read on the host
        torch._foreach_mul_(w, 1 - (names["lr"] * names["weight_decay"]).reshape(()).to(w[0].device))
        names["weight_decay"] = 0.0
    torch_adamw(w, g, a, b, [], [part.step for part in own], beta1=b1, beta2=b2, **names)
    for t, straight in zip([*params, *m, *v], [*w, *a, *b], strict=True):
        if straight is not t:
            t.copy_(straight)
