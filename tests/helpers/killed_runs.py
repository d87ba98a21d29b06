"""Runs of examples and benchmarks in processes of their own, which SIGKILL ends in a known moment."""

import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import count
from multiprocessing import Pipe, get_context
from pathlib import Path
from threading import Thread
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE.parents[1] / folder) for folder in ("examples", "bench")]
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, here and there
LOADED = ["torch._dynamo", "torch.distributed.fsdp", "zeta.backends.torch", "zeta.backends.mlx.lm"]
LOADED += ["transformers.trainer", "transformers.models.llama.modeling_llama", "lightning"]


def context() -> Any:
    """How processes start: with what takes seconds to import in place; not on a Mac, whose frameworks bear no fork."""
    found = get_context("forkserver" if sys.platform == "linux" else "spawn")
    found.set_forkserver_preload(LOADED)
    return found


def is_killed(target: Callable[..., Any], *arguments: Any) -> bool:
    """Whether SIGKILL ends target(*arguments), which runs in a process of its own."""
    process = context().Process(target=target, args=arguments, daemon=True)
    process.start()
    process.join(100)
    return bool(process.exitcode == -signal.SIGKILL)


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_lm(moment: str, arguments: list[str]) -> int:
    """The training script with torch until this moment."""
    import train_lm
    from trainer import on_torch

    from zeta import checkpoint

    calls, step, fsync, replace = count(1), on_torch.Trainer.step, os.fsync, os.replace
    if moment == "in a step":
        on_torch.Trainer.step = lambda *args: kill() if next(calls) == 5 else step(*args)
    elif moment == "before the first checkpoint":
        checkpoint.save = kill
    elif moment == "in the second save":
        os.fsync = lambda *args: kill() if next(calls) == 5 else fsync(*args)
    elif moment == "after the second save":
        os.replace = lambda *args: (replace(*args), next(calls) == 3 and kill())
    elif moment == "in step 8, rank 1 alone":
        on_torch.Trainer.step = lambda self, *args: kill() if (next(calls), self.rank) == (8, 1) else step(self, *args)
    return train_lm.main(arguments)


def example(name: str, step: int, arguments: list[str]) -> None:
    """An example's main, until Zeta has taken so many steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    module, calls = import_module(name), count(1)
    register_optimizer_step_post_hook(lambda *_: next(calls) == step and kill())
    module.main(arguments)


def mlx_lm(moment: str, log: Path, compiled: bool, arguments: list[str]) -> None:
    """`zeta mlx-lm lora` until this moment; the log gets a line for every loss."""
    import mlx.core as mx

    from zeta.backends.mlx import lm
    from zeta.backends.mlx.lm_tuning import Lines

    calls, replace = count(1), os.replace

    def report(_: Any, told: dict[str, Any]) -> None:
        losses = {key: told[key] for key in ("iteration", "train_loss", "learning_rate", "val_loss") if key in told}
        with log.open("a") as file:
            file.write(json.dumps(losses) + "\n")
        if moment == "after iteration 5" and told["iteration"] == 5 and "train_loss" in told:
            kill()

    def counted(part: Path, file: Path) -> None:
        if (file.name, moment) == ("adapters.state.safetensors", "in the second save") and next(calls) == 2:
            kill()
        if (file.name, moment) == ("adapters.safetensors", "between the files"):
            kill()
        replace(part, file)

    Lines.on_train_loss_report = Lines.on_val_loss_report = report
    os.replace = counted
    if not compiled:
        mx.disable_compile()  # on a CPU a C++ compiler makes each kernel, in seconds
    sys.exit(lm.main(arguments))


def convergence(runs: int, arguments: list[str]) -> None:
    """bench/convergence.py with a search of two axes, until so many runs are written, and others are under way."""
    import convergence
    import search

    search.AXES = search.AXES[:2]
    calls, fsync = count(1), os.fsync
    os.fsync = lambda *args: (fsync(*args), next(calls) == runs and kill())
    convergence.worker = worker
    convergence.main(arguments)


def worker(device: str) -> Any:
    """One of convergence.py's as a thread: no process that imports torch again."""
    import convergence

    mine, its = Pipe()
    Thread(target=convergence.serve, args=(its, device), daemon=True).start()
    return mine
