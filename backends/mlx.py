"""Zeta for MLX: a fused Newton-Schulz and an `mlx.optimizers.Optimizer` for all of a model's parameters."""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map_with_path

from zeta import adamw, core, fused
from zeta.core import COEFFICIENTS, Coefficients, Hyper
from zeta.routing import batches, route

BLOCK = 64  # rows of a block of a symmetric product on the CPU; smaller ones cost more than they save
_DEFAULT = Hyper()


def newton_schulz(
    x: mx.array, coefficients: Coefficients = COEFFICIENTS["jordan"], dtype: mx.Dtype | None = None
) -> mx.array:
    """x (..., rows, cols) with its singular values moved towards one; see `zeta.newton_schulz`.

    Products run in `dtype`, None for `working_dtype`; the norm is taken in float32. The result has x's dtype, and
    the errors given for `zeta.backends.torch.newton_schulz`.
    """
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, coefficients, dtype).mT
    stack = core.normalize(x.astype(mx.result_type(x, mx.array(0.0)))).reshape(prod(x.shape[:-2]), *x.shape[-2:])
    stack = fused.iterate(stack.astype(dtype or working_dtype(x)), coefficients, symmetric, multiply)
    return mx.array(stack.reshape(x.shape), x.dtype)


def working_dtype(x: mx.array) -> mx.Dtype:
    """The dtype of the products: float16 on a GPU (entries lie in [-1, 1] by then), else x's own or float32."""
    if mx.default_device() == mx.gpu:
        return mx.float16
    return mx.result_type(x, mx.array(0.0))


def symmetric(
    a: mx.array, b: mx.array, c: mx.array | None = None, beta: float = 0.0, alpha: float = 1.0, diagonal: float = 0.0
) -> mx.array:
    """alpha a b + beta c + diagonal I (batch, n, n), known to be symmetric: a CPU multiplies only the lower blocks."""
    n = a.shape[-2]
    blocks = 1 if mx.default_device() == mx.gpu else max(1, n // BLOCK)
    ends = [n * i // blocks for i in range(blocks + 1)]
    y = multiply(a[:, : ends[1]], b[:, :, : ends[1]], None if c is None else c[:, : ends[1], : ends[1]], beta, alpha)
    for start, end in pairwise(ends[1:]):
        below = None if c is None else c[:, start:end, :end]
        row = multiply(a[:, start:end], b[:, :, :end], below, beta, alpha)
        y = mx.concatenate([mx.concatenate([y, row[:, :, :start].mT], axis=-1), row], axis=-2)
    return y + diagonal * mx.eye(n, dtype=y.dtype) if diagonal else y


def multiply(a: mx.array, b: mx.array, c: mx.array | None = None, beta: float = 0.0, alpha: float = 1.0) -> mx.array:
    """alpha a b + beta c for batches of matrices."""
    if c is None:
        return a @ b if alpha == 1 else mx.addmm(mx.array(0, a.dtype), a, b, alpha=alpha)  # one rounding
    return mx.addmm(c, a, b, alpha=alpha, beta=beta)


class Zeta(Optimizer):
    """Zeta for the matrices and AdamW for the rest, in one object: `Zeta(learning_rate=1e-3).update(model, grads)`.

    `zeta.route` decides from each parameter's path and shape. `learning_rate` may be a schedule. Moments are float32.
    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array] = _DEFAULT.lr,
        betas: tuple[float, float] = _DEFAULT.betas,
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        coefficients: Coefficients = COEFFICIENTS["jordan"],
        ns_dtype: mx.Dtype | None = None,
    ) -> None:
        Hyper(learning_rate, betas, eps, weight_decay)  # checks the values
        super().__init__()  # type: ignore[no-untyped-call]
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.coefficients, self.ns_dtype = coefficients, ns_dtype

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        state |= core.init(parameter)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The parameters after one step, as a tree like `gradients`."""
        if not self._initialized:
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self.state[name] = schedule(self.step)
        self.state["step"] = self.step + 1

        hyper = Hyper(self.learning_rate, self.betas, self.eps, self.weight_decay)
        grads, params = dict(tree_flatten(gradients)), dict(tree_flatten(parameters))
        routes = {name: route(name, grad.shape) for name, grad in grads.items()}
        new = {}
        for name in (name for name, r in routes.items() if r.treatment == "adamw"):
            new[name] = self._adamw(hyper, grads[name], self._leaf(name), params[name])
        for batch in batches({n: (r, params[n].dtype) for n, r in routes.items() if r.treatment == "zeta"}):
            new |= self._zeta(hyper, batch, grads, params)
        return tree_map_with_path(lambda name, _: new[name], gradients)

    def _zeta(self, hyper: Hyper, batch: dict[str, tuple[int, ...]], grads: Any, params: Any) -> dict[str, mx.array]:
        """`zeta.core.update` on one stack of same-shape matrices."""
        states = [self._leaf(name) for name in batch]

        def stack(arrays: list[mx.array]) -> mx.array:
            return mx.concatenate([a.reshape(view) for a, view in zip(arrays, batch.values(), strict=True)])

        def split(stacked: mx.array) -> list[mx.array]:
            ends = [sum(view[0] for view in list(batch.values())[: i + 1]) for i in range(len(batch) - 1)]
            return [a.reshape(params[name].shape) for a, name in zip(mx.split(stacked, ends), batch, strict=True)]

        grad, param = (stack([tree[name] for name in batch]) for tree in (grads, params))
        state = {key: stack([s[key] for s in states]) for key in ("exp_avg", "exp_avg_sq")}
        param, state = core.update(
            grad, state, param, hyper, lambda x: newton_schulz(x, self.coefficients, self.ns_dtype)
        )
        for key, stacked in state.items():
            for s, array in zip(states, split(stacked), strict=True):
                s[key] = array
        return dict(zip(batch, split(param), strict=True))

    def _adamw(self, hyper: Hyper, grad: mx.array, state: dict[str, mx.array], param: mx.array) -> mx.array:
        before = {**state, "step": self.step.astype(mx.float32) - 1}  # MLX counts steps once for all parameters
        param, after = adamw.update(grad, before, param, hyper)
        state |= {key: after[key] for key in state}
        return param

    def _leaf(self, name: str) -> dict[str, mx.array]:
        """The state of the parameter with this dotted path."""
        state: Any = self.state
        for part in name.split("."):
            state = state[int(part)] if isinstance(state, list | tuple) else state[part]
        return state  # type: ignore[no-any-return]
