"""`lightning.Trainer(callbacks=[Reports()])` logs what an optimizer's steps do."""

from typing import Any

from lightning.pytorch.callbacks import Callback


class Reports(Callback):
    """Logs `optimizer.report().summary()` every `log_every_n_steps`."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.report()  # which starts the measuring

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for optimizer in trainer.optimizers:
                report = optimizer.report()
                report.warn_of_nan()
                pl_module.log_dict(report.summary())
