"""What every test shares: the targets of this machine, and one way to drive either optimizer class."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # the matrices are small, and pytest-xdist already uses every core
os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: see zeta/machine.py

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zeta.machine import Absent, targets

FOUND = list(targets())
INSTALLED_IN_CI = {("numpy", "cpu"), ("array_api_strict", "cpu"), ("torch", "cpu"), ("mlx", "cpu")}


def found() -> list[Any]:
    """Parameters for the targets found; what is absent is skipped with its reason, and fails where CI installs it."""
    return [_absent(t) if isinstance(t, Absent) else pytest.param(t, id=t.name) for t in FOUND]


def _absent(absent: Absent) -> Any:
    must_be_here = absent.expected or (os.environ.get("CI") and (absent.library, absent.device) in INSTALLED_IN_CI)
    mark = () if must_be_here else pytest.mark.skip(reason=f"{absent.library} {absent.device}: {absent.reason}")
    return pytest.param(absent, id=f"{absent.library} {absent.device}", marks=mark)


def need(library: str) -> Any:
    """The library's module; where it is not here the test is skipped, but not in CI, which installs them all."""
    return import_module(library) if os.environ.get("CI") else pytest.importorskip(library)


@pytest.fixture(params=found())
def target(request: pytest.FixtureRequest) -> Any:
    """Every library, device and dtype of this machine."""
    if isinstance(request.param, Absent):
        pytest.fail(f"{request.param.library} {request.param.device} should be here: {request.param.reason}")
    with request.param.scope():
        yield request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Leaves out what `train_lm` draws at the end of a run: most of the time of a short one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "plot", SimpleNamespace(draw=lambda *_: None))
        yield


@dataclass
class TorchRun:
    """torch's `Zeta`, or another class of its backend, over parameters given as NumPy arrays."""

    params: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lr: str = "lr"
    kind: str = "Zeta"

    def __post_init__(self) -> None:
        import torch

        from zeta.backends import torch as backend

        self.tensors = {k: torch.nn.Parameter(self.array(p)) for k, p in self.params.items()}
        options = dict(self.options)
        routes = options.pop("routes", {})  # by name, as MLX's class takes them
        group = {"params": list(self.tensors.items())}
        if routes:
            group["routes"] = [tuple(routes[name]) for name in self.tensors]
        self.optimizer = getattr(backend, self.kind)([group], **options)

    def array(self, x: np.ndarray) -> Any:
        import torch

        return torch.tensor(x, dtype=getattr(torch, self.dtype))

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.optimizer.zero_grad()
        for name, grad in grads.items():
            self.tensors[name].grad = self.array(grad)
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def read(self) -> dict[str, np.ndarray]:
        return {name: p.detach().double().numpy() for name, p in self.tensors.items()}

    def moments(self, name: str) -> list[Any]:
        return [self.optimizer.state[self.tensors[name]][key] for key in ("exp_avg", "exp_avg_sq")]

    def save(self, file: Any) -> None:
        import torch

        torch.save(self.optimizer.state_dict(), file)

    def load(self, file: Any) -> None:
        import torch

        self.optimizer.load_state_dict(torch.load(file))


@dataclass
class MlxRun:
    """MLX's `Zeta`, or another class of its backend, over parameters given as NumPy arrays."""

    params: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lr: str = "learning_rate"
    kind: str = "Zeta"

    def __post_init__(self) -> None:
        from mlx.utils import tree_unflatten

        from zeta.backends import mlx as backend

        self.tree = tree_unflatten([(name, self.array(p)) for name, p in self.params.items()])
        options = {self.lr if name == "lr" else name: value for name, value in self.options.items()}
        self.optimizer = getattr(backend, self.kind)(**options)

    def array(self, x: np.ndarray) -> Any:
        import mlx.core as mx

        return mx.array(x.astype("float32")).astype(getattr(mx, self.dtype))

    def step(self, grads: dict[str, np.ndarray]) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten

        gradients = tree_unflatten([(name, self.array(g)) for name, g in grads.items()]) or {}
        after = self.optimizer.apply_gradients(gradients, self.tree)
        flat = dict(tree_flatten(self.tree)) | dict(tree_flatten(after))
        self.tree = tree_unflatten(list(flat.items()))
        mx.eval(self.tree, self.optimizer.state)

    def set_lr(self, lr: float) -> None:
        self.optimizer.learning_rate = lr

    def read(self) -> dict[str, np.ndarray]:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        return {k: np.array(p.astype(mx.float32)).astype("float64") for k, p in tree_flatten(self.tree)}

    def moments(self, name: str) -> list[Any]:
        from mlx.utils import tree_flatten

        flat = dict(tree_flatten(self.optimizer.state))
        return [flat[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")]

    def save(self, file: Any) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        mx.savez(str(file), **dict(tree_flatten(self.optimizer.state)))

    def load(self, file: Any) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        self.optimizer.state = tree_unflatten(list(mx.load(f"{file}.npz").items()))


def _run(name: str, run: type) -> Any:
    missing = next((t for t in FOUND if isinstance(t, Absent) and (t.library, t.device) == (name, "cpu")), None)
    return pytest.param(run, id=name, marks=pytest.mark.skip(reason=missing.reason) if missing else ())


@pytest.fixture(params=[_run("torch", TorchRun), _run("mlx", MlxRun)])
def new_run(request: pytest.FixtureRequest) -> Any:
    """Makes a run of either optimizer class on its CPU or default device: `new_run(params, options)`."""
    return request.param
