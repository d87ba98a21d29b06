"""torch's side of the benchmarks: its fused operations, its own Muon and AdamW, and how it is timed and measured."""

import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import _muon

from zeta.backends import torch as backend
from zeta.backends.torch.kernel_gate import kernel_rows
from zeta.backends.torch.orthogonalize import CPU_HAS_BFLOAT16, working_dtype
from zeta.bench import model
from zeta.bench.measure import Contenders, Step, cpu
from zeta.core import COEFFICIENTS
from zeta.parity.paths import replaced
from zeta.routing.by_name import route

JORDAN = COEFFICIENTS["jordan"]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, model.EPS)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), targets.long())


FUSED = model.Operations(rms_norm, attention, cross_entropy)


class Torch:
    """A torch device, and what is measured on it. Raises ValueError, with a remedy, for a device that is not there."""

    library = "torch"

    def __init__(self, device: str | None = None) -> None:
        self.device = find_device(device)
        self.kind = self.device.type
        # torch.optim.Muon multiplies bfloat16 alone, which a CPU without units for it emulates, a hundred times as slow
        emulated = self.kind == "cpu" and not CPU_HAS_BFLOAT16
        self.muon = "Muon in float32" if emulated else "Muon"

    def machine(self) -> dict[str, Any]:
        """The device and the versions that a row was measured with."""
        name = torch.cuda.get_device_name(self.device) if self.kind == "cuda" else cpu()
        threads = {"threads": torch.get_num_threads()} if self.kind == "cpu" else {}
        products = str(working_dtype(self.array(np.zeros((1, 1))))).removeprefix("torch.")
        return {
            "library": f"torch {torch.__version__}",
            "device": self.kind,
            "name": name,
            "system": f"{platform.system()} {platform.machine()}",
            **threads,
            "products": products,
        }

    def array(self, x: np.ndarray) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=self.device)

    def numpy(self, x: Tensor) -> np.ndarray:
        return x.cpu().double().numpy()

    def wait(self, x: Any = None) -> Any:
        """x, once it is there."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()
        return x

    def newton_schulz(self, x: Tensor) -> Tensor:
        return backend.newton_schulz(x)

    def peers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Newton-Schulz of one matrix: torch.optim.Muon's, always in bfloat16, and its formula in float32."""

        def muon(x: Tensor) -> Tensor:
            return _muon._zeropower_via_newtonschulz(x, JORDAN[0], len(JORDAN), 1e-7)

        return {"Muon": muon, "Muon in float32": in_float32}

    def step(self, name: str, shapes: model.Shapes, dtype: str = "float32") -> Step:
        """A step of this optimizer, on parameters of its own; see `make_optimizers`."""
        optimizers = make_optimizers(name, self.parameters(shapes, dtype))

        def run() -> None:
            with replaced(_muon, **({"_zeropower_via_newtonschulz": in_float32} if "float32" in name else {})):
                for optimizer in optimizers:
                    optimizer.step()
            self.wait()

        def state() -> int:
            return sum(x.nbytes for o in optimizers for kept in o.state.values() for x in kept.values())

        return Step(run, state)

    def parameters(self, shapes: model.Shapes, dtype: str = "float32") -> dict[str, Any]:
        """With gradients."""
        torch.manual_seed(0)
        params = {
            n: torch.nn.Parameter(torch.randn(s, device=self.device).to(getattr(torch, dtype)) / 50)
            for n, s in shapes.items()
        }
        for p in params.values():
            p.grad = torch.randn_like(p)
        return params

    def gradients(self, config: model.Config, tokens: np.ndarray) -> Callable[[], Any]:
        """The language model's loss and gradients; products in bfloat16 on CUDA, with weights in float32."""
        dtype = torch.bfloat16 if self.kind == "cuda" else torch.float32
        params = {n: self.array(a).requires_grad_() for n, a in model.init(config, 0).items()}
        cos, sin = (self.array(a).to(dtype) for a in model.rotations(config))
        given = torch.from_numpy(tokens).to(self.device)

        def run() -> None:
            tree = model.nest({n: p.to(dtype) for n, p in params.items()})
            torch.autograd.grad(model.loss(tree, given, (cos, sin), config, FUSED), list(params.values()))
            self.wait()

        return run

    def symmetric_products(self) -> Iterator[tuple[int, Contenders]]:
        """(rows, the kernel and cuBLAS) on CUDA, where there is a kernel: half-precision batches of 2^22 entries."""
        if self.kind != "cuda" or kernel_rows(self.device) == inf:
            return
        from zeta.backends.torch.symmetric_kernel import symmetric

        for n in (512, 1024, 2048, 4096, 8192):
            x = torch.randn(max(1, (1 << 22) // n**2), n, n, device=self.device).half()
            yield n, {"Triton": partial(self.symmetric, symmetric, x), "cuBLAS": partial(self.symmetric, torch.bmm, x)}

    def symmetric(self, product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
        self.wait(product(x, x.mT))

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Most bytes that `run` held beyond what was there before; None on MPS, which does not tell."""
        if self.kind == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.wait(run())
            return torch.cuda.max_memory_allocated() - before
        return _cpu_peak(run) if self.kind == "cpu" else None


def _cpu_peak(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def make_optimizers(name: str, params: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """One of zeta's classes; torch's "AdamW"; or, of a name with a plus, its Muon for the matrices and AdamW beside."""
    adamw = partial(torch.optim.AdamW, fused=True)
    if name == "AdamW":
        return [adamw(params.values())]
    if "+" not in name:
        return [getattr(backend, name)(params.items())]
    matrices = {n: p for n, p in params.items() if route(n, tuple(p.shape)).treatment == "zeta"}
    rest = [p for n, p in params.items() if n not in matrices]
    muon = torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw")
    return [muon, *([adamw(rest)] if rest else [])]


def in_float32(x: Tensor, *_: Any) -> Tensor:
    """The formula of torch.optim.Muon's iteration, in float32: what its bfloat16 is worth on a device."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in JORDAN:
        s = x @ x.T
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def find_device(name: str | None) -> torch.device:
    """The device of this name; None is CUDA, else MPS, else the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, is_there in there.items() if is_there)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of torchrun
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count() if device and device.type == "cuda" else 1
    if device is None or not there.get(device.type) or (device.index or 0) >= count:
        choice = " or ".join(kind for kind, is_there in there.items() if is_there)
        raise ValueError(f"torch has no device {name!r} on this machine: choose --device {choice}")
    return device
