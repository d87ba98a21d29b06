"""What ranks of torch.distributed computed, in processes that are started once for all tests of a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from killed_runs import context
from torch.multiprocessing import start_processes


class Results:
    """{arrangement: arrays} of each rank, given their number; main(rank, ranks, folder) writes FOLDER/RANKS-RANK.pt."""

    def __init__(self, main: Callable[[int, int, str], None], folder: Path) -> None:
        self.main, self.folder, self.of_ranks = main, folder, dict[int, list[dict[str, Any]]]()
        context()  # where ranks start with torch in place

    def __call__(self, ranks: int) -> list[dict[str, Any]]:
        if ranks not in self.of_ranks:
            start_processes(self.main, (ranks, str(self.folder)), nprocs=ranks, start_method="forkserver")
            files = [self.folder / f"{ranks}-{rank}.pt" for rank in range(ranks)]
            self.of_ranks[ranks] = [torch.load(file, weights_only=False) for file in files]
        return self.of_ranks[ranks]
