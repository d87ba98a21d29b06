"""MLX's side of the benchmarks: its fused operations, its own Muon and AdamW, and how it is timed and measured."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from math import sqrt
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from zeta.backends import mlx as backend
from zeta.backends.mlx.orthogonalize import working_dtype
from zeta.backends.mlx.state import tree_flatten
from zeta.bench import model
from zeta.bench.measure import Step
from zeta.core import COEFFICIENTS
from zeta.routing.by_name import route

JORDAN = COEFFICIENTS["jordan"]


def rms_norm(x: mx.array, weight: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, weight, model.EPS)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / sqrt(q.shape[-1]), mask="causal")


def cross_entropy(scores: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.cross_entropy(scores.astype(mx.result_type(scores, mx.array(0.0))), targets, reduction="mean")


FUSED = model.Operations(rms_norm, attention, cross_entropy)


class Mlx:
    """An MLX device, and what is measured on it. Raises ValueError, with a remedy, for a device that is not there."""

    library, muon = "mlx", "Muon"

    def __init__(self, device: str | None = None) -> None:
        use_device(device)
        self.kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        self.compiled = self.kind == "gpu"  # whether steps are

    def machine(self) -> dict[str, Any]:
        """The device and the versions that a row was measured with."""
        return {
            "library": f"mlx {version('mlx')}",
            "device": self.kind,
            "name": str(mx.device_info()["device_name"]),
            "system": f"{platform.system()} {platform.machine()}",
            "products": str(working_dtype(mx.zeros(1))).removeprefix("mlx.core."),
        }

    def array(self, x: np.ndarray) -> mx.array:
        return mx.array(x.astype(np.float32))

    def numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x, dtype=np.float64)

    def wait(self, x: Any) -> Any:
        """x, once it is there."""
        mx.eval(x)
        return x

    def newton_schulz(self, x: mx.array) -> mx.array:
        return backend.newton_schulz(x)

    def peers(self) -> dict[str, Callable[[mx.array], mx.array]]:
        """Newton-Schulz of one matrix: that of mlx.optimizers.Muon."""
        muon = optim.Muon(learning_rate=1.0)
        return {"Muon": lambda x: muon._zeropower_via_newtonschulz5(x, len(JORDAN))}

    def step(self, name: str, shapes: model.Shapes, dtype: str = "float32") -> Step:
        """A step of this optimizer, on parameters of its own; see `make_optimizer`."""
        optimizer, gradients = make_optimizer(name), parameters(shapes, 1.0, dtype)
        held = {"parameters": parameters(shapes, 0.02, dtype)}
        optimizer.init(held["parameters"])
        state = [held, optimizer.state]

        def step(gradients: Any) -> None:
            held["parameters"] = optimizer.apply_gradients(gradients, held["parameters"])

        if self.compiled:
            step = mx.compile(step, inputs=state, outputs=state)

        def run() -> None:
            step(gradients)
            mx.eval(state)

        return Step(run, lambda: sum(x.nbytes for key, x in tree_flatten(optimizer.state) if "." in key))

    def gradients(self, config: model.Config, tokens: np.ndarray) -> Callable[[], Any]:
        """The language model's loss and gradients; products in bfloat16 on a GPU, with weights in float32."""
        dtype = mx.bfloat16 if self.kind == "gpu" else mx.float32
        params = {n: self.array(a) for n, a in model.init(config, 0).items()}
        cos, sin = (self.array(a).astype(dtype) for a in model.rotations(config))

        def loss(params: dict[str, mx.array], tokens: mx.array) -> mx.array:
            tree = model.nest({n: p.astype(dtype) for n, p in params.items()})
            return model.loss(tree, tokens, (cos, sin), config, FUSED)  # type: ignore[no-any-return]

        step, given = jit(mx.value_and_grad(loss)), mx.array(tokens)
        return lambda: self.wait(step(params, given))

    def symmetric_products(self) -> tuple[()]:
        """MLX has one kernel for all."""
        return ()

    def peak(self, run: Callable[[], Any]) -> int:
        """Most bytes that `run` held beyond what was there before."""
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self.wait(run())
        return mx.get_peak_memory() - before


def parameters(shapes: model.Shapes, scale: float, dtype: str) -> Any:
    """A tree of them."""
    rng = np.random.default_rng(0)
    arrays = ((n, scale * rng.standard_normal(s, np.float32)) for n, s in shapes.items())
    return tree_unflatten([(n, mx.array(a).astype(getattr(mx, dtype))) for n, a in arrays])


def make_optimizer(name: str) -> optim.Optimizer:
    """One of zeta's classes; MLX's "AdamW"; or, "Muon + AdamW", its Muon for the matrices and AdamW beside."""
    if name == "AdamW":
        return optim.AdamW(1e-3)
    if "+" not in name:
        return getattr(backend, name)()  # type: ignore[no-any-return]

    def is_matrix(name: str, weight: mx.array) -> bool:
        return route(name, weight.shape).treatment == "zeta"

    return optim.MultiOptimizer([optim.Muon(1e-3), optim.AdamW(1e-3)], [is_matrix])


def jit(function: Any) -> Any:
    """The function compiled, on a GPU. On the CPU MLX 0.32 calls a C++ compiler for that, half a minute a model."""
    return mx.compile(function) if mx.default_device() == mx.Device(mx.gpu) else function


def use_device(name: str | None, dtype: str = "float32") -> None:
    """Makes it the default device; None leaves MLX's own choice."""
    there = ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]
    if name is not None and name not in there:
        raise ValueError(f"MLX has no device {name!r} on this machine: choose --device {' or '.join(there)}")
    if name is not None:
        mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    if dtype == "float64" and mx.default_device() != mx.Device(mx.cpu):
        raise ValueError("MLX has float64 on the CPU only: add --device cpu, or choose --dtype float32")
