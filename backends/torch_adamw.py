"""AdamW for the parameters that are no matrices: torch's own, for any dtype, layout and place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .torch_places import gradient, mine
from .torch_state import Places, round_back, widen


def adamw(params: list[Tensor], state: Any, group: dict[str, Any], place: Places) -> None:
    """One step, in place, of what this rank keeps of the parameters; on float32 copies of what is narrower."""
    for narrow in (False, True):
        some = [p for p in params if ("remainder" in state[p]) == narrow]
        if not some:
            continue

        def local(values: Iterable[Any], some: list[Tensor] = some) -> list[Tensor]:
            return [mine(value, place(p)) for p, value in zip(some, values, strict=True)]

        m, v = (local(state[p][key] for p in some) for key in ("exp_avg", "exp_avg_sq"))
        steps = [state[p]["step"] for p in some]
        rests = local(state[p]["remainder"] for p in some) if narrow else []
        own, grads = local(some), local(map(gradient, some))
        wide = widen(own, rests) if narrow else own
        grads = widen(grads) if narrow else [g.to(w.dtype) for g, w in zip(grads, wide, strict=True)]
        _contiguous(wide, grads, m, v, steps, group)
        if narrow:
            round_back(own, rests, wide)


def _contiguous(
    params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], steps: list[Tensor], group: Any
) -> None:
    """torch's AdamW, in place, on contiguous copies of what is not so: the fused form, torch 2.13, ignores strides."""
    names: dict[str, Any] = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
    b1, b2 = group["betas"]
    traced = torch.compiler.is_compiling()  # torch.compile, torch 2.13, does not trace into the fused form
    names |= dict(fused=not traced, foreach=traced, capturable=traced, amsgrad=False)
    w, g, a, b = ([t.contiguous() for t in tensors] for tensors in (params, grads, m, v))
    torch_adamw(w, g, a, b, [], steps, beta1=b1, beta2=b2, **names)
    for t, straight in zip([*params, *m, *v], [*w, *a, *b], strict=True):
        if straight is not t:
            t.copy_(straight)
