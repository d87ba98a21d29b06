"""What the language model needs from MLX: fused operations, gradients averaged over ranks, optimizers, state."""

from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients
from mlx.optimizers import AdamW, Muon, Optimizer, clip_grad_norm

from zeta.backends.mlx import Eta, Zeta, load_named_state, named_state, to_numpy
from zeta.bench import model
from zeta.bench.on_mlx import FUSED, jit, use_device
from zeta.routing.by_name import route

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float64": mx.float64}


class Part(NamedTuple):
    """An optimizer, the parameters that it moves, and what its rate is multiplied by."""

    optimizer: Optimizer
    names: list[str]
    scale: float = 1.0


class Trainer:
    """The model on an MLX device: parameters in float32 (or float64), products in `dtype`.

    Under `mlx.launch` each rank holds all of it, and every method but `logits` is to be called on all ranks alike.
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
        use_device(device, dtype)
        self.group = mx.distributed.init()  # of one rank, without a launcher
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.dtype = DTYPES[dtype]
        self.wide = mx.float64 if dtype == "float64" else mx.float32
        self.params = {name: mx.array(a).astype(self.wide) for name, a in params.items()}
        self.parts = make_parts(optimizer, params, config, weight_decay, betas, self.group)
        for part in self.parts:
            part.optimizer.init(model.nest({name: self.params[name] for name in part.names}))
        cos, sin = (mx.array(a, self.dtype) for a in model.rotations(config))
        names: dict[str, Any] = dict(rope=(cos, sin), config=config, ops=ops)
        self._plain_loss = partial(model.loss, **names)
        self._loss = jit(lambda params, tokens: self._plain_loss(self._tree(params), tokens))
        self._logits = jit(lambda params, tokens: model.logits(self._tree(params), tokens, **names))
        self._step = jit(self._take_step)

    def step(self, tokens: np.ndarray, lr: float, stop: bool = False) -> mx.array:
        """(2,): the loss before the step that it takes, NaN where the gradient is not finite; how many ranks `stop`.

        tokens (b, context + 1) is the same on all ranks, of which each takes an equal share, so b must divide by them.
        Nothing waits for the device: read the result with `tolist`, late.
        """
        states = [part.optimizer.state for part in self.parts]
        start, end = self._ends(len(tokens))[self.rank :][:2]
        given = mx.array(tokens[start:end]), mx.array(lr, self.wide), mx.array(stop)
        result, self.params, states = self._step(self.params, states, *given)
        for part, state in zip(self.parts, states, strict=True):
            part.optimizer.state = state
        mx.async_eval(result, self.params, states)
        return result

    def _take_step(
        self, params: dict[str, mx.array], states: list[Any], tokens: mx.array, lr: mx.array, stop: mx.array
    ) -> Any:
        """(result, params, states) after one step: a pure function, as `mx.compile` wants it."""
        loss, grads = mx.value_and_grad(lambda p: self._plain_loss(self._tree(p), tokens))(params)
        everything = [loss, stop.astype(loss.dtype), *grads.values()]
        loss, stop, *mean = average_gradients(everything, self.group)  # in one message, or one for every 32 MiB
        grads, norm = clip_grad_norm(dict(zip(grads, mean, strict=True)), 1.0)
        new = {}
        for part, state in zip(self.parts, states, strict=True):
            part.optimizer.state = state | {"learning_rate": lr * part.scale}
            mine = [model.nest({name: tree[name] for name in part.names}) for tree in (grads, params)]
            new |= model.flatten(part.optimizer.apply_gradients(*mine))
        new = {name: new[name] for name in params}  # in one order always: the gradient's norm is a sum over them
        return mx.stack([loss + 0 * norm, stop * self.ranks]), new, [part.optimizer.state for part in self.parts]

    def loss(self, tokens: np.ndarray) -> float:
        """The loss of tokens (b, context + 1), which the ranks shard; the same on all."""
        ends = self._ends(len(tokens))
        own = tokens[ends[self.rank] : ends[self.rank + 1]]
        parts = self._loss(self.params, mx.array(own if len(own) else tokens[:1]))[None]
        if self.ranks > 1:
            parts = mx.distributed.all_gather(parts, group=self.group)
        return float(np.average(parts.tolist(), weights=np.diff(ends)))

    def _ends(self, count: int) -> list[int]:
        """Where the ranks' shares of so many rows begin, and where the last one ends."""
        return [count * rank // self.ranks for rank in range(self.ranks + 1)]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(b, context, vocab) scores for tokens (b, context)."""
        return np.array(self._logits(self.params, mx.array(tokens)).astype(mx.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """What `zeta.checkpoint` saves: parameters by name, the optimizer's state as "optimizer.KEY.NAME"."""
        return to_numpy(named_state(self.params, [part.optimizer for part in self.parts]))

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from arrays that `arrays` of either library gave. Raises ValueError for another optimizer's."""
        load_named_state(self.params, [part.optimizer for part in self.parts], arrays)

    def _tree(self, params: dict[str, mx.array]) -> model.Params:
        return model.nest({name: p.astype(self.dtype) for name, p in params.items()})


def make_parts(
    name: str,
    params: dict[str, np.ndarray],
    config: model.Config,
    weight_decay: float,
    betas: tuple[float, float],
    group: mx.distributed.Group,
) -> list[Part]:
    """One optimizer, or for Muon, which is for matrices, two. Zeta shares its work out over the group."""
    if name == "zeta":
        return [Part(Zeta(betas=betas, weight_decay=weight_decay, group=group), list(params))]
    if name == "eta":
        return [Part(Eta(betas=betas, weight_decay=weight_decay, group=group), list(params))]
    adamw = AdamW(1e-3, list(betas), weight_decay=weight_decay, bias_correction=True)
    if name == "adamw":
        return [Part(adamw, list(params))]
    matrices = [n for n, a in params.items() if route(n, a.shape).treatment == "zeta"]
    # MLX 0.32's Muon multiplies lr by sqrt(rows / cols) where that is above one. Times this scale, that is torch's
    # match_rms_adamw for all matrices but those wider than the model. It adds decay to the gradient: none, then.
    muon = Part(Muon(1e-3, weight_decay=0.0), matrices, scale=0.2 * sqrt(config.width))
    return [muon, Part(adamw, [n for n in params if n not in matrices])]
