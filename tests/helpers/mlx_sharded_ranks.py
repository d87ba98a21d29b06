"""What each rank of test_mlx_sharded.py runs, under mlx.launch: its rows of everything go to FOLDER/RANK.npz."""

import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

import zeta
from zeta import family
from zeta.backends import mlx
from zeta.routing.by_name import route
from zeta.routing.layout import cut

WIDTH, TOKENS, STEPS = 12, 16, 5


class Mine(mlx.Zeta):
    """A user's own class, of a rule with a variance by rows and columns on both sides."""

    rule = family.rank1_both


KINDS = {name: kind for name, kind in vars(mlx).items() if isinstance(kind, type)} | {"Mine": Mine}
SOME = ("Zeta", "Eta", "AdaMuon", "Mine")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.random.normal((4, WIDTH, WIDTH)) / 4

    def __call__(self, x, expert):
        return x @ self.weight[expert].T


class Layer(nn.Module):
    """Fused attention, whose query no rank holds alone; a convolution, and experts that take turns."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 3, 1
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv_proj, self.o_proj = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 28, bias=False), nn.Linear(28, WIDTH, bias=False)
        self.conv, self.experts = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), Experts()

    def __call__(self, x, expert):
        q, k, v = mx.split(self.qkv_proj(self.norm(x)), [12, 16], axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], -1, 4).swapaxes(1, 2) for a in (q, k, v))
        x = x + self.o_proj(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5).swapaxes(1, 2).reshape(x.shape))
        return x + self.conv(self.down_proj(nn.silu(self.up_proj(x)))) + self.experts(x, expert)


class Model(nn.Module):
    """Whose layers are sharded, and seldom `middle` and the embedding."""

    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.embed_tokens, self.layers = nn.Embedding(TOKENS, WIDTH), [Layer(), Layer()]
        self.middle = nn.Linear(WIDTH, WIDTH, bias=False)

    def __call__(self, tokens, expert):
        x = self.layers[0](self.embed_tokens(tokens), expert)
        return self.embed_tokens.as_linear(self.layers[1](self.middle(x), expert))


def loss(model, tokens, expert):
    return nn.losses.cross_entropy(model(tokens[:, :-1], expert), tokens[:, 1:], reduction="mean")


def training(kind, group, compiled=False, by_rows=False):
    """{name: array} after some steps of a model under `nn.fully_shard`, each rank with texts of its own.

    Compiled, of the whole model, else of its layers. `by_rows` is the mistake of taking a rank's rows for a matrix.
    """
    model, ranks = Model(), group.size()
    routes = zeta.routes(model)
    model.layers = [nn.fully_shard(layer, group=group) for layer in model.layers]
    model = nn.fully_shard(model, group=group) if compiled else model
    if by_rows:
        routes = {name: route(name, p.shape) for name, p in tree_flatten(model.trainable_parameters())}
    optimizer = KINDS[kind](1e-2, routes=routes, group=group, ns_dtype=mx.float32)
    optimizer.init(model.trainable_parameters())
    texts = np.random.default_rng(0).integers(0, TOKENS, (STEPS, 4, 9))
    texts = texts[:, group.rank() :: ranks]
    state = [model.state, optimizer.state]

    def step(tokens, expert):
        value, grads = nn.value_and_grad(model, loss)(model, tokens, expert)
        mean = partial(nn.average_gradients, group=group)
        grads = tree_map_with_path(lambda name, g: g if "module" in name.split(".") else mean(g), grads)
        optimizer.update(model, grads)
        return value

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    for number, tokens in enumerate(texts):
        step(mx.array(tokens), mx.array(number % 3))  # the fourth expert is dead, the others fade
        mx.eval(state)
    found = {"param": model.trainable_parameters(), "state": optimizer.state}
    return {name.replace("module.", ""): np.array(a) for name, a in tree_flatten(found)}


SHAPES = {"up.weight": (12, 20), "down.weight": (24, 12), "qkv.weight": (24, 12), "experts.weight": (6, 8, 6)}
SHAPES |= {"conv.weight": (6, 3, 3, 2), "norm.weight": (12,), "embed_tokens.weight": (18, 12), "in_out": (12, 20)}
PARTS = {"qkv.weight": cut((24, 12), (14, 5, 5), "fused"), "in_out": cut((12, 20), (8, 12), "fused", -1)}


def start():
    """{name: array} of the weights before all steps, of the family's arrays and of the model."""
    rng = np.random.default_rng(2)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def family_steps(kind, group, dtype=mx.float32):
    """{name: array} after five steps of a class on a rank's rows; with dead rows, columns, experts and parts."""
    rng, rank, ranks = np.random.default_rng(3), group.rank(), group.size()

    def rows(arrays):
        within = "module." if ranks > 1 else ""
        own = {within + name: np.array_split(a, ranks)[rank] for name, a in arrays.items()}
        return tree_unflatten([(name, mx.array(a, dtype)) for name, a in own.items()])

    routes = {name: route(name, shape) for name, shape in SHAPES.items()} | PARTS
    options = {"ns_dtype": mx.float32} if KINDS[kind].rule.orthogonalizes else {}
    optimizer, params = KINDS[kind](1e-2, routes=routes, group=group, **options), rows(start())
    for step in range(5):
        grads = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
        if step % 3:
            grads["up.weight"][2], grads["down.weight"][:, 7] = 0, 0
            grads["experts.weight"][1], grads["qkv.weight"][14:19] = 0, 0
        params = optimizer.apply_gradients(rows(grads), params)
        mx.async_eval(params, optimizer.state)
    found = tree_flatten({"param": params, "state": optimizer.state})
    return {name.replace("module.", ""): np.array(a.astype(mx.float32)) for name, a in found}


def cases(group):
    """{case: {name: array}}."""
    kinds = KINDS if group.size() < 3 else SOME  # more would take turns on two cores
    found = {f"family {kind}": family_steps(kind, group) for kind in kinds}
    found["family in half precision"] = family_steps("NorMuon", group, mx.bfloat16)
    if group.size() < 3:  # by which the model's rows cannot be divided
        found |= {f"model {kind}": training(kind, group) for kind in ("Zeta", "Eta", "NorMuon")}
        found["model compiled"] = training("Zeta", group, compiled=True)
    return found


def scattered(x, *, group):
    """`mx.distributed.sum_scatter`, which MLX 0.32 has not on ring and MPI."""
    rows = len(x) // group.size()
    return mx.distributed.all_sum(x, group=group)[group.rank() * rows :][:rows]


def main(folder):
    mx.distributed.sum_scatter = scattered
    group = mx.distributed.init(strict=True, backend="ring")
    found = cases(group)
    if group.size() == 2:
        found["model by rows"] = training("Zeta", group, by_rows=True)
    np.savez(folder / f"{group.rank()}.npz", **{f"{case}/{n}": a for case, r in found.items() for n, a in r.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
