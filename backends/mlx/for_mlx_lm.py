"""`mlx_lm.tuner.trainer.train(..., training_callback=Reports(optimizer))` logs what an optimizer's steps do."""

from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback


class Reports(TrainingCallback):  # type: ignore[misc]
    """Prints `optimizer.report().summary()` beside every loss that mlx-lm reports, or passes both to `then`."""

    def __init__(self, optimizer: Any, then: TrainingCallback | None = None) -> None:
        self.optimizer, self.then = optimizer, then
        optimizer.report()  # which starts the measuring

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        report = self.optimizer.report()
        report.warn_of_nan()
        if self.then:
            self.then.on_train_loss_report(train_info | report.summary())
        else:
            print(", ".join(f"{key} {value:.3g}" for key, value in report.summary().items()))

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        if self.then:
            self.then.on_val_loss_report(val_info)
