"""SOAP beside pytorch-optimizer's and HeavyBall's, rate by rate and with eigenvectors of every step or of every tenth.

    python bench/soap.py
    python bench/soap.py --rates 8e-3 --frequencies 1 2 5 10

The smallest language model of `tasks.py` for so many steps, one seed; its matrices go to SOAP, the rest to AdamW as in
`contenders.py`. Ours has exact eigenvectors, the peers' are turned by a step of power iteration and QR.
"""

import argparse
from collections import defaultdict
from functools import partial
from typing import Any

import heavyball
import pytorch_optimizer
import torch
from contenders import REST, SEARCHED, Setting, make, split, train
from tasks import TASKS
from torch import nn

from zeta.backends.torch import SOAP

TASK = "lm_100k"
PEERS: dict[str, Any] = {  # (matrices, lr=, betas=, weight_decay=, precondition_frequency=)
    "ours": SOAP,
    "pytorch-optimizer": pytorch_optimizer.SOAP,
    "HeavyBall": lambda params, **options: heavyball.SOAP(
        params, shampoo_beta=options["betas"][1], merge_dims=False, **options
    ),
}


class Beside:
    """A peer's SOAP for the matrices, and AdamW for the rest, as one optimizer for `contenders.train`."""

    def __init__(self, s: Setting, model: nn.Module, peer: str, frequency: int) -> None:
        options: dict[str, Any] = {"weight_decay": s.weight_decay}
        matrices, rest = split(model)
        taken = [matrices] if peer == "ours" else [p for _, p in matrices["params"]]
        soap = PEERS[peer](taken, lr=s.lr, betas=(s.b1, s.b2), precondition_frequency=frequency, **options)
        self.parts = [soap, torch.optim.AdamW(rest["params"], lr=s.adamw_lr, betas=REST, **options)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state: dict[Any, Any] = defaultdict(dict)  # not counted

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    heavyball.utils.compile_mode = None
    task = TASKS[TASK][0]()
    start = Setting(TASK, "muon", 0.0, 8e-3, 0.1, 0.9, 0.95, SEARCHED, args.steps)
    print(f"| loss after {args.steps} steps, at lr | {' | '.join(f'{lr:g}' for lr in args.rates)} |")
    print("|---" * (1 + len(args.rates)) + "|")
    makers: dict[str, Any] = {
        f"{peer}, every {every}": partial(Beside, peer=peer, frequency=every)
        for every in args.frequencies
        for peer in PEERS
    }
    for label, maker in (makers | {"Muon": make, "AdamW": make}).items():
        name = label.lower() if maker is make else "soap"
        losses = [train(start._replace(lr=lr, optimizer=name), task, maker)["final"] for lr in args.rates]
        print(f"| {label} | {' | '.join(f'{loss:.4f}' for loss in losses)} |", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    p.add_argument("--frequencies", type=int, nargs="+", default=[1, 10])
    return p


if __name__ == "__main__":
    main()
