"""What the language model needs from torch: fused operations, gradients, optimizers, state."""

import os
import sys
import warnings
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zeta.backends.torch import Eta, Zeta, load_named_state, named_state, to_numpy
from zeta.bench import model
from zeta.bench.on_torch import FUSED, find_device
from zeta.routing.by_name import route

# array_api_compat keeps which library a type is of; the compiler warns that it asks anew
warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
TIMEOUT = timedelta(minutes=10)  # of a rank that waits for another: one may be writing a large checkpoint
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Node(nn.Module):
    """A node of the parameter tree, as torch's wrappers want it; its arrays are cast to `dtype` when they are used."""

    def __init__(self, tree: model.Params, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for name, value in tree.items():
            if isinstance(value, dict):
                self.add_module(name, (Layer if name.isdigit() else Node)(value, dtype))
            else:
                self.register_parameter(name, nn.Parameter(value))

    def tree(self) -> model.Params:
        """{name: array, or the node's own tree}; layers as they are, for their `forward` gathers their shards."""
        nodes = {name: node if isinstance(node, Layer) else node.tree() for name, node in self.named_children()}
        return nodes | {name: p.to(self.dtype) for name, p in self.named_parameters(recurse=False)}


class Layer(Node):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return model.block(self.tree(), x, *rest)


class Net(Node):
    """The language model: tokens (b, context + 1) -> () loss; `scores`: tokens (b, context) -> (b, context, vocab)."""

    def __init__(self, params: dict[str, Tensor], dtype: torch.dtype, **names: Any) -> None:
        super().__init__(model.nest(params), dtype)
        self.names = names

    def forward(self, tokens: Tensor, scores: bool = False) -> Tensor:
        return (model.logits if scores else model.loss)(self.tree(), tokens, **self.names)


class Trainer:
    """The model on a torch device: parameters in float32 (or float64), products in `dtype`.

    Under torchrun all ranks train it together, each on its rows of every batch: with copies of the parameters (DDP), or
    with a part of each (`fsdp`, FSDP2). Raises ValueError, with a remedy, for a device that is not there.
    """

    def __init__(
        self,
        config: model.Config,
        params: dict[str, np.ndarray],
        optimizer: str = "zeta",
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.99),
        dtype: str = "float32",
        device: str | None = None,
        fsdp: bool = False,
        ops: model.Operations = FUSED,
    ) -> None:
        self.device, self.dtype = find_device(device), DTYPES[dtype]
        if (self.device.type, dtype) == ("mps", "float64"):
            raise ValueError("MPS has no float64: add --device cpu, or choose --dtype float32")
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            # the same sums in the same order: a resumed run repeats an uninterrupted one
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.rank, self.ranks = join_ranks(self.device)
        ops = ops._replace(block=lambda layer, *rest: layer(*rest))
        cos, sin = (self._put(a, self.dtype, exact=True) for a in model.rotations(config))
        start = {name: self._put(a, torch.float32) for name, a in params.items()}
        self.net = Net(start, self.dtype, rope=(cos, sin), config=config, ops=ops)
        if fsdp:
            share_out(self.net, self.device)
        self.params = dict(self.net.named_parameters())
        copies = self.ranks > 1 and not fsdp
        self.optimizers = make_optimizers(
            optimizer, self.params, weight_decay, betas, dist.group.WORLD if copies else None
        )
        self._loss = torch.compile(self.net) if cuda and not fsdp else self.net
        self._training_loss = DistributedDataParallel(self._loss) if copies else self._loss

    def step(self, tokens: np.ndarray, lr: float, stop: bool = False) -> Tensor:
        """(2,): the loss of tokens (b, context + 1), all ranks' batch, before the step that it takes, NaN where the
        gradient is not finite; and how many ranks were told to stop. Nothing waits for the device: read them late.
        """
        loss = self._training_loss(self._rows(tokens))
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return self._sum(torch.stack([loss.detach() / self.ranks + 0 * norm, loss.new_tensor(stop)]))

    @torch.no_grad()
    def loss(self, tokens: np.ndarray) -> float:
        """The loss of tokens (b, context + 1), the same on all ranks."""
        rows = self._rows(tokens)
        loss = self._loss(rows if len(rows) else self._put(tokens[:1], torch.int32, exact=True))
        return float(self._sum(loss * len(rows) / len(tokens)))

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(b, context, vocab) scores for tokens (b, context), the same on all ranks."""
        return np.asarray(self.net(torch.from_numpy(tokens).to(self.device), scores=True).float().cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """What `zeta.checkpoint` saves: parameters by name, the optimizer's state as "optimizer.KEY.NAME"."""
        return to_numpy(named_state(self.params, self.optimizers))

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from arrays that `arrays` of either library gave, on any number of ranks."""
        load_named_state(self.params, self.optimizers, arrays)

    def _rows(self, tokens: np.ndarray) -> Tensor:
        """This rank's share of the rows."""
        start, end = (len(tokens) * k // self.ranks for k in (self.rank, self.rank + 1))
        return torch.from_numpy(tokens[start:end]).to(self.device)

    def _sum(self, x: Tensor) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(x)
        return x

    def _put(self, array: np.ndarray, dtype: torch.dtype, exact: bool = False) -> Tensor:
        wide = dtype if exact else torch.promote_types(self.dtype, dtype)
        return torch.from_numpy(array).to(wide).to(self.device)  # in this order: MPS has no float64


def join_ranks(device: torch.device) -> tuple[int, int]:
    """(rank, ranks) of torchrun; (0, 1) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def leave(status: int) -> NoReturn:
    """Ends a rank at once: a thread of gloo's that still holds a tensor aborts a process that takes Python down."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def share_out(net: Net, device: torch.device) -> None:
    """Leaves each rank a part of every parameter (FSDP2); a layer is gathered when it is used."""
    if not dist.is_initialized():
        raise ValueError(
            "--fsdp shares the model out over the ranks of torchrun: start it with torchrun, or leave it out"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in [node for node in net.modules() if isinstance(node, Layer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def make_optimizers(
    name: str, params: dict[str, Any], weight_decay: float, betas: tuple[float, float], group: Any = None
) -> list[torch.optim.Optimizer]:
    """One optimizer, or for Muon, which takes matrices only, two; `group` are ranks with copies of the parameters."""
    named = list(params.items())
    if name in ("zeta", "eta"):
        kind = Eta if name == "eta" else Zeta
        return [kind(named, betas=betas, weight_decay=weight_decay, process_group=group)]
    if name == "adamw":
        return [torch.optim.AdamW(named, betas=betas, weight_decay=weight_decay)]
    matrices = [(n, p) for n, p in named if route(n, tuple(p.shape)).treatment == "zeta"]
    rest = [(n, p) for n, p in named if route(n, tuple(p.shape)).treatment == "adamw"]
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay)]
