"""Newton-Schulz against its peers on the same matrices: time and ratio, rate, error beside the peer's, peak memory.

Peers: the iteration of torch.optim.Muon (it always runs in bfloat16; left out where a CPU emulates that), the same in
float32, gram-newton-schulz on CUDA (where it is installed), mlx.optimizers.Muon, and the plain zeta.newton_schulz,
matrix by matrix. Five `jordan` steps everywhere.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, plot, show
from safetensors.numpy import load_file

import zeta
from zeta.bench.measure import Row
from zeta.bench.report import mean, side_of
from zeta.bench.tables import Iterations, error, newton_schulz, polynomial

JORDAN = zeta.COEFFICIENTS["jordan"]
GRAM = "gram-newton-schulz"
# (count, rows, cols), large ones first: glibc gives small blocks back to the system, a page fault each, until large
# ones have been freed, as they have in a process that trains.
SHAPES = {
    "cpu": [
        *[(2, 1024, 4096), (4, 768, 3072), (8, 512, 2048), (2, 1024, 1024)],
        *[(8, 512, 512), (4, 2048, 256), (16, 256, 256), (24, 128, 128)],
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
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxROWSxCOLS", help="instead of the device's own")
    parser.add_argument("--errors", action="store_true", help="only the table of errors by kind of input")
    parser.add_argument("--checkpoint", type=Path, help="of train_lm.py: adds its whitened momentum to --errors")
    options = parser.parse_args()
    side = side_of(options.backend, options.device)
    if options.errors:
        rows = list(errors(side, options.checkpoint, options.shapes or quick(side)))
        show("Relative error against float64, beside the peer's", rows, options)
        return
    contenders, shapes = peers(side), options.shapes or SHAPES[name_of(side)]
    rows = [row(side, shape, contenders, options.rounds) for shape in shapes]
    ratios = {f"x {name}": [r[f"x {name}"] for r in rows] for name in contenders}
    means = ", ".join(f"{name} {mean(values):.2f}" for name, values in ratios.items())
    note = f"GFLOP/s: operations of the plain iteration over time.\ngeometric means: {means}"
    if side.kind == "cuda" and GRAM not in contenders:
        note += f"\n{GRAM}, the bar on Hopper, is not installed: pip install {GRAM}"
    show("Newton-Schulz, five steps", rows, options, note)
    if options.plot:
        plot(options.plot, "Newton-Schulz", [r["shape"] for r in rows], ratios)


def shape(text: str) -> tuple[int, int, int]:
    """Of "8x512x2048"."""
    count, rows, cols = map(int, text.split("x"))
    return count, rows, cols


def name_of(side: Any) -> str:
    """The key of its SHAPES."""
    return "mlx" if side.library == "mlx" else str(side.kind)


def peers(side: Any) -> Iterations:
    own = side.peers() | {"core": lambda x: zeta.newton_schulz(x)}
    if side.kind == "cuda" and find_spec(GRAM.replace("-", "_")):
        from gram_newton_schulz import GramNewtonSchulz

        gram = GramNewtonSchulz(ns_coefficients=[list(step) for step in JORDAN])
        own[GRAM] = lambda x: gram(x)
    return {name: peer for name, peer in own.items() if name != "Muon" or side.muon == "Muon"}


def row(side: Any, shape: tuple[int, int, int], contenders: Iterations, rounds: int) -> Row:
    cells = newton_schulz(side, shape, contenders, rounds)
    return cells | {"GFLOP/s": work(shape) / cells["zeta ms"] / 1e6}


def work(shape: tuple[int, int, int]) -> float:
    """Floating-point operations of the plain iteration."""
    count, short, long = shape[0], *sorted(shape[1:])
    return len(JORDAN) * count * (4 * short**2 * long + 2 * short**3)


def quick(side: Any) -> list[tuple[int, int, int]]:
    """Those of its shapes for which a turn of the peer's and an SVD are quick."""
    limit = 5e11 if side.kind == "cuda" else 5e9
    return list({shape[1:]: shape for shape in SHAPES[name_of(side)] if work((1, *shape[1:])) < limit}.values())


def errors(side: Any, checkpoint: Path | None, shapes: list[tuple[int, int, int]]) -> Iterator[Row]:
    """Error by kind of input, of ours and of the peer; of a stack of matrices, of one."""
    for kind, x in [*inputs(shapes), *(whitened_momentum(checkpoint) if checkpoint else [])]:
        given, oracle = side.array(x), polynomial(x)
        ours, theirs = (error(side.numpy(f(given)), oracle) for f in (side.newton_schulz, side.peers()["Muon"]))
        shape = f"{x.shape[0]}x{x.shape[1]}"
        yield {"input": kind, "shape": shape, "zeta": ours, "Muon": theirs, "ratio": ours / theirs}


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


if __name__ == "__main__":
    main()
