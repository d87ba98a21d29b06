"""Trainings that make the calls of code people already have around AdamW, with a class of ours in its place."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeta.backends.torch import Eta, Zeta, param_groups

STEPS, SAVED, KILLED = 9, 3, 5  # a checkpoint every third step


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln, self.c_fc = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(nn.functional.gelu(self.c_fc(self.ln(x))))


class Model(nn.Module):
    """A table, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.blocks = nn.ModuleList([Block(8) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def loss(model: nn.Module, t: int) -> Tensor:
    ids = torch.randint(16, (4, 7), generator=torch.Generator().manual_seed(t))
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(recipe: str, folder: Path, resume: bool = False, kill: bool = False) -> dict[str, Tensor]:
    """The parameters after STEPS steps; with `kill` SIGKILL ends the process before."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, file, start = Model(), Path(folder) / "saved.pt", 0
    job = RECIPES[recipe](model)
    if resume:
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        job.load(saved["job"])
        start = saved["step"]
        assert start == SAVED
    for t in range(start, STEPS):
        job.step(model, t)
        if kill and t + 1 == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if t + 1 == SAVED:
            torch.save({"model": model.state_dict(), "job": job.state(), "step": t + 1}, file)
    return {name: p.detach() for name, p in model.named_parameters()}


class NanoGPT:
    """Two groups by decay, fused, a scaler, clipping, and the rate written into the groups."""

    def __init__(self, model: nn.Module) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = Zeta(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(self, model: nn.Module, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 6e-3 * (1 - t / STEPS)
        self.scaler.scale(loss(model, t)).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Any:
        return self.optimizer.state_dict(), self.scaler.state_dict()

    def load(self, state: Any) -> None:
        self.optimizer.load_state_dict(state[0])
        self.scaler.load_state_dict(state[1])


class Titan:
    """torchtitan's container (b5bcd76): fused and foreach in every group, names beside, flat state by name."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        norms = [n for n in named if "ln" in n]
        self.optimizer = Eta([self.group(named, [n for n in named if n not in norms], 0.1),
                              self.group(named, norms, 0.0)])  # fmt: skip

    def group(self, named: dict[str, Tensor], names: list[str], decay: float) -> dict[str, Any]:
        params = [named[n] for n in names]
        return {"params": params, "param_names": names, "fused": True, "foreach": False, "lr": 0.01,
                "betas": (0.9, 0.95), "weight_decay": decay}  # fmt: skip

    def step(self, model: nn.Module, t: int) -> None:
        loss(model, t).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def make_state(self) -> None:
        """A step of zero gradients at a rate of zero, so that there are arrays to load into."""
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step(closure=None)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Any:
        self.make_state()
        saved, flat = self.optimizer.state_dict(), {}
        for group in saved["param_groups"]:
            for index, name in zip(group["params"], group["param_names"], strict=True):
                rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                flat |= {f"param_groups.{name}.{key}": value for key, value in rest.items()}
                flat |= {f"state.{name}.{key}": value for key, value in saved["state"][index].items()}
        return flat

    def load(self, flat: Any) -> None:
        self.make_state()
        groups, state = [], {}
        for group in self.optimizer.param_groups:
            indices = [len(state) + i for i in range(len(group["params"]))]
            first = group["param_names"][0]
            keys = [key for key in group if key not in ("params", "param_names")]
            groups.append({"params": indices} | {key: flat[f"param_groups.{first}.{key}"] for key in keys})
            for index, name, p in zip(indices, group["param_names"], group["params"], strict=True):
                state[index] = {key: flat[f"state.{name}.{key}"] for key in self.optimizer.state[p]}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Scheduled:
    """One optimizer and one scheduler: what the others here share."""

    optimizer: Any
    scheduler: Any

    def step(self, model: nn.Module, t: int) -> None:
        loss(model, t).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def state(self) -> Any:
        return self.optimizer.state_dict(), self.scheduler.state_dict()

    def load(self, state: Any) -> None:
        self.optimizer.load_state_dict(state[0])
        self.scheduler.load_state_dict(state[1])


class LayerDecay(Scheduled):
    """timm's and MAE's: a group for every layer, whose `lr_scale` a schedule of their own multiplies."""

    def __init__(self, model: nn.Module) -> None:
        def options(name: str, p: Tensor) -> dict[str, Any]:
            depth = 0 if name.startswith("wte") else 3 if name.startswith("lm_head") else 1 + int(name.split(".")[1])
            return {"lr_scale": 0.5 ** (3 - depth), "weight_decay": 0.05 if p.ndim > 1 else 0.0}

        self.optimizer = Zeta(param_groups(model, options=options), lr=0.01)

    def step(self, model: nn.Module, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.02 * (1 - t / STEPS) * group["lr_scale"]
        loss(model, t).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> Any:
        return self.optimizer.state_dict()

    def load(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


class SAM(torch.optim.Optimizer):
    """A wrapper whose `rho` stands in the groups that it shares with the optimizer inside."""

    def __init__(self, params: Any, inside: Any, rho: float, **options: Any) -> None:
        super().__init__(params, dict(rho=rho, **options))
        self.inside = inside(self.param_groups, **options)
        self.param_groups = self.inside.param_groups

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        moved = []
        params = [(g["rho"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for _, p in params]).norm()
        for rho, p in params:
            moved.append((p, p.clone()))
            p.add_(p.grad, alpha=float(rho / norm))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, before in moved:
            p.copy_(before)
        self.inside.step()


class Sharp(Scheduled):
    def __init__(self, model: nn.Module) -> None:
        self.optimizer = SAM(model.named_parameters(), Zeta, rho=0.05, lr=0.01)

    def step(self, model: nn.Module, t: int) -> None:
        loss(model, t).backward()
        self.optimizer.step(lambda: loss(model, t).backward())
        self.optimizer.zero_grad()

    def state(self) -> Any:
        return self.optimizer.inside.state_dict()

    def load(self, state: Any) -> None:
        self.optimizer.inside.load_state_dict(state)


class Averaged(Scheduled):
    """SWALR writes its `swa_lr` into the groups."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = Zeta(param_groups(model), lr=0.02)
        self.scheduler = torch.optim.swa_utils.SWALR(self.optimizer, swa_lr=0.005, anneal_epochs=4)


RECIPES: dict[str, Any] = {
    "nanoGPT": NanoGPT,
    "torchtitan": Titan,
    "layer decay": LayerDecay,
    "SAM": Sharp,
    "SWALR": Averaged,
}
