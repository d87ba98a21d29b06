"""What each rank of test_mlx_distributed.py runs, under mlx.launch: what it found goes to FOLDER/RANK.npz."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from kinds import unlike
from mlx.nn import average_gradients
from mlx.optimizers import AdamW, MultiOptimizer
from mlx.utils import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from trainer import on_mlx

from zeta import family
from zeta import newton_schulz_forms as forms
from zeta.backends import mlx
from zeta.backends.mlx import optimizer as backend  # where Newton-Schulz is replaced
from zeta.bench import model
from zeta.parity import cases
from zeta.routing.by_name import route
from zeta.routing.layout import cut

FUSED, FROZEN = "layers.0.qkv.weight", "layers.1.frozen.weight"
SHAPES = cases.PARAMETERS | {FUSED: (56, 24), FROZEN: (48, 80)}
PARTS = cut(SHAPES[FUSED], (24, 16, 16), "fused")
CONFIG = model.Config(vocab=64, context=16, layers=2, width=16, heads=2, kv_heads=1)
GPT = model.Config(vocab=64, context=16, layers=12, width=16, heads=2, kv_heads=1)
FAMILY = {"up.weight": (12, 20), "down.weight": (20, 12), "qkv.weight": (20, 12), "experts.weight": (3, 8, 6)}
FAMILY |= {"conv.weight": (6, 3, 3, 2), "norm.weight": (12,), "embed_tokens.weight": (16, 12)}
FAMILY_PARTS = cut(FAMILY["qkv.weight"], (12, 4, 4), "fused")
newton_schulz = backend.newton_schulz


def parameters():
    rng, (params, _, _) = np.random.default_rng(5), cases.ten_steps()
    return params | {name: rng.standard_normal(SHAPES[name]) / 8 for name in (FUSED, FROZEN)}


def gradients(step):
    """What the ranks' gradients average to."""
    found = cases.ten_steps()[1][step]
    return found | {FUSED: np.random.default_rng(step).standard_normal(SHAPES[FUSED])}


def ten_steps(group=None):
    """{name: array} after ten steps, with gradients that differ from rank to rank."""
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    routes = {name: route(name, shape) for name, shape in SHAPES.items()} | {FUSED: PARTS}
    optimizer = backend.Zeta(1e-2, routes=routes, ns_dtype=mx.float32, group=group)
    params = tree(parameters())
    for step in range(10):
        own = 1 + (rank - (ranks - 1) / 2) / 4
        grads = tree({name: g * own for name, g in gradients(step).items()})
        after = optimizer.apply_gradients(average_gradients(grads, group) if group else grads, params)
        params = tree_unflatten(list((dict(tree_flatten(params)) | dict(tree_flatten(after))).items()))
        mx.async_eval(params, optimizer.state)
    return {name: np.array(a) for name, a in tree_flatten({"param": params, "state": optimizer.state})}


class Mine(backend.Zeta):
    """A user's own class, of a rule with a variance by rows and columns on both sides."""

    rule = family.rank1_both


KINDS = {name: kind for name, kind in vars(mlx).items() if isinstance(kind, type)} | {"Mine": Mine}
UNLIKE = unlike(KINDS)


def family_start():
    rng = np.random.default_rng(2)
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in FAMILY.items()}


def family_steps(kind, group=None, dtype=mx.float32):
    """{name: array} after five steps of a class, with one gradient on every rank; dead rows, experts and parts."""
    rng, params = np.random.default_rng(3), family_start()
    routes = {name: route(name, shape) for name, shape in FAMILY.items()} | {"qkv.weight": FAMILY_PARTS}
    options = {"ns_dtype": dtype} if KINDS[kind].rule.orthogonalizes else {}
    optimizer, params = KINDS[kind](1e-2, routes=routes, group=group, **options), tree(params)
    for step in range(5):
        grads = {name: rng.standard_normal(shape) for name, shape in FAMILY.items()}
        if step % 3:
            grads["up.weight"][2], grads["experts.weight"][1], grads["qkv.weight"][12:16] = 0, 0, 0
        params = optimizer.apply_gradients(tree(grads), params)
        mx.async_eval(params, optimizer.state)
    return {name: np.array(a) for name, a in tree_flatten({"param": params, "state": optimizer.state})}


def many_messages(group=None):
    """{name: array} after a step with each gradient averaged by itself: without `together`, MLX 0.32 mixes them up."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": mx.array(rng.standard_normal((4 + i, 29 - i)), mx.float32) for i in range(12)}
    grads = {name: p + 1 for name, p in params.items()}
    optimizer = backend.Zeta(1e-2, ns_dtype=mx.float32, group=group)
    after = optimizer.apply_gradients(average_gradients(grads, group, 0) if group else grads, params)
    mx.eval(after, optimizer.state)
    return {name: np.array(a) for name, a in after.items()}


def several_optimizers(group=None):
    """{name: array} after five steps of two Zetas and MLX's AdamW, asked for in another order on each rank."""
    rng = np.random.default_rng(0)
    params = start = {f"w{i}": mx.array(rng.standard_normal((4 + i, 29 - i)), mx.float32) for i in range(12)}
    zetas = [backend.Zeta(lr, ns_dtype=mx.float32, group=group) for lr in (1e-2, 2e-2)]
    turn = [lambda name, _, k=k: int(name[1:]) % 3 == k for k in range(2)]
    optimizer = MultiOptimizer([*zetas, AdamW(1e-2)], turn)
    for _ in range(5):
        grads = {name: p + 1 for name, p in start.items()}
        if group:
            grads = average_gradients(grads, group, 0)
            mx.async_eval(grads)
        params = optimizer.apply_gradients(grads, params)
        mx.eval([params[name] for name in sorted(params, reverse=bool(group and group.rank()))], optimizer.state)
    return {name: np.array(a) for name, a in params.items()}


def tree(arrays):
    return tree_unflatten([(name, mx.array(a, mx.float32)) for name, a in arrays.items()])


def dropped(rank):
    """Newton-Schulz of which the first owner's result is lost."""
    return lambda x, *options: newton_schulz(x, *options) * (rank > 0)


def halved(x, *options):
    """Newton-Schulz of each half of the rows, as if a shard were a matrix."""
    middle = x.shape[-2] // 2
    return mx.concatenate([newton_schulz(half, *options) for half in (x[:, :middle], x[:, middle:])], axis=-2)


def work(group=None):
    """The operations that this rank spends on Newton-Schulz in one step of a 12-layer GPT."""
    spent = []

    def counted(x, *options):
        spent.append(len(x) * forms.flops(*x.shape[1:]))
        return newton_schulz(x, *options)

    params = tree(model.init(GPT, 0))
    backend.newton_schulz = counted
    mx.eval(backend.Zeta(1e-2, group=group).apply_gradients(params, params))
    backend.newton_schulz = newton_schulz
    return sum(spent)


def training(optimizer="zeta"):
    """{name: array} of four steps of the language model: their results, the loss of some texts, the parameters."""
    trainer = on_mlx.Trainer(CONFIG, model.init(CONFIG, 0), optimizer, device="cpu")
    texts = np.random.default_rng(0).integers(0, 64, (24, 17)).astype(np.int32)
    steps = [trainer.step(texts[i : i + 6], 1e-2, stop=trainer.rank == i // 6) for i in range(0, 24, 6)]
    losses = [trainer.loss(texts[:count]) for count in (1, 5, 24)]
    return trainer.arrays() | {"steps": np.array([s.tolist() for s in steps]), "losses": np.array(losses)}


def main(folder):
    group = mx.distributed.init(strict=True, backend="ring")
    found = {"steps": ten_steps(group), "work": {"flops": np.array(work(group))}, "zeta": training()}
    found |= {f"family {kind}": family_steps(kind, group) for kind in (KINDS if group.size() == 2 else UNLIKE)}
    if group.size() == 2:  # more would take turns on two cores
        for half in ("bfloat16", "float16"):
            steps = {kind: family_steps(kind, group, getattr(mx, half)) for kind in ("Zeta", "Eta", "NorMuon")}
            found |= {f"{half} {kind}": arrays for kind, arrays in steps.items()}
        found |= {"messages": many_messages(group), "several": several_optimizers(group)}
        found |= {"adamw": training("adamw"), "muon": training("muon")}
        for name, mistake in {"dropped": dropped(group.rank()), "halved": halved}.items():
            backend.newton_schulz = mistake
            found[name] = ten_steps(group)
    np.savez(folder / f"{group.rank()}.npz", **{f"{case}/{n}": a for case, r in found.items() for n, a in r.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
