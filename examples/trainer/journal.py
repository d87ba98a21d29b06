"""OUT/metrics.jsonl: a line {step, loss, lr, tokens_per_second} for each step, {step, val_loss} for each validation."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from zeta.checkpoint import read_lines


class Journal:
    """Appends to the file; lines after `step`, which a resumed run will write again, are dropped first."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.file = None
        if path is None:  # of a rank that does not write
            return
        kept = [line for line in read_lines(path) if line["step"] <= step] if path.exists() else []
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self.file = path.open("a")

    def write(self, **line: Any) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Waits until all lines are on disk: before a checkpoint that counts on them."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file:
            self.file.close()
