"""Newton-Schulz against its peers on the same matrices: time and ratio, rate, error beside the peer's, peak memory.

Peers: the iteration of torch.optim.Muon (it always runs in bfloat16), the same in float32, gram-newton-schulz on CUDA,
mlx.optimizers.Muon, and the plain zeta.newton_schulz, matrix by matrix. Five `jordan` steps everywhere.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import SLOW, arguments, medians, plot, show, timed, torch_peak
from safetensors.numpy import load_file

import zeta
from zeta.parity.checks import spectral_polynomial

JORDAN = zeta.COEFFICIENTS["jordan"]
SHAPES = {  # (count, rows, cols)
    "cpu": [
        *[(24, 128, 128), (16, 256, 256), (8, 512, 512), (8, 512, 2048)],
        *[(4, 768, 3072), (2, 1024, 1024), (2, 1024, 4096), (4, 2048, 256)],
    ],
    "cuda": [
        *[(n, *shape) for n in (1, 24) for shape in [(1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096)]],
        (1, 4096, 16384),
    ],
    "mps": [(8, 512, 512), (8, 512, 2048), (2, 1024, 4096)],
    "mlx": [(8, 128, 512), (4, 256, 1024), (8, 256, 256)],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--errors", action="store_true", help="only the table of errors by kind of input")
    parser.add_argument("--checkpoint", type=Path, help="of train_lm.py: adds its whitened momentum to --errors")
    options = parser.parse_args()
    side = Mlx() if options.backend == "mlx" else Torch(options)
    if options.errors:
        rows = list(errors(side, options.checkpoint))
        show("Relative error against float64, beside the peer's", rows, options)
        return
    rate = side.matmul_rate()
    rows = [row(side, shape, rate, options.rounds) for shape in SHAPES[side.name]]
    note = f"GFLOP/s: operations of the plain iteration over time; share: of a matmul's {rate:,.0f} GFLOP/s here.\n"
    note += "~: one matrix timed once, times count, where a whole turn is slow."
    show("Newton-Schulz, five steps", rows, options, note)
    peers = [name for name in rows[0] if name.startswith("x ")]
    means = {p: float(np.exp(np.mean([np.log(r[p]) for r in rows]))) for p in peers}
    if not options.json:
        print("geometric means:", ", ".join(f"{p} {mean:.2f}" for p, mean in means.items()))
    if options.plot:
        plot(options.plot, "Newton-Schulz", [r["shape"] for r in rows], {p: [r[p] for r in rows] for p in peers})


class Torch:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.torch, self.name, self.options = torch, options.device, options

    def array(self, x: np.ndarray) -> Any:
        return self.torch.tensor(x, dtype=self.torch.float32, device=self.name)

    def ours(self, x: Any) -> Any:
        from zeta.backends.torch import newton_schulz

        return self.wait(newton_schulz(x))

    def peers(self) -> dict[str, Callable[[Any], Any]]:
        """One matrix each, the name as the column shows it."""
        from torch.optim._muon import _zeropower_via_newtonschulz as muon

        peers = {
            "Muon": lambda x: muon(x, JORDAN[0], len(JORDAN), 1e-7),
            "Muon in float32": lambda x: muon_float32(x),
            "core": lambda x: zeta.newton_schulz(x),
        }
        if self.name == "cuda":
            from gram_newton_schulz import GramNewtonSchulz  # the bar on Hopper: absent, this fails and says so

            gram = GramNewtonSchulz(ns_coefficients=[list(step) for step in JORDAN])
            peers["gram-newton-schulz"] = lambda x: gram(x)
        return peers

    def wait(self, x: Any) -> Any:
        if self.name != "cpu":
            getattr(self.torch, self.name).synchronize()
        return x

    def numpy(self, x: Any) -> np.ndarray:
        return x.double().cpu().numpy()

    def peak(self, run: Callable[[], Any]) -> int:
        return torch_peak(run, self.name)

    def matmul_rate(self) -> float:
        from zeta.backends.torch.orthogonalize import working_dtype

        x = self.torch.randn(2048, 2048, device=self.name)
        x = x.to(working_dtype(x))
        return 2 * 2048**3 / medians({"": lambda: self.wait(x @ x)}, 9)[""] / 1e9


class Mlx:
    name = "mlx"

    def __init__(self) -> None:
        import mlx.core as mx

        self.mx = mx

    def array(self, x: np.ndarray) -> Any:
        return self.mx.array(x.astype(np.float32))

    def ours(self, x: Any) -> Any:
        from zeta.backends.mlx import newton_schulz

        return self.wait(newton_schulz(x))

    def peers(self) -> dict[str, Callable[[Any], Any]]:
        from mlx.optimizers import Muon

        muon = Muon(learning_rate=1.0)
        return {
            "Muon": lambda x: muon._zeropower_via_newtonschulz5(x, len(JORDAN)),
            "core": lambda x: zeta.newton_schulz(x),
        }

    def wait(self, x: Any) -> Any:
        self.mx.eval(x)
        return x

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x, dtype=np.float64)

    def peak(self, run: Callable[[], Any]) -> int:
        before = self.mx.get_active_memory()
        self.mx.reset_peak_memory()
        run()
        return self.mx.get_peak_memory() - before

    def matmul_rate(self) -> float:
        x = self.mx.random.normal((512, 512))
        return 2 * 512**3 / medians({"": lambda: self.wait(x @ x)}, 9)[""] / 1e9


def muon_float32(x: Any) -> Any:
    """The formula of torch.optim.Muon's iteration, in float32: what its bfloat16 is worth on this device."""
    import torch

    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in JORDAN:
        s = x @ x.T
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def row(side: Any, shape: tuple[int, int, int], rate: float, rounds: int) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal(shape)
    stack, one, want = side.array(x), side.array(x[0]), polynomial(x[0])
    peers = side.peers()
    first = {name: timed(lambda peer=peer: side.wait(peer(one))) for name, peer in peers.items()}
    for name in [n for n, (took, _) in first.items() if took < SLOW or side.name != "cpu"]:
        first[name] = timed(lambda peer=peers[name]: side.wait(peer(one)))  # a first call also loads and compiles
    slow = {name: shape[0] * took for name, (took, _) in first.items() if shape[0] * took > SLOW}
    contenders: dict[str, Callable[[], Any]] = {"zeta": lambda: side.ours(stack)}
    for name in peers.keys() - slow.keys():
        contenders[name] = lambda peer=peers[name]: side.wait([peer(matrix) for matrix in stack])
    times = medians(contenders, rounds) | slow
    gflops = work(shape) / times["zeta"] / 1e9
    cells: dict[str, Any] = {"shape": "x".join(map(str, shape)), "zeta ms": 1e3 * times["zeta"]}
    for name in peers:
        cells[f"{name} ms"] = f"{'~' if name in slow else ''}{1e3 * times[name]:,.1f}"
        cells[f"x {name}"] = times[name] / times["zeta"]
    cells |= {"GFLOP/s": gflops, "share": f"{gflops / rate:.0%}", "error": error(side.numpy(side.ours(stack))[0], want)}
    cells["Muon's error"] = error(side.numpy(first["Muon"][1]), want)
    return cells | {"peak MiB": side.peak(lambda: side.ours(stack)) / 2**20}


def work(shape: tuple[int, int, int]) -> float:
    """Floating-point operations of the plain iteration."""
    count, short, long = shape[0], *sorted(shape[1:])
    return len(JORDAN) * count * (4 * short**2 * long + 2 * short**3)


def errors(side: Any, checkpoint: Path | None) -> Iterator[dict[str, Any]]:
    """Error by kind of input, of ours and of the peer, on the shapes of which a peer's turn is not too slow."""
    shapes = [shape for shape in SHAPES[side.name] if side.name == "cuda" or work((1, *shape[1:])) < 5e9]
    for kind, x in [*inputs(shapes), *(whitened_momentum(checkpoint) if checkpoint else [])]:
        ours = error(side.numpy(side.ours(side.array(x))), polynomial(x))
        theirs = error(side.numpy(side.peers()["Muon"](side.array(x))), polynomial(x))
        yield {
            "input": kind,
            "shape": f"{x.shape[0]}x{x.shape[1]}",
            "zeta": ours,
            "Muon": theirs,
            "ratio": ours / theirs,
        }


def polynomial(x: np.ndarray) -> np.ndarray:
    return spectral_polynomial(x.astype(np.float32).astype(np.float64)[None])[0]


def inputs(shapes: list[tuple[int, int, int]]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _, rows, cols in shapes:
        yield "Gaussian", rng.standard_normal((rows, cols))
        yield "rank 4", rng.standard_normal((rows, 4)) @ rng.standard_normal((4, cols))
        for condition in (1e3, 1e6):
            u, _, vt = np.linalg.svd(rng.standard_normal((rows, cols)), full_matrices=False)
            yield f"condition {condition:.0e}", (u * np.geomspace(1, 1 / condition, min(rows, cols))) @ vt


def whitened_momentum(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """m / (sqrt(v) + eps) of the first matrix of each shape that a training run has saved."""
    saved, shapes = load_file(checkpoint), set()
    for name in saved:
        parameter = name.removeprefix("optimizer.exp_avg_sq.")
        if parameter == name or zeta.route(parameter, saved[name].shape).treatment != "zeta":
            continue
        if saved[name].shape not in shapes:
            shapes.add(saved[name].shape)
            m, v = saved[f"optimizer.exp_avg.{parameter}"], saved[name]
            yield "whitened momentum", m / (np.sqrt(v) + zeta.Hyper().eps)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


if __name__ == "__main__":
    main()
