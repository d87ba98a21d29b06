"""Bytes a weight: each optimizer's state, and what a step holds beyond parameters, gradients and state.

The weights are a GPT's matrices (8 layers of width 256), in batches of an eighth of them, which is what a model of more
than 34 million weights has. State is what is there after a step; that the code computes the same is a test.
"""

import argparse
from collections.abc import Sequence
from math import prod
from typing import Any

from measure import show

import zeta
from zeta.bench.measure import Row
from zeta.bench.model import Shapes
from zeta.bench.report import side_of
from zeta.bench.tables import gpt
from zeta.parity.paths import replaced
from zeta.routing import layout
from zeta.storage import state_bytes

SHAPES: Shapes = {name: shape for name, shape in gpt(8, 256, 0).items() if len(shape) > 1}
WEIGHTS = sum(map(prod, SHAPES.values()))
OURS = ["Zeta", "Eta", "Muon", "AdaMuon", "NorMuon", "OLion", "Signum", "AdaGO", "Dion2", "Schattor", "Shampoo", "SOAP"]
PEERS = ["Muon + AdamW", "AdamW"]  # the library's own; there is nothing here for the former's AdamW
WIDTHS = {"float32": 4, "bfloat16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--device", default=None, help="torch: cpu, cuda, mps; MLX: cpu, gpu (default: a GPU)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    options = parser.parse_args()
    side = side_of(options.backend, options.device)
    rows = [row(side, name) for name in [*OURS, *PEERS]]
    show("Bytes a weight", rows, options)


def row(side: Any, name: str, dtypes: Sequence[str] = tuple(WIDTHS)) -> Row:
    cells: Row = {"optimizer": name}
    for dtype in dtypes:
        state, transient = measured(side, name, dtype)
        cells |= {f"state, {dtype}": state, f"transient, {dtype}": transient}
    return cells


def measured(side: Any, name: str, dtype: str) -> tuple[float, float | None]:
    """Bytes a weight of state, and of what its second step holds for that long."""
    with replaced(layout, BATCH_ENTRIES=1):
        step = side.step(name, SHAPES, dtype)
        step()
        peak = side.peak(step)
    return step.state() / WEIGHTS, None if peak is None else peak / WEIGHTS


def computed(name: str, dtype: str, shapes: Shapes) -> int:
    """Bytes of state of one of ours, from the rule's shapes alone."""
    keeps = getattr(zeta.backend(), name).rule.keeps
    return sum(state_bytes(keeps, zeta.route(n, shape), shape, WIDTHS[dtype]) for n, shape in shapes.items())


if __name__ == "__main__":
    main()
