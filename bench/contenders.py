"""The optimizers of `convergence.py`, and one training run of one of them: `train` is all that its workers do."""

from collections.abc import Callable
from math import isfinite
from time import perf_counter, process_time
from typing import Any, NamedTuple

import tasks  # first: it puts examples/ on the path
import torch
from torch import Tensor, nn
from trainer.loop import learning_rate

from zeta import core, family, preconditioned
from zeta.backends.torch import Zeta, param_groups
from zeta.core import Array, Hyper, Rule, Stages, State, Step

SEARCHED = 100  # the seed of all runs that a search compares
LOOKS = 10  # at the held-out loss, in a run of another seed
REST = (0.9, 0.95)  # AdamW's betas, for what is not a matrix
WARM = 3  # steps before a CUDA graph of one
Batch = tuple[Tensor, ...]


class Setting(NamedTuple):
    """A run: together with the code, the data and the device, all that its result depends on."""

    task: str
    optimizer: str
    lr: float  # of the matrices
    adamw_lr: float  # of the rest, AdamW's: embedding, head, norms
    weight_decay: float  # of both
    b1: float
    b2: float
    seed: int
    steps: int


def whitened_ahead(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """Zeta's first half with the momentum that Muon and Eta have."""
    (b1, b2), eps = hyper.betas, hyper.eps
    m = stages.ema(state["exp_avg"], g, b1)
    v = stages.ema_sq(state["exp_avg_sq"], g, b2)
    return stages.whiten(stages.nesterov(m, g, b1), v, eps), {"exp_avg": m, "exp_avg_sq": v}


zeta_nesterov = core.zeta._replace(local=whitened_ahead)  # how much of Muon's and Eta's lead over Zeta that is
eta_plain = family.eta._replace(local=family.averaged)  # Eta with Zeta's momentum


# name -> (label, rule; None is AdamW for everything)
CONTENDERS: dict[str, tuple[str, Rule | None]] = {
    "adamw": ("AdamW", None),
    "muon": ("Muon", family.muon),
    "adamuon": ("AdaMuon", family.adamuon),
    "normuon": ("NorMuon", family.normuon),
    "soap": ("SOAP", preconditioned.soap()),
    "soap_1": ("SOAP, eigenvectors of every step", preconditioned.soap(1)),
    "zeta": ("Zeta (the paper's)", family.zeta),
    "eta": ("Eta (ours)", family.eta),
    "zeta_nesterov": ("Zeta with Nesterov momentum", zeta_nesterov),
    "eta_plain": ("Eta with plain momentum", eta_plain),
    "rank1_before": ("rank-1 variance before (Muon^2-F)", family.rank1_before),
    "rank1_after": ("rank-1 variance after", family.rank1_after),
    "rank1_both": ("rank-1 variance before and after", family.rank1_both),
    "whiten_after": ("element-wise variance after", family.whiten_after),
    "whiten_both": ("element-wise variance before and after", family.whiten_both),
    "signum": ("Signum", family.signum),
    "adago": ("AdaGO", family.adago()),
    "dion2": ("Dion2", family.dion2()),
    "olion": ("OLion", family.olion),
    "shampoo": ("Shampoo", preconditioned.shampoo()),
    "schattor": ("Schattor, p = 4", preconditioned.schattor()),
}
ONE_BETA = {"muon", "eta", "eta_plain", "signum", "adago", "dion2", "schattor"}  # whose b2 does nothing


def split(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of the matrices and of the rest: the projections of `zeta.bench.model` are in no layer of torch's."""
    return param_groups(model, {"_proj.weight": "zeta"})


def make(s: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """The setting's optimizer of all the model's parameters; its groups' lr are their highest.

    Products are in float32, or where the model's are in half precision in the device's default.
    """
    groups, rule = split(model), CONTENDERS[s.optimizer][1]
    cuda = next(model.parameters()).is_cuda
    options: dict[str, Any] = {"weight_decay": s.weight_decay, "capturable": cuda and not (rule and rule.decomposes)}
    for group in groups:
        matrices = group["treatment"] == "zeta"
        group |= {"lr": s.lr, "betas": (s.b1, s.b2)} if matrices else {"lr": s.adamw_lr, "betas": REST}
        if options["capturable"]:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
    if rule is None:
        kept = ("params", "lr", "betas")
        return torch.optim.AdamW([{key: g[key] for key in kept} for g in groups], **options)
    of_rule: type[Zeta] = type("OfRule", (Zeta,), {"rule": rule})
    half = getattr(model, "dtype", torch.float32) == torch.bfloat16
    products = {"ns_dtype": torch.float32} if rule.orthogonalizes and not half else {}
    return of_rule(groups, decay_vectors=True, **products, **options)


def train(
    s: Setting, task: tasks.Task, make: Callable[[Setting, nn.Module], Any] = make, device: str = "cpu"
) -> dict[str, Any]:
    """What a line holds beside the setting: {parameters, tokens_per_parameter, final: the loss on the search's split,
    or None where the run diverged, claims: that on the other (where the task has one, and the seed is not the
    search's), curve: [[step, loss on the search's split], ...], and what it cost}.

    On a CPU times are of this process, not of the clock, so that other processes count little; on a GPU the step is a
    CUDA graph, the optimizer in it.
    """
    task = on(task, device)
    model = task.model(s.seed)
    optimizer = make(s, model)
    curve, spent, inside = walk(s, task, model, optimizer)
    final, steps, parameters = curve[-1][1], curve[-1][0], sum(p.numel() for p in model.parameters())
    result = {"final": final, "curve": curve, "data": task.data, "state": round(state_size(model, optimizer), 3)}
    if task.claims and s.seed != SEARCHED:
        result["claims"] = held_out(model, task.claims) if final is not None else None
    result |= {"parameters": parameters, "tokens_per_parameter": round(s.steps * task.tokens / parameters, 3)}
    ms = {"step_ms": round(1e3 * spent / steps, 2)}
    ms |= {} if inside is None else {"optimizer_ms": round(1e3 * inside / steps, 2)}
    return result | ms | {"seconds": round(spent, 2)}


def on(task: tasks.Task, device: str) -> tasks.Task:
    """The task with its model and batches there."""

    def moved(batch: Batch) -> Batch:
        return tuple(x.to(device) for x in batch)

    return task._replace(
        model=lambda seed: task.model(seed, device),
        batch=lambda step, seed: moved(task.batch(step, seed)),
        search=[*map(moved, task.search)],
        claims=[*map(moved, task.claims)],
    )


def walk(s: Setting, task: tasks.Task, model: nn.Module, optimizer: Any) -> tuple[list[list[Any]], float, float | None]:
    """(the curve, seconds of all steps, of those the optimizer's; None where they are not told apart)."""
    curve, spent, looks = list[list[Any]](), 0.0, 1 if s.seed == SEARCHED else LOOKS
    warmup = min(max(10, s.steps // 100), s.steps // 10)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    cuda = next(model.parameters()).is_cuda
    take: Any = (Replayed if cuda and optimizer.param_groups[0].get("capturable") else Eager)(model, optimizer)
    clock = perf_counter if cuda else process_time
    for step in range(1, s.steps + 1):
        start = clock()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            lr = learning_rate(step, {"lr": peak, "steps": s.steps, "warmup": warmup})
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        loss = take(*task.batch(step, s.seed)).item()
        spent += clock() - start
        if not isfinite(loss):
            return [*curve, [step, None]], spent, take.inside
        if step % -(-s.steps // looks) == 0 or step == s.steps:
            curve.append([step, held_out(model, task.search)])
    return curve, spent, take.inside


class Eager:
    """A training step: a batch's loss (), before the step. `inside`: the optimizer's seconds of this process so far."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer, self.inside = model, optimizer, 0.0

    def __call__(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        start = process_time()
        self.optimizer.step()
        self.inside += process_time() - start
        return loss.detach()


class Replayed:
    """The same as a CUDA graph, from its fourth call on: what a step is given must be of one shape."""

    inside = None  # a graph does not tell

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.step, self.warm, self.graph = Eager(model, optimizer), 0, torch.cuda.CUDAGraph()

    def __call__(self, *batch: Tensor) -> Tensor:
        self.warm += 1
        if self.warm <= WARM:  # what is made once, such as state, is made outside
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self.step(*batch)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.warm == WARM + 1:
            self.given = [x.clone() for x in batch]
            self.step.optimizer.zero_grad()
            with torch.cuda.graph(self.graph):
                self.loss = self.step(*self.given)
        for own, x in zip(self.given, batch, strict=True):
            own.copy_(x)
        self.graph.replay()
        return self.loss


@torch.no_grad()
def held_out(model: nn.Module, batches: list[Batch]) -> float | None:
    """The mean loss over the batches; None where it is not finite."""
    loss = sum(model(*batch).item() for batch in batches) / len(batches)
    return round(loss, 5) if isfinite(loss) else None


def state_size(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Numbers kept for every entry of the matrices."""
    matrices = [p for g in split(model) if g["treatment"] == "zeta" for _, p in g["params"]]
    kept = sum(t.numel() for p in matrices for t in optimizer.state[p].values() if t.ndim > 0)
    return kept / sum(p.numel() for p in matrices)
