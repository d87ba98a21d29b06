"""A layer that holds several matrices in one parameter takes the step that those matrices would take on their own."""

import numpy as np
import pytest

from zeta.parity.checks import assert_close, relative_error
from zeta.routing.by_name import route
from zeta.routing.fused import Layer
from zeta.routing.layout import batches, join, piece, shapes

HEADS, KV, SIZE, IN = 4, 2, 8, 24


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_heads(q, k, v):
    """(kv_heads, heads / kv_heads + 2, size) rows in turns, as Falcon and, for as many k as q, GPT-NeoX keep them."""
    parts = [x.reshape(len(k) // SIZE, -1, SIZE, IN) for x in (q, k, v)]
    return np.concatenate(parts, axis=1).reshape(-1, IN)


def rows(*matrices):
    return np.concatenate(matrices, axis=-2)


def columns(*matrices):
    return np.concatenate([m.swapaxes(-1, -2) for m in matrices], axis=-1)


def turns(gate, up):
    """Gate and up in turns along the columns, as gpt-oss keeps them."""
    return np.stack([gate.swapaxes(-1, -2), up.swapaxes(-1, -2)], axis=-1).reshape(*gate.shape[:-2], IN, -1)


Q, K, E = (HEADS * SIZE, IN), (KV * SIZE, IN), (3, 20, IN)
GROUPED = dict(heads=HEADS, kv_heads=KV)
CASES = {  # how the layer is made of its matrices, their shapes, what is known about it
    "grouped heads": (rows, [Q, K, K], Layer("matrix", "qkv_proj", False, **GROUPED)),
    "grouped heads, transposed": (columns, [Q, K, K], Layer("matrix", "c_attn", True, **GROUPED)),
    "grouped heads in turns": (by_heads, [Q, K, K], Layer("matrix", "qkv", False, **GROUPED, alternating=True)),
    "heads in turns": (by_heads, [Q] * 3, Layer("matrix", "query_key_value", heads=HEADS, alternating=True)),
    "thirds": (rows, [(IN, IN)] * 3, Layer("matrix", "in_proj_weight", False)),
    "GPT-2's thirds": (columns, [(IN, IN)] * 3, Layer("matrix", "c_attn", True)),
    "key and value": (rows, [(IN, IN)] * 2, Layer("matrix", "c_attn", False, 3, 3)),
    "heads alone": (rows, [(SIZE, IN)] * (HEADS + 2 * KV), Layer("matrix", "qkv", False, **GROUPED, per_head=True)),
    "heads alone, transposed": (columns, [(SIZE, IN)] * 8, Layer("matrix", "c_attn", True, **GROUPED, per_head=True)),
    "query's heads": (rows, [(SIZE, IN)] * HEADS, Layer("matrix", "q_proj", False, **GROUPED, per_head=True)),
    "key's heads": (rows, [(SIZE, IN)] * KV, Layer("matrix", "k_proj", False, **GROUPED, per_head=True)),
    "gate and up": (rows, [(40, IN)] * 2, Layer("matrix", "gate_up_proj", False)),
    "experts": (rows, [E] * 2, Layer("matrix", "gate_up_proj", False)),
    "experts, transposed": (columns, [E] * 2, Layer("matrix", "gate_up_proj", True)),
    "experts in turns": (turns, [E] * 2, Layer("matrix", "gate_up_proj", True, alternating=True)),
    "gates": (rows, [(16, IN)] * 4, Layer("matrix", "lstm", groups=4)),
}  # fmt: skip


def run_both(new_run, fuse, shapes_of, layer, steps=3, lr=0.1):
    """(after, origin) of the fused layer and of its matrices alone, the latter put together."""
    alone = {f"layers.{i}.experts.up.weight": draw(s, i) for i, s in enumerate(shapes_of)}
    grads = [{n: draw(w.shape, 100 * (t + 1) + i) for i, (n, w) in enumerate(alone.items())} for t in range(steps)]
    whole = fuse(*alone.values())
    fused = new_run({"layer.weight": whole}, {"lr": lr, "routes": {"layer.weight": route("", whole.shape, layer)}})
    apart = new_run(alone, {"lr": 0.1})
    for grad in grads:
        apart.step(grad)
        fused.step({"layer.weight": fuse(*grad.values())})
    return fused.read()["layer.weight"], fuse(*apart.read().values()), whole


@pytest.mark.parametrize("case", CASES)
def test_moves_as_its_matrices_would(default_run, case):
    got, want, origin = run_both(default_run, *CASES[case])
    assert_close(got, want, default_run.bound(), origin)


def test_a_rate_off_by_four_bounds_is_caught(default_run):
    rtol = default_run.bound()
    got, want, origin = run_both(default_run, *CASES["grouped heads"], lr=0.1 * (1 + 4 * rtol))
    assert relative_error(got, want, origin) > rtol


def test_taken_as_one_matrix_it_moves_differently(default_run):
    """The control: peers orthogonalise the fused matrix."""
    fuse, parts, _ = CASES["grouped heads"]
    got, want, origin = run_both(default_run, fuse, parts, Layer("matrix", "up_proj", False))
    assert relative_error(got, want, origin) > 4 * default_run.bound()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_moves_as_the_matrices_of_its_groups(default_run, groups):
    kernel, grad = draw((8, 6, 3, 3)), draw((8, 6, 3, 3), 1)
    layer = default_run(
        {"conv.weight": kernel},
        {"lr": 0.1, "routes": {"conv.weight": route("", kernel.shape, Layer("convolution", groups=groups))}},
    )
    layer.step({"conv.weight": grad})
    split = [dict(enumerate(np.split(x.reshape(8, -1), groups))) for x in (kernel, grad)]
    weights, grads = ({f"layers.{i}.up.weight": x for i, x in parts.items()} for parts in split)
    alone = default_run(weights, {"lr": 0.1})
    alone.step(grads)
    want = np.concatenate(list(alone.read().values())).reshape(kernel.shape)
    assert_close(layer.read()["conv.weight"], want, default_run.bound(), kernel)


@pytest.mark.parametrize("case", CASES)
def test_join_undoes_piece(new_run, case):
    fuse, parts, layer = CASES[case]
    whole = fuse(*(draw(s, i) for i, s in enumerate(parts))).astype("float32")
    r = route("", whole.shape, layer)
    x = new_run({"experts.up.weight": whole}).array(whole)
    pieces = [piece(x, r, i).reshape(shape) for i, shape in enumerate(shapes(r))]
    assert (join(pieces, r, whole.shape) == x).all()


def test_pieces_of_one_shape_go_together():
    qkv = route("", (64, IN), CASES["grouped heads"][2])
    found = list(batches({"qkv": (qkv, "f32"), "o": (route("", (32, IN)), "f32"), "other": (qkv, "bf16")}))
    assert {("qkv", 0): (1, 32, IN), ("o", 0): (1, 32, IN)} in found
    assert {("qkv", 1): (1, 16, IN), ("qkv", 2): (1, 16, IN)} in found
    assert len(found) == 4
