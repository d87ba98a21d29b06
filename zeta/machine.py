"""What this machine can run: a `Target` for every library, device and dtype found here, and what is missing.

The parity suite drives every library through the same few functions of a target, so that no check asks which it is.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from zeta import adamw, core
from zeta.core import Array, Coefficients, Hyper, Orthogonalize
from zeta.routing import route

Arrays = dict[str, Array]  # a parameter's dotted path -> its NumPy array in float64
Steps = Callable[[Arrays, list[Arrays], Hyper, Coefficients], Arrays]  # the parameters after one step a gradient


@dataclass(frozen=True)
class Target:
    """One library on one device. `dtype` is that of Newton-Schulz's products; "auto" is the backend's own choice."""

    library: str
    device: str
    dtype: str
    array: Callable[[Array], Array]  # from NumPy float64 to `dtype`
    wide: Callable[[Array], Array]  # from NumPy float64 to the dtype of parameters and state
    numpy: Callable[[Array], Array]  # back to NumPy float64
    used: Callable[[Array], str]  # the device that really made this array
    newton_schulz: Callable[[Array, Coefficients], Array]
    steps: Steps | None = None  # the library's optimizer class; None where the library has only the core
    scope: Callable[[], AbstractContextManager[object]] = nullcontext  # all of the above run inside it

    @property
    def name(self) -> str:
        return f"{self.library} {self.device} {self.dtype}"


@dataclass(frozen=True)
class Absent:
    """A library or device that is not here. `expected` where this machine should have it: then it is a failure."""

    library: str
    device: str
    reason: str
    expected: bool = False


def targets() -> Iterator[Target | Absent]:
    """Everything to test here, in a fixed order. Importing torch and MLX takes a second or two."""
    yield from (numpy_target(dtype) for dtype in ("float64", "float32"))
    libraries: dict[str, tuple[str, Callable[[], Iterable[Target | Absent]]]] = {
        "array_api_strict": ("array-api-strict", lambda: map(_array_api_strict, ("float64", "float32"))),
        "torch": ("'zeta-optim[torch]'", _torch),
        "mlx": ("'zeta-optim[mlx]'", _mlx),
    }
    for library, (package, found) in libraries.items():
        if not find_spec(library):
            yield Absent(library, "cpu", f"not installed: pip install {package}")
            continue
        try:
            yield from found()
        except ImportError as error:  # it is here, and does not work: a failure, but the others are still to be told
            yield Absent(library, "cpu", str(error), expected=True)


def pure_steps(
    target: Target, params: Arrays, grads: list[Arrays], hyper: Hyper, orthogonalize: Orthogonalize | None
) -> Arrays:
    """The parameters after one pure `update` for each of `grads`, parameter by parameter, on the target's arrays."""
    after = {}
    for name, param in params.items():
        matrices = route(name, param.shape).matrices
        w = target.wide(param.reshape(matrices or param.shape))
        state = core.init(w) if matrices else adamw.init(w)
        for g in (target.wide(grad[name].reshape(w.shape)) for grad in grads):
            step = core.update(g, state, w, hyper, orthogonalize) if matrices else adamw.update(g, state, w, hyper)
            w, state = step
        after[name] = target.numpy(w).reshape(param.shape)
    return after


def numpy_target(dtype: str) -> Target:
    def array(x: Array) -> Array:
        return x.astype(dtype)

    return Target("numpy", "cpu", dtype, array, array, np.float64, lambda x: str(x.device), core.newton_schulz)


def _array_api_strict(dtype: str) -> Target:
    import array_api_strict as xp

    def array(x: Array) -> Array:
        return xp.asarray(x.astype(dtype))

    def used(x: Array) -> str:
        return "cpu" if x.device == xp.Device("CPU_DEVICE") else str(x.device)

    def numpy(x: Array) -> Array:
        return np.from_dlpack(x).astype("float64")

    return Target("array_api_strict", "cpu", dtype, array, array, numpy, used, core.newton_schulz)


def _torch() -> Iterator[Target | Absent]:
    import torch

    yield from (_torch_target("cpu", dtype) for dtype in ("float64", "float32", "bfloat16", "auto"))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    nvidia = Path("/proc/driver/nvidia/version").exists()
    for device, expected in (("cuda", nvidia), ("mps", _apple())):
        if present[device]:
            yield from (_torch_target(device, dtype) for dtype in ("float32", "float16", "bfloat16", "auto"))
        else:
            why = (
                f"this machine has the hardware, but torch {torch.__version__} does not use it" if expected else "none"
            )
            yield Absent("torch", device, why, expected)


def _torch_target(device: str, dtype: str) -> Target:
    import torch

    from zeta.backends import torch as backend

    ns_dtype = None if dtype == "auto" else getattr(torch, dtype)
    state_dtype = torch.promote_types(ns_dtype or torch.float32, torch.float32)

    def tensor(x: Array, dtype: Array = state_dtype) -> Array:
        return torch.tensor(x, dtype=dtype, device=device)

    def steps(params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        tensors = {name: torch.nn.Parameter(tensor(p)) for name, p in params.items()}
        optimizer = backend.Zeta(tensors.items(), **vars(hyper), coefficients=coefficients, ns_dtype=ns_dtype)
        for grad in grads:
            for name, p in tensors.items():
                p.grad = tensor(grad[name])
            optimizer.step()
        return {name: numpy(p) for name, p in tensors.items()}

    def numpy(x: Array) -> Array:
        return x.detach().cpu().double().numpy()

    return Target(
        "torch",
        device,
        dtype,
        array=lambda x: tensor(x, ns_dtype or torch.float32),
        wide=tensor,
        numpy=numpy,
        used=lambda x: str(x.device.type),
        newton_schulz=lambda x, coefficients: backend.newton_schulz(x, coefficients, ns_dtype),
        steps=steps,
    )


def _mlx() -> Iterator[Target | Absent]:
    if "mlx.core" not in sys.modules:
        os.environ["MLX_ENABLE_TF32"] = "0"  # else float32 products are rounded to 10 bits on CUDA and M5 (MLX 0.32)
    import mlx.core as mx

    yield from (_mlx_target("cpu", dtype) for dtype in ("float32", "float16", "bfloat16", "auto"))
    if mx.is_available(mx.gpu):
        yield from (_mlx_target("gpu", dtype) for dtype in ("float32", "float16", "bfloat16", "auto"))
    else:
        why = "this is an Apple machine, but MLX would run on its CPU" if _apple() else "none that this MLX can use"
        yield Absent("mlx", "gpu", why, _apple())


def _mlx_target(device: str, dtype: str) -> Target:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from zeta.backends import mlx as backend

    ns_dtype = None if dtype == "auto" else getattr(mx, dtype)
    outside = mx.default_device()  # where a user's arrays go, which on a machine with a GPU should be there

    def array(x: Array, dtype: Array = mx.float32) -> Array:
        return mx.array(x.astype("float32")).astype(dtype)

    def steps(params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        optimizer = backend.Zeta(
            hyper.lr, hyper.betas, hyper.eps, hyper.weight_decay, coefficients=coefficients, ns_dtype=ns_dtype
        )
        tree = tree_unflatten([(name, array(p)) for name, p in params.items()])
        for grad in grads:
            tree = optimizer.apply_gradients(tree_unflatten([(name, array(g)) for name, g in grad.items()]), tree)
            mx.eval(tree, optimizer.state)
        return {name: numpy(p) for name, p in dict(tree_flatten(tree)).items()}

    def numpy(x: Array) -> Array:
        return np.array(x.astype(mx.float32)).astype("float64")

    return Target(
        "mlx",
        device,
        dtype,
        array=lambda x: array(x, ns_dtype or mx.float32),
        wide=array,
        numpy=numpy,
        used=lambda _: _mlx_device(outside if device == "gpu" else mx.default_device()),  # an array does not tell
        newton_schulz=lambda x, coefficients: backend.newton_schulz(x, coefficients, ns_dtype),
        steps=steps,
        scope=lambda: mx.stream(mx.Device(getattr(mx, device))),
    )


def _mlx_device(device: Array) -> str:
    return "gpu" if "gpu" in str(device) else "cpu"


def _apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"
