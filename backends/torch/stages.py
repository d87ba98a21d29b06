"""`zeta.stages` for torch: the same stages under the same names, in place. The plain formula stands beside each.

A rule's `local` gets lists of tensors: what its stages make of moments and gradient is written over the gradient.
`whole` gets stacks (count, rows, cols), which are written over, too. What is not here is the plain stage.
"""

from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor

from zeta import stages as plain

from .orthogonalize import in_place, largest, matrix_norm, nonzero_

CACHED = 1 << 17  # entries of a part of the element-wise work on a CPU, of which four arrays are at hand
Tensors = Any  # one tensor, or a list of them


class InPlace:
    """The stages, for a gradient in these tensors."""

    rank_one, nonzero = staticmethod(plain.rank_one), staticmethod(plain.nonzero)

    def __init__(self, gradient: list[Tensor]) -> None:
        self.gradient = gradient

    @staticmethod
    def ema(old: Tensors, new: Tensors, beta: float) -> Tensors:
        """beta old + (1 - beta) new"""
        torch._foreach_lerp_(_list(old), _list(new), 1 - beta)
        return old

    @staticmethod
    def ema_sq(old: Tensors, new: Tensors, beta: float) -> Tensors:
        """beta old + (1 - beta) new new"""
        torch._foreach_mul_(_list(old), beta)
        torch._foreach_addcmul_(_list(old), _list(new), _list(new), 1 - beta)
        return old

    @staticmethod
    def nesterov(m: Tensors, g: Tensors, beta: float) -> Tensors:
        """beta m + (1 - beta) g"""
        torch._foreach_lerp_(_list(g), _list(m), beta)
        return g

    def sign(self, x: Tensors) -> Tensors:
        """sign x"""
        x = self.over_gradient(x)
        torch._foreach_sign_(_list(x))
        return x

    def whiten(self, x: Tensors, v: Tensors, eps: float) -> Tensors:
        """x / (sqrt(v) + eps)"""
        x, root = self.over_gradient(x), torch._foreach_sqrt(_list(v))
        torch._foreach_add_(root, eps)
        torch._foreach_div_(_list(x), root)
        return x

    def over_gradient(self, x: Tensors) -> Tensors:
        """x, written over the gradient where it is `local`'s: moments stay as they are."""
        if isinstance(x, list) and x[0] is not self.gradient[0]:  # of lists torch 2.11 cannot compile it
            torch._foreach_copy_(self.gradient, x)
            return self.gradient
        return x

    @staticmethod
    def equilibrate(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """The plain stage's x but for a factor, which Newton-Schulz takes out."""
        parts = max(1, min(x.shape[-2], x.numel() // CACHED)) if in_place(x) else 1
        squares = torch.zeros_like(cols, dtype=x.dtype)
        for part, moved in zip(x.tensor_split(parts, -2), rows.tensor_split(parts, -2), strict=True):
            norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            part.mul_((moved > 0) / nonzero_(norm))
            squares += (part * part).sum(-2, keepdim=True)  # vector_norm, torch 2.13, takes seven times as long
        return x.mul_((cols > 0) / nonzero_(squares.sqrt_()))

    @staticmethod
    def mean_sq(x: Tensor, axis: int) -> Tensor:
        """mean(x x)"""
        return InPlace.squares(x, (axis,)).div_(x.shape[axis])

    @staticmethod
    def to_rms(u: Tensor, eps: float = 0.0) -> Tensor:
        """0.2 sqrt(rows cols) / (|u| + eps) u"""
        return u.div_(nonzero_(matrix_norm(u).add_(eps)).div_(0.2 * sqrt(u[0].numel())))

    @staticmethod
    def match_rms(u: Tensor) -> Tensor:
        """0.2 sqrt(max(rows, cols)) u"""
        return u.mul_(0.2 * sqrt(max(u.shape[-2:])))

    @staticmethod
    def apply(w: list[Tensor], u: list[Tensor], lr: Any, weight_decay: Any) -> None:
        """w = (1 - lr weight_decay) w - lr u, where u is zero for what has not moved."""
        torch._foreach_mul_(w, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):  # foreach takes no tensor for alpha
            torch._foreach_sub_(w, torch._foreach_mul(u, lr))
        else:
            torch._foreach_add_(w, u, alpha=-lr)

    @staticmethod
    def nonzero_count(g: Tensor, axes: tuple[int, ...]) -> Tensor:
        """1 where an entry is not zero along the axes, which adds up to no less than that."""
        return largest(g, axes).ne_(0)

    @staticmethod
    def squares(g: Tensor, axes: tuple[int, ...]) -> Tensor:
        """sum(g g)"""
        if axes == (-2, -1):
            return matrix_norm(g).square_()
        if axes == (-1,):
            return cast(Tensor, torch.linalg.vector_norm(g, dim=-1, keepdim=True)).square_()
        return torch.sum(g * g, axes, keepdim=True)


def _list(x: Tensors) -> list[Tensor]:
    return x if isinstance(x, list) else [x]
