"""State that moves between libraries in a loop of one's own: the README's lines, and the two minimal examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import precision
import pytest
from documents import block

import zeta

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")

import minimal_mlx  # noqa: E402
import minimal_torch  # noqa: E402
from mlx import nn  # noqa: E402

MINIMAL = {"mlx": minimal_mlx, "torch": minimal_torch}
BATCHES = np.random.default_rng(0).integers(97, 105, (30, 16, minimal_mlx.CONTEXT + 1))


def fresh(library: str, model: Any, lr: float = 1.5e-3) -> Any:
    """An optimizer of the model; at a higher rate the losses leap, and part further than is promised."""
    backend = zeta.backend(library)
    if library == "mlx":
        return backend.Zeta(learning_rate=lr, routes=zeta.routes(model))
    return backend.Zeta(backend.param_groups(model), lr=lr)


def step(library: str, model: Any, optimizer: Any, batch: np.ndarray) -> float:
    if library == "mlx":
        loss, grads = nn.value_and_grad(model, minimal_mlx.loss_of)(model, mx.array(batch))
        optimizer.update(model, grads)
    else:
        tokens = torch.tensor(batch)
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.item())


def functions(library: str) -> tuple[Callable[..., None], Callable[..., int]]:
    """The README's save and load, for this library."""
    names: dict[str, Any] = {}
    exec(block("A run can begin").replace("zeta.backends.mlx", f"zeta.backends.{library}"), names)
    return names["save"], names["load"]


def losses(libraries: list[str], lose: bool = False) -> np.ndarray:
    """Of ten steps with each library in turn, from the file that the one before left; `lose` forgets the moments."""
    mx.random.seed(0)
    functions("mlx")[0](model := minimal_mlx.Model(), fresh("mlx", model), 0)
    done: list[float] = []
    for library in libraries:
        save, load = functions(library)
        model = MINIMAL[library].Model()
        optimizer = fresh(library, model)
        assert load(model, optimizer) == len(done)
        optimizer = fresh(library, model) if lose else optimizer
        done += [step(library, model, optimizer, batch) for batch in BATCHES[len(done) : len(done) + 10]]
        save(model, optimizer, len(done))
    return np.array(done)


@pytest.mark.parametrize("dtype", precision.DEFAULTS)
def test_a_run_moves_from_mlx_to_torch_and_back(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with precision.default("float16" if dtype == "float16" else "float32"):  # MLX's, on a GPU and on a CPU
        stayed = losses(["mlx", "mlx", "mlx"])
    with precision.default(dtype):
        moved, lost = losses(["mlx", "torch", "mlx"]), losses(["mlx", "torch", "mlx"], lose=True)
    assert np.max(np.abs(moved / stayed - 1)) <= precision.LOSSES[dtype]
    assert np.max(np.abs(lost / stayed - 1)) > 4 * precision.LOSSES[dtype]


@pytest.mark.parametrize("library", MINIMAL)
def test_the_minimal_examples_learn(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    MINIMAL[library].main()
    shown = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 5 and shown[-1] < shown[0] - 1
