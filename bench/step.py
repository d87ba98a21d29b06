"""A whole optimizer step of a GPT, embedding and head included: time and ratio to the peers, memory, kernels.

Peers: torch.optim.Muon for the matrices with fused AdamW for the rest, the same with Muon's iteration in float32, a
loop of the plain zeta.update over all matrices, and fused AdamW for all (a floor, not a peer); mlx.optimizers alike.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
from measure import SLOW, arguments, medians, plot, show, timed, torch_peak
from newton_schulz import muon_float32

import zeta
from zeta import adamw
from zeta.routing.layout import batches

HYPER = zeta.Hyper()
VIEWS = "alias mT promote_types reshape select slice split split_with_sizes to transpose unsqueeze view"
METADATA = {f"aten::{name}" for name in VIEWS.split()}  # operators that touch no entries


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=None, help="default: 12, in MLX 4")
    parser.add_argument("--width", type=int, default=None, help="default: 768, in MLX 128")
    parser.add_argument("--vocab", type=int, default=None, help="default: 50304, in MLX 1024")
    options = parser.parse_args()
    mlx = options.backend == "mlx"
    for name, value in {"layers": (12, 4), "width": (768, 128), "vocab": (50304, 1024)}.items():
        setattr(options, name, getattr(options, name) or value[mlx])
    rows = mlx_rows(options) if mlx else torch_rows(options)
    note = "~: the step of one layer of Muon, times layers, where a whole one is slow."
    show(f"One step of a GPT: {options.layers} layers, width {options.width}", rows, options, note)
    if options.plot:
        plot(options.plot, "One step", [r["optimizer"] for r in rows], {"zeta": [r["x zeta"] for r in rows]})


def shapes(layers: int, width: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a GPT's parameters."""
    result: dict[str, tuple[int, ...]] = {"embed.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for i in range(layers):
        result |= {f"layers.{i}.attn.qkv.weight": (3 * width, width), f"layers.{i}.attn.proj.weight": (width, width)}
        result |= {f"layers.{i}.mlp.up.weight": (4 * width, width), f"layers.{i}.mlp.down.weight": (width, 4 * width)}
        result |= {f"layers.{i}.norm1.weight": (width,), f"layers.{i}.norm2.weight": (width,)}
    return result


def table(times: dict[str, float], slow: set[str], extra: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    blank = {key: None for columns in extra.values() for key in columns}
    return [
        {"optimizer": name, "ms": f"{'~' if name in slow else ''}{1e3 * t:,.1f}", "x zeta": t / times["zeta"]}
        | (blank | extra.get(name, {}))
        for name, t in times.items()
    ]


def torch_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from torch.optim import _muon

    from zeta.backends.torch import Eta, Zeta

    device = options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def model(layers: int) -> dict[str, Any]:
        torch.manual_seed(0)
        parameters = {}
        for name, shape in shapes(layers, options.width, options.vocab).items():
            parameters[name] = torch.nn.Parameter(torch.randn(shape, device=device) / 50)
            parameters[name].grad = torch.randn(shape, device=device)
        return parameters

    def wait(run: Callable[[], Any]) -> None:
        run()
        if device != "cpu":
            getattr(torch, device).synchronize()

    def muon(parameters: dict[str, Any]) -> Callable[[], Any]:
        sides: dict[str, list[Any]] = {"zeta": [], "adamw": []}
        for name, p in parameters.items():
            sides[zeta.route(name, tuple(p.shape)).treatment].append(p)
        both = [torch.optim.Muon(sides["zeta"], adjust_lr_fn="match_rms_adamw")]
        both += [torch.optim.AdamW(sides["adamw"], fused=True)] if sides["adamw"] else []
        return lambda: [optimizer.step() for optimizer in both]

    def in_float32(step: Callable[[], Any]) -> None:
        original = _muon._zeropower_via_newtonschulz
        _muon._zeropower_via_newtonschulz = lambda x, *_: muon_float32(x)
        step()
        _muon._zeropower_via_newtonschulz = original

    parameters = model(options.layers)
    ours = Zeta(parameters.items())
    layer = {name: p for name, p in model(1).items() if "layers" in name and p.ndim > 1}
    contenders: dict[str, Callable[[], Any]] = {
        "zeta": partial(wait, ours.step),
        "eta": partial(wait, Eta(model(options.layers).items()).step),
        "Muon + AdamW, in float32": partial(wait, partial(in_float32, muon(model(options.layers)))),
        "loop of zeta.update": partial(wait, core_loop(model(options.layers))),
        "AdamW alone": partial(wait, torch.optim.AdamW(model(options.layers).values(), fused=True).step),
    }
    one = partial(wait, muon(layer))
    took = options.layers * timed(one)[0]
    slow = {"Muon + AdamW": took} if took > 10 * SLOW else {}
    if not slow:
        contenders["Muon + AdamW"] = partial(wait, muon(model(options.layers)))
    times = medians(contenders, options.rounds) | slow
    routes = {p: (zeta.route(name, tuple(p.shape)), 0) for name, p in parameters.items()}
    stacks = batches({p: r for p, r in routes.items() if r[0].treatment == "zeta"})
    largest = max(sum(map(prod, stack.values())) for stack in stacks)
    memory = {"transient MiB": torch_peak(ours.step, device) / 2**20, "largest batch MiB": 4 * largest / 2**20}
    counts = {}
    if device in ("cpu", "cuda"):
        for n in (options.layers, 2 * options.layers):
            counts[f"kernels, {n} layers"] = kernels(Zeta(model(n).items()), device)
    return table(times, set(slow), {"zeta": memory | counts})


def core_loop(parameters: dict[str, Any]) -> Callable[[], None]:
    """The plain algorithm, one parameter after another."""
    rule = {
        name: zeta if zeta.route(name, tuple(p.shape)).treatment == "zeta" else adamw for name, p in parameters.items()
    }
    states = {name: rule[name].init(p.data) for name, p in parameters.items()}

    def step() -> None:
        for name, p in parameters.items():
            p.data, states[name] = rule[name].update(p.grad, states[name], p.data, HYPER)

    return step


def kernels(optimizer: Any, device: str) -> int:
    """Kernels launched by one step: on CUDA as the device saw them, on a CPU the operators that the step calls."""
    import torch

    optimizer.step()
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        optimizer.step()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    own = [e.name for e in profile.events() if e.cpu_parent and e.cpu_parent.name.startswith("Optimizer.step")]
    return sum(name not in METADATA for name in own)


def mlx_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten, tree_unflatten

    from zeta.backends.mlx import Zeta

    def tree(scale: float) -> Any:
        rng = np.random.default_rng(0)
        pairs = shapes(options.layers, options.width, options.vocab).items()
        return tree_unflatten([(n, mx.array(scale * rng.standard_normal(s).astype(np.float32))) for n, s in pairs])

    def matrix(name: str, weight: Any) -> bool:
        return zeta.route(name, weight.shape).treatment == "zeta"

    def compiled(optimizer: Any) -> Callable[[], None]:
        held = {"parameters": tree(0.02)}
        gradients = tree(1.0)
        optimizer.init(held["parameters"])

        @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
        def step(parameters: Any) -> Any:
            return optimizer.apply_gradients(gradients, parameters)

        def run() -> None:
            held["parameters"] = step(held["parameters"])
            mx.eval(held["parameters"], optimizer.state)

        return run

    muon = optim.MultiOptimizer([optim.Muon(1e-3), optim.AdamW(1e-3)], [matrix])
    contenders = {
        "zeta": compiled(Zeta()),
        "Muon + AdamW": compiled(muon),
        "AdamW alone": compiled(optim.AdamW(1e-3)),
    }
    assert len(tree_flatten(tree(1.0))) == len(shapes(options.layers, options.width, options.vocab))
    return table(medians(contenders, options.rounds), set(), {})


if __name__ == "__main__":
    main()
