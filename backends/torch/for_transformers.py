"""`trainer.add_callback(Reports(trainer))` logs what an optimizer's steps do as Transformers logs the loss."""

from typing import Any

from transformers import TrainerCallback


class Reports(TrainerCallback):
    """Logs `optimizer.report().summary()` every `logging_steps`, wherever Trainer reports to."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        _inside(optimizer).report()  # which starts the measuring

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if state.global_step % max(1, int(state.logging_steps)) == 0:
            report = _inside(optimizer).report()
            report.warn_of_nan()
            self.trainer.log(report.summary())


def _inside(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
