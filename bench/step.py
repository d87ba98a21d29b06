"""A whole optimizer step of a GPT, embedding and head included: time and ratio to the peers, memory, kernels.

Peers: the library's own Muon for the matrices with AdamW for the rest (torch's fused), and AdamW for all (a floor, not
a peer); in torch also Muon's iteration in float32 and a loop of the plain zeta.update over all parameters.
"""

import argparse
from collections.abc import Callable
from math import prod
from typing import Any

from measure import arguments, plot, show

import zeta
from zeta import adamw
from zeta.bench import tables
from zeta.bench.report import side_of
from zeta.routing.layout import batches

HYPER = zeta.Hyper()
VIEWS = "alias mT promote_types reshape select slice split split_with_sizes to transpose unsqueeze view"
METADATA = {f"aten::{name}" for name in VIEWS.split()}  # operators that touch no entries


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=None, help="default: 12, in MLX 4")
    parser.add_argument("--width", type=int, default=None, help="default: 768, in MLX 128")
    parser.add_argument("--vocab", type=int, default=None, help="default: 50304, in MLX 1024")
    parser.add_argument("--compiled", action="store_true", help="MLX's steps, on a CPU, too")
    options = parser.parse_args()
    mlx = options.backend == "mlx"
    if options.compiled and not mlx:
        parser.error("--compiled is of --backend mlx: leave it out")
    for name, value in {"layers": (12, 4), "width": (768, 128), "vocab": (50304, 1024)}.items():
        setattr(options, name, getattr(options, name) or value[mlx])
    side, shapes = side_of(options.backend, options.device), tables.gpt(options.layers, options.width, options.vocab)
    if options.compiled:
        side.compiled = True
    names = ["Zeta", "Eta", f"{side.muon} + AdamW", "AdamW"]
    if not mlx and side.muon == "Muon":
        names.append("Muon in float32 + AdamW")
    contenders: dict[str, Callable[[], Any]] = {name: side.step(name, shapes) for name in names}
    if side.kind == "cuda":
        contenders["Zeta as a CUDA graph"] = replayed(side.parameters(shapes))
    if not mlx:
        contenders["loop of zeta.update"] = core_loop(side.parameters(shapes))
    rows = tables.step(side, contenders, options.rounds)
    title = f"One step of a GPT: {options.layers} layers, width {options.width}"
    show(title, rows, options, "" if mlx else torch_note(side, options))
    if options.plot:
        plot(options.plot, "One step", list(contenders), {"x Zeta": [r["x Zeta"] for r in rows]})


def torch_note(side: Any, options: argparse.Namespace) -> str:
    """The largest batch, and how many kernels a step launches."""
    shapes = tables.gpt(options.layers, options.width, options.vocab)
    routes = {name: (zeta.route(name, shape), 0) for name, shape in shapes.items()}
    stacks = batches({name: r for name, r in routes.items() if r[0].treatment == "zeta"})
    note = f"largest batch {max(sum(map(prod, stack.values())) for stack in stacks) / 2**18:.0f} MiB"
    for n in (options.layers, 2 * options.layers) if side.kind in ("cpu", "cuda") else ():
        step = side.step("Zeta", tables.gpt(n, options.width, options.vocab))
        note += f"; kernels, {n} layers: {kernels(step, side.kind)}"
    return note


def replayed(parameters: dict[str, Any]) -> Callable[[], None]:
    """A step of Zeta that a CUDA graph holds."""
    import torch

    from zeta.backends.torch import Zeta

    optimizer, graph = Zeta(parameters.items(), capturable=True), torch.cuda.CUDAGraph()
    optimizer.step()  # makes its state
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()

    def step() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return step


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


def kernels(step: Callable[[], Any], device: str) -> int:
    """Kernels launched by one step: on CUDA as the device saw them, on a CPU the operators that the step calls."""
    import torch

    step()
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    own = [e.name for e in profile.events() if e.cpu_parent and e.cpu_parent.name.startswith("Optimizer.step")]
    return sum(name not in METADATA for name in own)


if __name__ == "__main__":
    main()
