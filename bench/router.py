"""A mixture's routers under Newton-Schulz and under AdamW: held-out losses on the same seeds, and their difference.

    python bench/router.py --rates 4e-3 1.6e-2

The mixture of `tasks.py`, Zeta at the setting that its search had chosen there, with the routers left to Newton-Schulz;
then with them given to AdamW at each of these rates. All else is the same.
"""

import argparse
from functools import partial
from typing import Any

import torch
from contenders import REST, SEARCHED, Setting, train
from standings import interval, show
from tasks import TASKS
from torch import Tensor, nn

from zeta.backends.torch import Zeta, param_groups

SETTING = Setting("moe", "zeta", 1.6e-2, 1.6e-2, 0.1, 0.4, 0.95, SEARCHED, TASKS["moe"][1])


def routed(s: Setting, model: nn.Module, lr: float | None) -> Zeta:
    """As `contenders.make` makes it; `lr` is AdamW's of the routers, None leaves them to Newton-Schulz."""

    def options(name: str, p: Tensor) -> dict[str, Any]:
        if "_proj" in name or ("router" in name and lr is None):
            return {"lr": s.lr, "betas": (s.b1, s.b2)}
        return {"lr": lr if "router" in name else s.adamw_lr, "betas": REST}

    wishes = {"_proj.weight": "zeta", "router": "zeta" if lr is None else "adamw"}
    groups = param_groups(model, wishes, options=options)
    return Zeta(groups, weight_decay=s.weight_decay, decay_vectors=True, ns_dtype=torch.float32)


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    task = TASKS["moe"][0]()
    losses: dict[float | None, list[float]] = {lr: [] for lr in (None, *args.rates)}
    for seed in range(args.seeds):
        for lr, of_rate in losses.items():
            of_rate.append(train(SETTING._replace(seed=seed), task, partial(routed, lr=lr))["final"])
        print(seed, *(of_rate[-1] for of_rate in losses.values()), flush=True)
    ours = losses.pop(None)
    print("| routers by | held-out loss | less Newton-Schulz, paired |\n|---|---|---|")
    print(f"| Newton-Schulz | {show(*interval(ours))} | |")
    for lr, adamw in losses.items():
        paired = [a - b for a, b in zip(adamw, ours, strict=True)]
        print(f"| AdamW, lr {lr:g} | {show(*interval(adamw))} | {show(*interval(paired), '+')} |")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--rates", type=float, nargs="+", default=[1.6e-2])
    return p


if __name__ == "__main__":
    main()
