"""What this machine can run: a `Target` for every library, device and dtype found here, and what is missing.

The parity suite drives every library through the same few functions of a target, so that no check asks which it is.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from zeta import adamw, core, family
from zeta.core import Array, Coefficients, Hyper, Orthogonalize, Rule
from zeta.parity.paths import replaced
from zeta.routing.by_name import route
from zeta.routing.layout import is_vector

Arrays = dict[str, Array]  # a parameter's dotted path -> its NumPy array in float64
# (the class's name, parameters, gradients of each step, ...) -> the parameters after them
Steps = Callable[[str, Arrays, list[Arrays], Hyper, Coefficients], Arrays]
FORMS = ("direct", "gram", "restart", "1xn", "batch", "adamw")  # the paths that every backend has


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
    steps: Steps | None = None  # the library's optimizer classes; None where the library has only the core
    scope: Callable[[], AbstractContextManager[object]] = nullcontext  # all of the above run inside it
    paths: tuple[str, ...] = ("core", "adamw")  # those of `zeta.parity.paths.PATHS` that it has
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the smallest that takes a path of this device
    products: Any = None  # the backend's module of products
    rules: dict[str, Rule] = field(default_factory=lambda: family.COMPARED)
    chosen: str = ""  # what "auto" is here
    note: str = ""  # what a training run here would do otherwise than the checks

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
    for library, (package, targets_of) in libraries.items():
        if not find_spec(library):
            yield Absent(library, "cpu", f"not installed: pip install {package}")
            continue
        try:
            yield from targets_of()
        except ImportError as error:  # it is here, and does not work: a failure, but the others are still to be told
            yield Absent(library, "cpu", str(error), expected=True)


def pure_steps(
    target: Target,
    params: Arrays,
    grads: list[Arrays],
    hyper: Hyper,
    orthogonalize: Orthogonalize | None,
    name: str = "Zeta",
) -> Arrays:
    """The parameters after one pure `update` for each of `grads` that they are in, on the target's arrays."""
    rule, after = target.rules[name], {}
    for path, param in params.items():
        way = route(path, param.shape)
        matrices, undecayed = way.matrices, replace(hyper, weight_decay=0.0)
        own = undecayed if is_vector(way, param.shape) else hyper
        w = target.wide(param.reshape(matrices or param.shape))
        state = rule.init(w) if matrices else adamw.init(w)
        for g in (target.wide(grad[path].reshape(w.shape)) for grad in grads if path in grad):
            step = rule.update(g, state, w, hyper, orthogonalize) if matrices else adamw.update(g, state, w, own)
            w, state = step
        after[path] = target.numpy(w).reshape(param.shape)
    return after


def steps_of(target: Target) -> Steps:
    """The library's classes; where it has none the rules, around the target's Newton-Schulz."""

    def steps(name: str, params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        return pure_steps(target, params, grads, hyper, lambda x: target.newton_schulz(x, coefficients), name)

    return target.steps or steps


def numpy_target(dtype: str) -> Target:
    def array(x: Array) -> Array:
        return x.astype(dtype)

    return Target("numpy", "cpu", dtype, array, array, np.float64, lambda x: str(x.device), _core_newton_schulz)


def _core_newton_schulz(x: Array, coefficients: Coefficients) -> Array:
    return core.newton_schulz(x, coefficients)  # looked up here, where `zeta.parity.paths` may watch it


def _array_api_strict(dtype: str) -> Target:
    import array_api_strict as xp

    def array(x: Array) -> Array:
        return xp.asarray(x.astype(dtype))

    def used(x: Array) -> str:
        return "cpu" if x.device == xp.Device("CPU_DEVICE") else str(x.device)

    def numpy(x: Array) -> Array:
        return np.from_dlpack(x).astype("float64")

    return Target("array_api_strict", "cpu", dtype, array, array, numpy, used, _core_newton_schulz)


def _torch() -> Iterator[Target | Absent]:
    import torch

    yield from (_torch_target("cpu", dtype) for dtype in ("float64", "float32", "float16", "bfloat16", "auto"))
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
    from zeta.backends.torch import orthogonalize as products
    from zeta.backends.torch.kernel_gate import kernel_rows

    ns_dtype = None if dtype == "auto" else getattr(torch, dtype)
    state_dtype = torch.promote_types(ns_dtype or torch.float32, torch.float32)
    sizes: dict[str, Any] = {} if dtype in ("float32", "auto") else SMALL
    block, cache = (sizes.get(name, getattr(products, name)) for name in ("BLOCK", "CACHE_BYTES"))

    def tensor(x: Array, dtype: Array = state_dtype) -> Array:
        return torch.tensor(x, dtype=dtype, device=device)

    def steps(name: str, params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        tensors = {path: torch.nn.Parameter(tensor(p)) for path, p in params.items()}
        kind = getattr(backend, name)
        optimizer = kind(tensors.items(), **vars(hyper), coefficients=coefficients, ns_dtype=ns_dtype)
        for grad in grads:
            for path, p in tensors.items():
                p.grad = tensor(grad[path]) if path in grad else None
            optimizer.step()
        return {path: numpy(p) for path, p in tensors.items()}

    def numpy(x: Array) -> Array:
        return x.detach().cpu().double().numpy()

    @contextmanager
    def scope() -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with replaced(products, **sizes):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    shapes: dict[str, tuple[int, ...]] = {}
    if device == "cpu":
        stack = (cache // 2048, 16, 64) if sizes else (cache // 32768, 64, 256)
        shapes = {"blocks": (2 * block, 2 * block), "parts": stack}
    elif device == "cuda" and dtype != "float32" and kernel_rows(torch.device(device)) < inf:
        sizes = {"kernel_rows": lambda _: KERNEL_ROWS}
        shapes = {"kernel": (KERNEL_ROWS, KERNEL_ROWS)}
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
        scope=scope,
        paths=(*FORMS, *shapes, *core_path(dtype)),
        shapes=shapes,
        products=products,
        chosen=str(products.working_dtype(tensor(np.zeros(1)))).split(".")[-1] if dtype == "auto" else "",
        note=precision_note(torch.get_float32_matmul_precision()) if dtype == "float32" else "",
    )


# Where a CPU's blocks and parts begin while float64, float16 and bfloat16 are checked, for which a CPU may be slow: in
# bfloat16 without units for it, 512 rows take seconds. float32 and "auto" are checked with the sizes of training.
SMALL = {"BLOCK": 64, "CACHE_BYTES": 1 << 14}
KERNEL_ROWS = 512  # from which CUDA's kernel is checked: the oracle takes minutes for 4096


def core_path(dtype: str) -> tuple[str, ...]:
    """The core serves what has a backend, too, but is checked there only in the precisions of moments."""
    return ("core",) if dtype in ("float64", "float32") else ()


def precision_note(given: str) -> str:
    """For torch.get_float32_matmul_precision(), as a process here starts with it."""
    if given == "highest":
        return ""
    return (
        f"checked with float32 products in full, but torch.get_float32_matmul_precision() is {given!r} here, so that "
        "training rounds them to fewer bits: call torch.set_float32_matmul_precision('highest') to train as checked"
    )


def tf32_note(given: str | None) -> str:
    """For the environment's MLX_ENABLE_TF32, where MLX has a GPU."""
    if given == "0":
        return ""
    return (
        f"checked with MLX_ENABLE_TF32=0, but it is {'not set' if given is None else given} here, so that on CUDA and "
        "M5 training rounds float32 products to 10 bits: set it to 0 to train as checked"
    )


def _mlx() -> Iterator[Target | Absent]:
    given = os.environ.get("MLX_ENABLE_TF32")
    if "mlx.core" not in sys.modules:
        os.environ["MLX_ENABLE_TF32"] = "0"  # else float32 products are rounded to 10 bits on CUDA and M5 (MLX 0.32)
    import mlx.core as mx

    yield from (_mlx_target("cpu", dtype) for dtype in ("float32", "float16", "bfloat16", "auto"))
    if mx.is_available(mx.gpu):
        notes = {"float32": tf32_note(given)}
        for dtype in ("float32", "float16", "bfloat16", "auto"):
            yield replace(_mlx_target("gpu", dtype), note=notes.get(dtype, ""))
    else:
        why = "this is an Apple machine, but MLX would run on its CPU" if _apple() else "none that this MLX can use"
        yield Absent("mlx", "gpu", why, _apple())


def _mlx_target(device: str, dtype: str) -> Target:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from zeta.backends import mlx as backend
    from zeta.backends.mlx import orthogonalize as products

    ns_dtype = None if dtype == "auto" else getattr(mx, dtype)
    outside = mx.default_device()  # where a user's arrays go, which on a machine with a GPU should be there

    def array(x: Array, dtype: Array = mx.float32) -> Array:
        return mx.array(x.astype("float32")).astype(dtype)

    def steps(name: str, params: Arrays, grads: list[Arrays], hyper: Hyper, coefficients: Coefficients) -> Arrays:
        optimizer = getattr(backend, name)(*vars(hyper).values(), coefficients=coefficients, ns_dtype=ns_dtype)
        flat = {path: array(p) for path, p in params.items()}
        for grad in grads:
            gradients = tree_unflatten([(path, array(g)) for path, g in grad.items()])
            after = optimizer.apply_gradients(gradients, tree_unflatten(list(flat.items())))
            flat |= dict(tree_flatten(after))
            mx.eval(flat, optimizer.state)
        return {path: numpy(p) for path, p in flat.items()}

    def numpy(x: Array) -> Array:
        return np.array(x.astype(mx.float32)).astype("float64")

    def scope() -> AbstractContextManager[object]:
        return mx.stream(mx.Device(getattr(mx, device)))

    shapes: dict[str, tuple[int, ...]] = {}
    if device == "cpu":
        shapes["blocks"] = (2 * products.BLOCK, 2 * products.BLOCK)
    with scope():
        chosen = str(products.working_dtype(mx.zeros(1))).split(".")[-1]
    return Target(
        "mlx",
        device,
        dtype,
        array=lambda x: array(x, ns_dtype or mx.float32),
        wide=array,
        numpy=numpy,
        used=lambda _: _mlx_device(outside if device == "gpu" else mx.default_device()),  # an array does not say
        newton_schulz=lambda x, coefficients: backend.newton_schulz(x, coefficients, ns_dtype),
        steps=steps,
        scope=scope,
        paths=(*FORMS, *shapes, *core_path(dtype)),
        shapes=shapes,
        products=products,
        chosen=chosen if dtype == "auto" else "",
    )


def _mlx_device(device: Array) -> str:
    return "gpu" if "gpu" in str(device) else "cpu"


def _apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"
