"""What AdamW's half of an MLX optimizer has for itself: betas, eps, decay, and a rate in proportion or its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from zeta.core import Hyper

TAKEN = ("learning_rate", "betas", "eps", "weight_decay")


class Half:
    """`Half(hyper, options, learning_rate).hyper(now, step)` is AdamW's `zeta.Hyper` where the matrices' is `now`.

    A learning_rate of `options` that is a number stands to the matrices' as it did at first: it follows whatever is
    written into `optimizer.learning_rate`. Beside a schedule, whose peak is not known, it must be a schedule, too.
    """

    def __init__(self, hyper: Hyper, options: dict[str, Any], rate: float | Callable[[mx.array], mx.array]) -> None:
        if strange := sorted(options.keys() - set(TAKEN)):
            raise TypeError(f"adamw has {strange[0]!r}, but takes {', '.join(TAKEN)}: rename it, or leave it out")
        own = options.pop("learning_rate", None)
        self.options, self.schedule, self.ratio = options, own if callable(own) else None, 1.0
        replace(hyper, lr=hyper.lr if own is None or callable(own) else own, **options)  # checks the values
        if own is None or callable(own):
            return
        if callable(rate) or not float(rate) > 0:
            kind = "a schedule" if callable(rate) else f"{rate!r}"
            raise ValueError(
                f"adamw's learning_rate is {own!r} beside {kind}, and has no proportion to it: give a schedule for "
                "both, such as lambda step: 0.1 * schedule(step)"
            )
        self.ratio = float(own) / float(rate)

    def hyper(self, now: Hyper, step: mx.array) -> Hyper:
        rate = self.schedule(step) if self.schedule else now.lr if self.ratio == 1 else now.lr * self.ratio
        return replace(now, lr=rate, **self.options)
