"""What a step of MLX's optimizers holds beside its arrays: batches come one after another, in a compiled step, too."""

import pytest

mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from zeta.backends.mlx import Eta, Zeta, stacks, step  # noqa: E402

LAYERS, WIDTH = 16, 64
SHAPES = {"up_proj": (4 * WIDTH, WIDTH), "down_proj": (WIDTH, 4 * WIDTH)}
# Of the parameters' bytes. Measured: 0.52 eager, 0.66 to 0.71 compiled; with all batches at once 1.06, and 1.8 to 2.1.
BOUND = 0.85


def tree():
    names = {f"layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    return tree_unflatten([(name, mx.random.normal(shape)) for name, shape in names.items()])


def peak(optimizer, compiled):
    """Most bytes of a step beyond what there was before it, as a share of the parameters'."""
    params, grads = tree(), tree()
    optimizer.init(params)
    mx.eval(params, grads, optimizer.state)
    move = optimizer.apply_gradients
    if compiled:
        move = mx.compile(move, inputs=optimizer.state, outputs=optimizer.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    params = move(grads, params)
    mx.eval(params, optimizer.state)
    return (mx.get_peak_memory() - before) / sum(p.nbytes for _, p in tree_flatten(params))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [Zeta, Eta])
def test_a_step_holds_one_batch_at_a_time(kind, compiled, monkeypatch, mlx_device):
    mx.set_default_device(mx.cpu)  # where the bound was measured
    monkeypatch.setattr(stacks, "BATCH_ENTRIES", 1)  # so that a thirty-second of the parameters is a batch
    assert peak(kind(), compiled) < BOUND
    monkeypatch.setattr(step.Turns, "begin", lambda self, arrays: arrays)
    monkeypatch.setattr(step.Turns, "end", lambda self, *arrays: None)
    assert peak(kind(), compiled) > BOUND
