"""Hugging Face's Trainer, and those that take the same pair (TRL's, axolotl's): `for_trainer`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .groups import param_groups
from .optimizer import Zeta


@dataclass(frozen=True)
class Factory:
    """What Trainer (transformers 5.23) takes for a class that reads the model: it calls it, then what that returns."""

    kind: Callable[..., Zeta]
    reading: dict[str, Any]

    def __call__(self) -> Callable[..., Zeta]:
        return self.make

    def make(self, model: Any, arguments: Any = None, **settings: Any) -> Zeta:
        """The optimizer of all of the model's parameters. axolotl passes its training arguments, too."""
        return self.kind(param_groups(model, **self.reading), **settings)


def for_trainer(
    kind: Callable[..., Zeta],
    *,
    overrides: Any = None,
    per_head: bool = False,
    options: Any = None,
    **settings: Any,
) -> tuple[Factory, dict[str, Any]]:
    """The pair for `Trainer(..., optimizer_cls_and_kwargs=for_trainer(Eta, lr=1e-3))`.

    The optimizer is made of the model as Trainer has it by then, with `model_init` and under FSDP2, too; `overrides`,
    `per_head` and `options` are those of `param_groups`. Trainer's schedule drives lr; its own rate is taken by
    `lr=arguments.learning_rate`, its `weight_decay` and `optim` are not read.
    """
    return Factory(kind, dict(overrides=overrides, per_head=per_head, options=options)), settings
