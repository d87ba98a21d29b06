"""Optimizers on equal terms: each is tuned by the same search, then run on fresh seeds that are the same for all.

    python bench/convergence.py run      # trains what is missing; may be stopped at any moment, and continues
    python bench/convergence.py table    # Markdown
    python bench/convergence.py plot

The rule of the search, the same for all, stands in `search.py`. Warm-up of a hundredth, ten steps at least, half a
cosine to zero, gradients clipped to norm 1, one thread; float32 but for a GPU's language model.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import figures
import standings
import torch
from contenders import CONTENDERS, SEARCHED, Setting, train
from search import Known, needed
from standings import Runs, looks, table
from tasks import SIZES, TASKS

from zeta.bench.on_torch import find_device

HERE = Path(__file__).parent


def run(tasks: list[str], optimizers: list[str], steps: int | None, out: Path, workers: int, device: str) -> None:
    """Deals the missing runs out to processes and appends a line for each that is done, until none is missing."""
    known = read(out)
    check_data(known, tasks, out)
    idle, busy, about = [worker(device) for _ in range(workers)], dict[Any, Setting](), versions()
    about |= {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    whole(out)
    with out.open("a") as file:
        while True:
            todo = [s for s in needed(known, tasks, optimizers, steps) if s not in busy.values()]
            while idle and todo:
                busy[pipe := idle.pop()] = todo.pop(0)
                pipe.send(busy[pipe])
            if not busy:
                break
            for pipe in wait(list(busy)):
                s = busy.pop(pipe)
                known[s] = pipe.recv()
                file.write(json.dumps(s._asdict() | known[s] | about) + "\n")
                file.flush()
                os.fsync(file.fileno())
                idle.append(pipe)
                print(f"{len(known):4} {' '.join(map(str, s))}: {known[s]['final']}", flush=True)
    for pipe in idle:
        pipe.close()


def read(out: Path) -> Known:
    """The runs in a file; a last line cut short by a kill is left out."""
    lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]] if out.exists() else []
    return {Setting(*(line[name] for name in Setting._fields)): line for line in lines}


def check_data(known: Known, tasks: list[str], out: Path) -> None:
    """The text is the library of the Python that runs this: a run on another's would pass for one of these."""
    for task in tasks:
        before = {line["data"] for s, line in known.items() if s.task == task and "data" in line}
        if before and (now := TASKS[task][0]().data) not in before:
            raise SystemExit(f"{out}: {task} was trained on data of checksum {before}, here it is {now}; use --out")


def whole(out: Path) -> None:
    """Takes a last line cut short by a kill off the file, so that the next is not glued to it."""
    if out.exists():
        text = out.read_text()
        os.truncate(out, len(text[: text.rfind("\n") + 1].encode()))


def versions() -> dict[str, str]:
    """What a run depends on beside its setting: libraries, the commit (and whether code differs from it), the CPU."""
    commit, changed = git("describe", "--always", "--exclude=*"), git("diff", "--name-only", "HEAD", "--", "*.py")
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    cpu = f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    libraries = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return libraries | {"python": platform.python_version(), "commit": commit + "-changed" * bool(changed), "cpu": cpu}


def git(*arguments: str) -> str:
    """What git says of this repository; nothing where there is none."""
    command = ["git", "-C", str(HERE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def worker(device: str) -> Connection:
    """A pipe to a new process, which ends when the pipe does: send a Setting, receive what `train` says."""
    context = multiprocessing.get_context("spawn")  # a forked process would hold the others' pipes open
    mine, its = context.Pipe()
    context.Process(target=serve, args=(its, device), daemon=True).start()
    its.close()
    return mine


def serve(pipe: Connection, device: str) -> None:
    """Trains what the pipe asks for on this device, until it ends."""
    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            s = pipe.recv()
            if s.task not in loaded:
                loaded[s.task] = TASKS[s.task][0]()
            pipe.send(train(s, loaded[s.task], device=device))


def outcomes(known: Known) -> dict[str, Runs]:
    """Task -> optimizer -> its runs on fresh seeds, of the setting that was run last, whether or not all are done."""
    last = {(s.task, s.optimizer): s._replace(seed=SEARCHED) for s in known if s.seed != SEARCHED}
    ran: dict[str, Runs] = {}
    for (task, optimizer), setting in last.items():
        fresh = sorted(
            (s for s in known if s != setting and s._replace(seed=SEARCHED) == setting), key=lambda s: s.seed
        )
        ran.setdefault(task, {})[optimizer] = [known[s] for s in fresh]
    return ran


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.command == "run":
        try:
            find_device(args.device)
        except ValueError as error:
            parser().error(str(error))
        return run(args.tasks, args.optimizers, args.steps, args.out, args.workers, args.device)
    known = {
        s: line
        for s, line in read(args.out).items()
        if s.optimizer in args.optimizers and s.task in args.tasks and s.steps == (args.steps or TASKS[s.task][1])
    }
    ran = outcomes(known)
    if not ran:
        raise SystemExit(f"no fresh seed of these is in {args.out}: `run` with the same flags continues")
    if args.command == "plot":
        draw = figures.draw if set(ran) <= set(SIZES) else standings.draw
        return draw(ran, args.picture or args.out.with_suffix(".png"))
    for task, runs in ran.items():
        lines = [line for s, line in known.items() if s.task == task]
        print(f"{table(task, runs, args.against)}\n\n{looks(lines, SEARCHED)}\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["run", "table", "plot"])
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(SIZES), help=f"({', '.join(SIZES)})")
    p.add_argument(
        "--optimizers",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=", ".join(CONTENDERS),
    )
    p.add_argument("--steps", type=int, metavar="N", help="of every run (default: the task's own)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where `run` trains (cpu)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread each (2)")
    p.add_argument("--out", type=Path, default=HERE / "budgets.jsonl", metavar="FILE", help="the runs, a line each")
    p.add_argument("--against", default="eta", choices=CONTENDERS, metavar="NAME", help="whom `table` subtracts (eta)")
    p.add_argument("--picture", type=Path, metavar="FILE", help="what `plot` writes (--out's name as .png)")
    return p


if __name__ == "__main__":
    main()
