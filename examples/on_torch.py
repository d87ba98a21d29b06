"""What the language model needs from torch: fused operations, gradients, optimizers, state."""

import os
from functools import partial

import model
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeta.backends.torch import Zeta
from zeta.routing import route


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, model.EPS)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets.long())


FUSED = model.Operations(rms_norm, attention, cross_entropy)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Trainer:
    """The model on a torch device: parameters in float32 (or float64), products in `dtype`.

    Raises ValueError, with a remedy, for a device that is not there.
    """

    def __init__(
        self,
        config: model.Config,
        params: dict[str, np.ndarray],
        optimizer: str = "zeta",
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.99),
        dtype: str = "float32",
        device: str | None = None,
        ops: model.Operations = FUSED,
    ) -> None:
        self.device, self.dtype = find_device(device), DTYPES[dtype]
        if (self.device.type, dtype) == ("mps", "float64"):
            raise ValueError("MPS has no float64: add --device cpu, or choose --dtype float32")
        cuda = self.device.type == "cuda"
        if cuda:  # the same sums in the same order: a resumed run repeats an uninterrupted one
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.params = {name: self._put(a, torch.float32).requires_grad_() for name, a in params.items()}
        self.optimizers = make_optimizers(optimizer, self.params, weight_decay, betas)
        cos, sin = (self._put(a, self.dtype, exact=True) for a in model.rotations(config))
        names = dict(rope=(cos, sin), config=config, ops=ops)
        loss = partial(model.loss, **names)
        self._loss, self._logits = torch.compile(loss) if cuda else loss, partial(model.logits, **names)

    def step(self, tokens: np.ndarray, lr: float) -> Tensor:
        """The loss () of tokens (b, context + 1) before the step that it takes, NaN where the gradient is not finite.

        Nothing waits for the device: read the loss with `float`, late.
        """
        loss = self._loss(self._tree(), torch.from_numpy(tokens).to(self.device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach() + 0 * norm

    @torch.no_grad()
    def loss(self, tokens: np.ndarray) -> float:
        """The loss of tokens (b, context + 1)."""
        return float(self._loss(self._tree(), torch.from_numpy(tokens).to(self.device)))

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(b, context, vocab) scores for tokens (b, context)."""
        return np.asarray(self._logits(self._tree(), torch.from_numpy(tokens).to(self.device)).float().cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """What `zeta.checkpoint` saves: parameters by name, the optimizer's state as "optimizer.KEY.NAME"."""
        found: dict[str, Tensor] = dict(self.params)
        for name, p in self.params.items():
            for state in (optimizer.state[p] for optimizer in self.optimizers if p in optimizer.state):
                found |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        return {name: value.detach().cpu().numpy() for name, value in found.items()}

    @torch.no_grad()
    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from arrays that `arrays` of either library gave."""
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, p in self.params.items():
            p.copy_(torch.from_numpy(arrays[name]))
        for full, array in arrays.items():
            if full.startswith("optimizer."):
                _, key, name = full.split(".", 2)
                p = self.params[name]
                value = torch.from_numpy(array)
                owner[p].state[p][key] = value if key == "step" else value.to(p)  # torch counts steps on the CPU

    def _put(self, array: np.ndarray, dtype: torch.dtype, exact: bool = False) -> Tensor:
        wide = dtype if exact else torch.promote_types(self.dtype, dtype)
        return torch.from_numpy(array).to(wide).to(self.device)  # in this order: MPS has no float64

    def _tree(self) -> model.Params:
        return model.nest({name: p.to(self.dtype) for name, p in self.params.items()})


def make_optimizers(
    name: str, params: dict[str, Tensor], weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """One optimizer, or for Muon, which takes matrices only, two."""
    named = list(params.items())
    if name == "zeta":
        return [Zeta(named, betas=betas, weight_decay=weight_decay)]
    if name == "adamw":
        return [torch.optim.AdamW(named, betas=betas, weight_decay=weight_decay)]
    matrices = [(n, p) for n, p in named if route(n, tuple(p.shape)).treatment == "zeta"]
    rest = [(n, p) for n, p in named if route(n, tuple(p.shape)).treatment == "adamw"]
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay)]


def find_device(name: str | None) -> torch.device:
    """The device of this name; None is CUDA, else MPS, else the CPU."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, there in here.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count() if device and device.type == "cuda" else 1
    if device is None or not here.get(device.type) or (device.index or 0) >= count:
        there = [kind for kind, there in here.items() if there]
        raise ValueError(f"torch has no device {name!r} on this machine: choose --device {' or '.join(there)}")
    return device
