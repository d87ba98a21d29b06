"""Which runs `convergence.py` needs beside those that there are: for every task a search each, then fresh seeds.

On a seed of its own: the learning rate of the matrices, AdamW's of the rest, b1 and weight decay, in turn, each to its
better neighbour as long as there is one, until on every axis the neighbours on both sides are worse. Neighbours are
half and twice the value; of b1, of 1 - b1. It begins at the best of the task's runs that there are; where there are
none, a language model of the next size begins at the best of the one below. The largest of a CPU's takes that as it
is, a GPU's searches the matrices' rate alone. Not searched: b2, 0.95 for AdamW, NorMuon and SOAP and 0.99 for the
others, and the rest's betas (0.9, 0.95).
"""

from collections.abc import Sequence
from itertools import cycle, pairwise
from math import inf
from typing import Any

from contenders import SEARCHED, Setting
from tasks import FOR_GPU, SIZES, TASKS

AXES = ("lr", "adamw_lr", "b1", "weight_decay")
FIRST = ("eta", "zeta", "muon", "normuon", "adamw")
THEN = (
    "soap",
    "soap_1",
    "adamuon",
    "zeta_nesterov",
    "signum",
    "rank1_before",
    "rank1_after",
    "rank1_both",
    "whiten_after",
)
BELOW = {size: below for below, size in pairwise([*SIZES, *FOR_GPU])}  # a size -> the one before
LARGEST = [*SIZES][-1]
SOME: dict[str, tuple[str, ...]] = {LARGEST: ()} | dict.fromkeys(FOR_GPU, ("lr",))  # axes of those not searched whole
SEEDS = 5
Known = dict[Setting, dict[str, Any]]


def needed(known: Known, tasks: Sequence[str], optimizers: Sequence[str], steps: int | None = None) -> list[Setting]:
    """What is missing, the most wanted first: a search, then all optimizers' fresh seeds, task by task."""
    todo: list[Setting] = []
    for names in (FIRST, THEN):
        for task in tasks:
            asked = [chosen(known, start_of(task, name, steps)) for name in names if name in optimizers]
            todo += [s for _, missing in asked for s in missing]
            todo += [best._replace(seed=seed) for seed in range(SEEDS) for best, _ in asked if best]
    return [s for s in dict.fromkeys(todo) if s not in known]


def start_of(task: str, optimizer: str, steps: int | None = None) -> Setting:
    """Where the search starts, on the smallest size. AdamW's entries, SOAP's and Signum's move with lr alone."""
    lr = 4e-3 if optimizer in ("adamw", "soap", "soap_1", "signum") else 1.6e-2
    b2 = 0.95 if optimizer in ("adamw", "soap", "soap_1", "normuon") else 0.99
    return Setting(task, optimizer, lr, 8e-3, 0.1, 0.8, b2, SEARCHED, steps or TASKS[task][1])


def chosen(known: Known, start: Setting) -> tuple[Setting | None, list[Setting]]:
    """(the setting of the fresh seeds, []), or (None, the runs that must come first)."""
    below = BELOW.get(start.task)
    if not below:
        return search(known, start)
    short = start.steps != TASKS[start.task][1]
    best, missing = chosen(known, start._replace(task=below, steps=start.steps if short else TASKS[below][1]))
    if not best:
        return None, missing
    return search(known, best._replace(task=start.task, steps=start.steps))


def search(known: Known, best: Setting) -> tuple[Setting | None, list[Setting]]:
    """(the best setting, []), or (None, the runs that the search needs next): from the best of the runs that there are.

    Two searches may end in two places, of which the better is taken.
    """
    axes = SOME.get(best.task, AXES)
    like = [s for s in known if s._replace(**{axis: getattr(best, axis) for axis in axes}) == best]
    best = min([best, *like], key=lambda s: final(known, s) if s in known else inf)
    since = 0  # how many axes have been looked along since it moved
    for axis in cycle(axes):
        while True:
            near = [best, *beside(best, axis)]
            missing = [s for s in near if s not in known]
            if missing:
                return None, missing
            better = min(near, key=lambda s: final(known, s))
            if better == best:
                break
            best, since = better, 0
        since += 1
        if since == len(axes):
            break
    return best, []


def beside(s: Setting, axis: str) -> list[Setting]:
    """The setting's neighbours along an axis: half the value and twice, where the axis has one."""
    if axis == "b1":
        rest = [(1 - s.b1) * factor for factor in (0.5, 2)]
        return [s._replace(b1=round(1 - x, 6)) for x in rest if 0.01 < x < 1]
    value = getattr(s, axis)
    low = 0.001 if axis == "weight_decay" else 0.0  # less takes a fiftieth of the weights, in the longest run
    return [s._replace(**{axis: x}) for x in (value / 2, 2 * value) if x > low]


def final(known: Known, s: Setting) -> float:
    """The loss of a finished run on the search's split; inf where it diverged."""
    loss = known[s]["final"]
    return inf if loss is None else float(loss)
