"""What earlier versions saved is still read, and continues as it did there.

The files in witnesses/ were written by `python tests/test_witnesses.py` at commit eeb01b6: state after three steps, and
where three more led. They are never written anew: a file that this version cannot read is a run that cannot be resumed.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from zeta import Route, checkpoint
from zeta.parity.checks import TOLERANCE, assert_close

FOLDER = Path(__file__).with_name("witnesses")
KINDS = ["Zeta", "NorMuon", "Shampoo", "AdaGO"]  # what they keep: entries alone; rows; factors; one number
SHAPES = {
    "layers.0.up.weight": (6, 10),
    "layers.0.qkv.weight": (12, 6),
    "layers.0.experts.up.weight": (2, 4, 6),
    "layers.0.norm.weight": (6,),
    "layers.1.half.weight": (6, 8),  # in bfloat16, with its remainder
    "embed_tokens.weight": (8, 6),
}
ROUTES = {
    "layers.0.up.weight": Route("zeta", (1, 6, 10), "matrix"),
    "layers.0.qkv.weight": Route("zeta", (1, 12, 6), "query, key, value", (6, 4, 2)),
    "layers.0.experts.up.weight": Route("zeta", (2, 4, 6), "stack of matrices"),
    "layers.0.norm.weight": Route("adamw", (), "vector"),
    "layers.1.half.weight": Route("zeta", (1, 6, 8), "matrix"),
    "embed_tokens.weight": Route("adamw", (), "embedding"),
}


def draw(*seed):
    rng = np.random.default_rng([2606, *seed])
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in SHAPES.items()}


def dtype_of(name):
    return "bfloat16" if "half" in name else "float32"


class Torch:
    def __init__(self, kind, params, **options):
        import torch

        from zeta.backends import torch as backend

        tensors = {n: p if isinstance(p, torch.Tensor) else torch.tensor(p) for n, p in params.items()}
        self.params = {n: torch.nn.Parameter(t.to(getattr(torch, dtype_of(n)))) for n, t in tensors.items()}
        options |= {"precondition_frequency": 1} if kind == "Shampoo" else {"ns_dtype": torch.float32}
        options = {"decay_vectors": True} | options  # as all were then; a state_dict says so itself
        group = {"params": list(self.params.items()), "routes": [tuple(ROUTES[n]) for n in self.params]}
        self.optimizer = getattr(backend, kind)([group], lr=0.02, **options)

    def train(self, *steps):
        import torch

        for step in steps:
            for name, g in draw(1, step).items():
                self.params[name].grad = torch.tensor(g).to(self.params[name].dtype)
            self.optimizer.step()
        return self

    def read(self):
        """Each parameter with what rounding took off it, as NumPy arrays."""
        rests = {n: self.optimizer.state[p].get("remainder", 0) for n, p in self.params.items()}
        return {n: (p.detach().double() + rests[n]).numpy() for n, p in self.params.items()}


class Mlx:
    def __init__(self, kind, params):
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        from zeta.backends import mlx as backend

        self.params = tree_unflatten([(n, mx.array(p).astype(getattr(mx, dtype_of(n)))) for n, p in params.items()])
        options = {"precondition_frequency": 1} if kind == "Shampoo" else {"ns_dtype": mx.float32}
        options |= {"decay_vectors": True}  # as all were then
        self.optimizer = getattr(backend, kind)(0.02, routes=ROUTES, **options)

    def train(self, *steps):
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        for step in steps:
            grads = [(n, mx.array(g).astype(getattr(mx, dtype_of(n)))) for n, g in draw(1, step).items()]
            self.params = self.optimizer.apply_gradients(tree_unflatten(grads), self.params)
            mx.eval(self.params, self.optimizer.state)
        return self

    def read(self):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        flat, state = dict(tree_flatten(self.params)), dict(tree_flatten(self.optimizer.state))
        wide = {n: p.astype(mx.float32) + state.get(f"{n}.remainder", mx.array(0.0)) for n, p in flat.items()}
        return {n: np.array(w, dtype="float64") for n, w in wide.items()}


def assert_continues(run, want):
    got = run.train(3, 4, 5).read()
    assert got.keys() == want.keys() == SHAPES.keys()
    for name, start in draw(0).items():
        # bfloat16 weights and remainders hold 16 bits, of numbers near one; a step on from the third moves them by 0.01
        rtol = TOLERANCE["float32"].step if dtype_of(name) == "float32" else 1e-3
        assert_close(got[name], want[name], rtol, start.astype("float64"))


def torch_witness(kind):
    torch = pytest.importorskip("torch")
    saved = torch.load(FOLDER / f"torch-{kind}.pt")
    return saved, {n: np.asarray(p.double()) for n, p in saved["after"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_state_dict(kind):
    saved, after = torch_witness(kind)
    run = Torch(kind, saved["params"], decay_vectors=False)
    run.optimizer.load_state_dict(saved["state"])
    assert_continues(run, after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_portable_checkpoint(kind):
    _, after = torch_witness(kind)
    from zeta.backends.torch import load_named_state

    arrays, settings = checkpoint.load(FOLDER / f"portable-{kind}.safetensors")
    assert settings == {"optimizer": kind, "step": 3}
    run = Torch(kind, draw(0))
    load_named_state(run.params, run.optimizer, arrays)
    assert_continues(run, after)


def test_a_sharded_folder():
    """Of two ranks, each with the state of a part, read by one process."""
    _, after = torch_witness("Zeta")
    from zeta.backends.torch import load_sharded

    run = Torch("Zeta", draw(0))
    assert load_sharded(FOLDER / "sharded", run.params, run.optimizer) == {"step": 3}
    assert_continues(run, after)


@pytest.mark.parametrize("kind", KINDS)
def test_mlxs_state(kind):
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_unflatten

    saved = mx.load(str(FOLDER / f"mlx-{kind}.safetensors"))
    params, state, after = (
        {name.removeprefix(f"{part}."): a for name, a in saved.items() if name.startswith(f"{part}.")}
        for part in ("param", "state", "after")
    )
    run = Mlx(kind, params)
    run.optimizer.state = tree_unflatten(list(state.items()))
    assert_continues(run, {n: np.array(a, dtype="float64") for n, a in after.items()})


def write_sharded(rank, store):
    import torch.distributed as dist
    from trainer.on_torch import leave

    from zeta.backends.torch import save_sharded

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    run = Torch("Zeta", draw(0), process_group=dist.group.WORLD, shard_state=True).train(0, 1, 2)
    save_sharded(FOLDER / "sharded", run.params, run.optimizer, {"step": 3})
    leave(0)


def write():
    """Writes all witnesses, once."""
    import tempfile

    import mlx.core as mx
    import torch
    from mlx.utils import tree_flatten
    from torch.multiprocessing import start_processes

    from zeta.backends.torch import named_state, to_numpy

    if any(FOLDER.iterdir()):
        sys.exit(f"{FOLDER} is not empty, and its files are not to be written anew")
    for kind in KINDS:
        run = Torch(kind, draw(0)).train(0, 1, 2)
        arrays = to_numpy(named_state(run.params, run.optimizer))
        checkpoint.save(FOLDER / f"portable-{kind}.safetensors", arrays, {"optimizer": kind, "step": 3})
        file = {"params": {n: p.detach().clone() for n, p in run.params.items()}}
        file["state"] = {
            key: torch.utils._pytree.tree_map(torch.clone, v) if key == "state" else v
            for key, v in run.optimizer.state_dict().items()
        }
        file["after"] = {n: torch.tensor(a, dtype=torch.float32) for n, a in run.train(3, 4, 5).read().items()}
        torch.save(file, FOLDER / f"torch-{kind}.pt")
        mine = Mlx(kind, draw(0)).train(0, 1, 2)
        flat = {f"param.{n}": p for n, p in tree_flatten(mine.params)}
        flat |= {f"state.{n}": s for n, s in tree_flatten(mine.optimizer.state)}
        mx.eval(flat)
        flat |= {f"after.{n}": mx.array(a.astype("float32")) for n, a in mine.train(3, 4, 5).read().items()}
        mx.save_safetensors(str(FOLDER / f"mlx-{kind}.safetensors"), flat)
    with tempfile.TemporaryDirectory() as store:
        start_processes(write_sharded, (f"{store}/store",), nprocs=2, start_method="spawn")


if __name__ == "__main__":
    write()
