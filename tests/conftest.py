"""What every test shares: the targets of this machine, its precisions, and one way to drive either optimizer class.

ZETA_TEST_BFLOAT16=0 or 1 makes torch believe, here and in every child process, whether this CPU multiplies bfloat16.
"""

import gc
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # the matrices are small, and pytest-xdist already uses every core
os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: see zeta/parity/targets.py

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import precision  # before torch: see ZETA_TEST_BFLOAT16
import pytest

from zeta.parity.checks import TOLERANCE
from zeta.parity.targets import Absent, targets

gc.set_threshold(100_000, 20, 20)  # libraries hold millions of objects: a collection of all takes half a second
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


@pytest.fixture
def mlx_device() -> Iterator[None]:
    """MLX's default device, left as it was by a test that chooses another."""
    if not find_spec("mlx"):
        yield
        return
    import mlx.core as mx

    before = mx.default_device()
    yield
    mx.set_default_device(before)


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
        options = _with_dtype(self.options, torch)
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
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        from zeta.backends import mlx as backend

        self.tree = tree_unflatten([(name, self.array(p)) for name, p in self.params.items()])
        options = _with_dtype(self.options, mx)
        options = {self.lr if name == "lr" else name: value for name, value in options.items()}
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


def _with_dtype(options: dict[str, Any], library: Any) -> dict[str, Any]:
    """The options, with the dtype that `ns_dtype` is a word for."""
    word = {"ns_dtype": getattr(library, options["ns_dtype"])} if options.get("ns_dtype") else {}
    return options | word


def _run(name: str, run: type) -> Any:
    missing = next((t for t in FOUND if isinstance(t, Absent) and (t.library, t.device) == (name, "cpu")), None)
    return pytest.param(run, id=name, marks=pytest.mark.skip(reason=missing.reason) if missing else ())


@pytest.fixture(params=[_run("torch", TorchRun), _run("mlx", MlxRun)])
def new_run(request: pytest.FixtureRequest) -> Any:
    """Makes a run of either optimizer class on its CPU or default device: `new_run(params, options)`."""
    return request.param


NO_PRODUCTS = ("Signum", "Shampoo", "SOAP", "Schattor")  # signs and decompositions, in the state's own dtype
# Rules whose ten steps are not as exact as the products are, by the dtype of these.
CONDITION = 3.3e3  # of SOAP's factors: the largest eigenvalue over the smallest gap between two, in test_family's draw
WIDER = {
    # An eigenvector turns by the decomposition's error, at most n roundings of the largest eigenvalue, over the gap.
    # Measured: 2.5e-4 here and up to 8e-4 in 25 draws; 1.1e-12 on another BLAS.
    **{(name, "float32"): 12 * CONDITION * 2**-24 for name in ("soap", "soap 1")},
    **{(name, "float64"): 12 * CONDITION * 2**-53 for name in ("soap", "soap 1")},
    # The sign of what is all but zero changes, and each that does is an error of two: measured up to 4e-2 and 8e-2.
    ("olion", "float16"): 0.06,
    ("olion", "bfloat16"): 0.1,
    ("olion", "auto"): 0.1,
}


def bound(rule: str, dtype: str) -> float:
    """The most that ten steps of this rule may be off, of the distance moved, where products run in `dtype`."""
    return WIDER.get((rule, dtype), TOLERANCE[dtype].step)


@dataclass(frozen=True)
class Default:
    """Makes runs as `new_run` does, of one library where it multiplies in `dtype` by default."""

    run: type
    dtype: str

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.run(*arguments, **options)

    def bound(self, kind: str = "Zeta") -> float:
        """That of ten steps of this class, float32's where it multiplies nothing in Newton-Schulz."""
        return bound(kind.lower(), "float32" if kind in NO_PRODUCTS else self.dtype)


def _defaults() -> Iterator[Any]:
    """torch's three; MLX has two: float32 on a CPU, and float16 on a GPU."""
    for name, run in (("torch", TorchRun), ("mlx", MlxRun)):
        for dtype in precision.DEFAULTS:
            if (name, dtype) != ("mlx", "bfloat16"):
                yield pytest.param(Default(run, dtype), id=f"{name} {dtype}", marks=_run(name, run).marks)


@pytest.fixture(params=precision.DEFAULTS)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every dtype that products have somewhere by default, in turn."""
    with precision.default(request.param):
        yield request.param


@pytest.fixture(params=_defaults())
def default_run(request: pytest.FixtureRequest) -> Iterator[Default]:
    """Either optimizer class at every precision that its users get without asking for one."""
    with precision.default(request.param.dtype):
        yield request.param
