"""Optimizers on equal terms: each is tuned by the same search, then run on fresh seeds that are the same for all.

    python bench/convergence.py run      # trains what is missing; may be stopped at any moment, and goes on from there
    python bench/convergence.py table    # Markdown
    python bench/convergence.py plot

The search, for each task and optimizer, on a seed of its own: a learning rate, on a grid of factors of two, whose
neighbours are both worse, then b1 among 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 0.95 likewise, then the learning rate
once more, then b2, 0.99 against 0.95, where the optimizer has one. It starts at lr 1.6e-2 and b1 0.7, of AdamW and SOAP
at 2e-3 and 0.8. All matrices go to the optimizer, the rest to AdamW with the same lr and betas (0.9, 0.95). Weight
decay 0.1, ten steps of warm-up, half a cosine to zero, gradients clipped to norm 1, float32, one thread.
"""

import argparse
import json
import multiprocessing
import os
import platform
from contextlib import suppress
from importlib.metadata import version
from math import inf
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, ONE_BETA, Setting, train
from standings import Runs, draw, table
from tasks import TASKS

HERE = Path(__file__).parent
LR, B1, B2 = [8e-3 * 2.0**k for k in range(-5, 4)], [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [0.95, 0.99]
SEARCHED = 100
ADAM = ("adamw", "soap")  # their entries move by up to lr, five times as far as the others'
CLAIMED = ("eta", "zeta", "zeta_nesterov", "muon", "adamuon")  # on all tasks, with ten seeds and more
UNDECIDED = {("moe", "eta"), ("moe", "zeta")}  # after ten seeds, so twenty were added
FIRST = (*CLAIMED, "normuon", "soap", "adamw")  # on all tasks; these three, and the next, with five
VARIANCE = ("rank1_before", "rank1_after", "rank1_both", "whiten_after", "whiten_both", "eta_plain")
ORDER = [(task, name) for name in FIRST for task in TASKS]
ORDER += [("lm", name) for name in dict.fromkeys((*VARIANCE, *CONTENDERS)) if name not in FIRST]
Known = dict[Setting, dict[str, Any]]


def final(known: Known, s: Setting) -> float:
    """The held-out loss of a finished run; inf where it diverged."""
    loss = known[s]["final"]
    return inf if loss is None else float(loss)


def search(known: Known, start: Setting) -> tuple[Setting | None, list[Setting]]:
    """(the best setting, []), or (None, the runs that the search needs next)."""
    grid, best = {"lr": LR, "b1": B1, "b2": B2}, start
    for axis in ("lr", "b1", "lr", "b2")[: 3 if start.optimizer in ONE_BETA else 4]:
        while True:
            values, i = grid[axis], grid[axis].index(getattr(best, axis))
            near = [best] + [best._replace(**{axis: v}) for v in values[max(i - 1, 0) : i + 2] if v != values[i]]
            missing = [s for s in near if s not in known]
            if missing:
                return None, missing
            better = min(near, key=lambda s: final(known, s))
            if better == best:
                break
            best = better
    return best, []


def start_of(task: str, optimizer: str, steps: int | None) -> Setting:
    """Where the search starts."""
    lr, b1, b2 = (2e-3, 0.8, 0.95) if optimizer in ADAM else (1.6e-2, 0.7, 0.99)
    return Setting(task, optimizer, lr, b1, b2, SEARCHED, steps or TASKS[task][1])


def needed(known: Known, start: Setting) -> list[Setting]:
    """What is missing of this optimizer's search or, after it, of its fresh seeds."""
    best, missing = search(known, start)
    return [s for s in fresh(best) if s not in known] if best else missing


def fresh(best: Setting) -> list[Setting]:
    whole = best.steps == TASKS[best.task][1]
    wanted = seeds(best.task, best.optimizer)
    return [best._replace(seed=seed) for seed in range(wanted if whole else min(wanted, 5))]


def seeds(task: str, optimizer: str) -> int:
    """How many a run of the task's own length gets; a shorter one, which proves little, at most five."""
    if (task, optimizer) in UNDECIDED:
        return 30
    if optimizer in CLAIMED:
        return 20 if task == "vit" else 10  # whose losses scatter more
    return 5 if optimizer in FIRST + VARIANCE else 3


def run(starts: list[Setting], out: Path, workers: int) -> None:
    """Deals the missing runs out to processes and appends a line for each that is done, until none is missing."""
    known, idle, busy = read(out), [worker() for _ in range(workers)], dict[Any, Setting]()
    whole(out)
    with out.open("a") as file:
        while True:
            todo = [s for start in starts for s in needed(known, start) if s not in busy.values()]
            while idle and todo:
                busy[pipe := idle.pop()] = todo.pop(0)
                pipe.send(busy[pipe])
            if not busy:
                break
            for pipe in wait(list(busy)):
                s = busy.pop(pipe)
                known[s] = pipe.recv()
                file.write(json.dumps(s._asdict() | known[s] | VERSIONS) + "\n")
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


def whole(out: Path) -> None:
    """Takes a last line cut short by a kill off the file, so that the next is not glued to it."""
    if out.exists():
        text = out.read_text()
        os.truncate(out, len(text[: text.rfind("\n") + 1].encode()))


VERSIONS = {name: version(name) for name in ("torch", "numpy", "scikit-learn")} | {"python": platform.python_version()}


def worker() -> Connection:
    """A pipe to a new process, which ends when the pipe does: send a Setting, receive what `train` says."""
    context = multiprocessing.get_context("spawn")  # a forked process would hold the others' pipes open
    mine, its = context.Pipe()
    context.Process(target=serve, args=(its,), daemon=True).start()
    its.close()
    return mine


def serve(pipe: Connection) -> None:
    """Trains what the pipe asks for, until it ends."""
    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            s = pipe.recv()
            if s.task not in loaded:
                loaded[s.task] = TASKS[s.task][0]()
            looks = 1 if s.seed == SEARCHED else 12  # the search needs the end alone
            pipe.send(train(s, loaded[s.task], every=-(-s.steps // looks)))


def outcomes(known: Known, starts: list[Setting]) -> dict[str, Runs]:
    """Task -> optimizer -> its runs on the fresh seeds, where the search and all of them are done."""
    found: dict[str, Runs] = {}
    for start in starts:
        best, _ = search(known, start)
        if best and all(s in known for s in fresh(best)):
            found.setdefault(start.task, {})[start.optimizer] = [known[s] for s in fresh(best)]
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    steps = 40 if args.quick else args.steps
    out = args.out or HERE / ("quick.jsonl" if args.quick else "convergence.jsonl")
    optimizers = args.optimizers or (FIRST if args.quick else CONTENDERS)
    starts = [start_of(t, o, steps) for t, o in ORDER if t in args.tasks and o in optimizers]
    if args.command == "run":
        return run(starts, out, args.workers)
    found = outcomes(read(out), starts)
    if not found:
        raise SystemExit(f"no optimizer is finished in {out}: `run` with the same flags goes on")
    if args.command == "plot":
        return draw(found, args.picture or out.with_suffix(".png"))
    print("\n\n".join(table(task, runs, args.against) for task, runs in found.items()))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["run", "table", "plot"])
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--optimizers", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    p.add_argument("--quick", action="store_true", help="40 steps a run, the first eight optimizers: some ten minutes")
    p.add_argument("--steps", type=int, metavar="N", help="of every run (default: the task's own)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread each (2)")
    p.add_argument("--out", type=Path, metavar="FILE", help="the runs, a line each (bench/convergence.jsonl)")
    p.add_argument("--against", default="eta", choices=CONTENDERS, metavar="NAME", help="whom `table` subtracts (eta)")
    p.add_argument("--picture", type=Path, metavar="FILE", help="what `plot` writes (--out's name as .png)")
    return p


if __name__ == "__main__":
    main()
