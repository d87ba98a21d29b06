"""The steps of a run: schedule, losses read one step late, validation, checkpoints, a progress bar."""

import math
import signal
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trainer import settings, text
from trainer.journal import Journal
from zeta import checkpoint
from zeta.whitening.measures import inspect

FILE = "checkpoint.safetensors"
COLUMNS = "step {task.completed}/{task.total}  {task.description}"


class Loop:
    """Steps from settings["step"] to settings["steps"]; each validation is followed by a checkpoint.

    All ranks take the same steps; the first alone shows and writes.
    """

    def __init__(self, trainer: Any, s: dict[str, Any], out: Path, train: np.ndarray, validation: np.ndarray) -> None:
        self.trainer, self.s, self.out, self.train, self.validation = trainer, s, out, train, validation
        self.first = trainer.rank == 0
        self.stop = self.stopped = False  # whether this rank was told to, and whether all ranks know
        self.progress = Progress(TextColumn(COLUMNS), BarColumn(None), TimeRemainingColumn(), disable=not self.first)
        self.task = self.progress.add_task("", total=s["steps"], completed=s["step"])
        self.speed = 0.0

    def run(self) -> bool:
        """Whether the last step was reached; False after Ctrl-C. Either way the checkpoint is written."""
        s, pending = self.s, None
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Journal(self.out / "metrics.jsonl" if self.first else None, s["step"]) as self.journal, self.progress:
                for step in range(s["step"] + 1, s["steps"] + 1):
                    lr, start = learning_rate(step, s), perf_counter()
                    batch = text.batch(self.train, step, s["batch"], s["context"] + 1, s["seed"])
                    pending, late = (step, lr, start, self.trainer.step(batch, lr, self.stop)), pending
                    self._read(late, start)
                    if s["inspect"] and step % s["inspect"] == 0:
                        self._read(pending)
                        pending = self._inspect(step, lr)
                    due = step % s["eval_every"] == 0 or step == s["steps"]
                    stop = self.stop if self.trainer.ranks == 1 else self.stopped
                    if stop or due:
                        self._read(pending)
                        pending = self._save(step, validate=due)
                    if stop:
                        return False
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C lets the step finish, a second one does not wait. (torchrun follows it by SIGTERM.)"""
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True

    def _read(self, pending: tuple[int, float, float, Any] | None, end: float | None = None) -> None:
        """Waits for the step's loss and writes it down; `end` is when the next step started."""
        if pending is None:
            return
        (step, lr, start), (loss, stops) = pending[:3], pending[3].tolist()
        self.stopped = stops > 0
        self._check(step, loss)
        rate = self.s["batch"] * self.s["context"] / ((end or perf_counter()) - start)
        self.speed = 0.9 * self.speed + 0.1 * rate if self.speed else rate
        self.journal.write(step=step, loss=loss, lr=lr, tokens_per_second=round(rate, 1))
        shown = f"loss {loss:.3f}  lr {lr:.1e}  {self.speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=shown)

    def _check(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            last = self.s["step"]
            saved = f"the checkpoint of step {last} is as it was" if last else "no checkpoint was saved"
            raise ValueError(
                f"the loss or the gradient of step {step} is not finite: choose a lower --lr than {self.s['lr']} or a "
                f"longer --warmup; {saved}"
            )

    def _save(self, step: int, validate: bool) -> None:
        """Writes the checkpoint, after a validation where one is due."""
        if validate:
            loss = self._validate()
            self._check(step, loss)
            self.journal.write(step=step, val_loss=loss)
            shown = f"validation loss {loss * self.s['tokens_per_byte']:.4f} nats per byte"
            if self.first:
                self.progress.console.print(f"step {step:5}  {shown}", highlight=False)
        self.journal.flush()
        kept = {name: value for name, value in self.s.items() if name not in settings.PLACE} | {"step": step}
        arrays = self.trainer.arrays()  # of all ranks
        if self.first:
            checkpoint.save(self.out / FILE, arrays, kept)
        self.s["step"] = step

    def _inspect(self, step: int, lr: float) -> None:
        """Adds each matrix's numbers to inspect.jsonl, in place of what a resumed run finds there of this step on."""
        with Journal(self.out / "inspect.jsonl", step - 1) as journal:
            for record in inspect(self.trainer.arrays(), lr=lr, step=step):
                journal.write(**record)

    def _validate(self) -> float:
        n, size = len(self.validation), self.s["batch"]
        parts = [self.validation[i : i + size] for i in range(0, n, size)]
        return sum(self.trainer.loss(part) * len(part) for part in parts) / n


def learning_rate(step: int, s: dict[str, Any]) -> float:
    """The rate of this step, of 1 to steps: a straight rise over the warm-up, then half a cosine down towards zero."""
    warmup, steps = s["warmup"], s["steps"]
    if step <= warmup:
        return float(s["lr"] * step / warmup)
    return float(s["lr"] * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2)
