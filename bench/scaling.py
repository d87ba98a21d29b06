"""How many directions Newton-Schulz leaves behind: the share of a random matrix's singular values that end below 0.5,
over size and aspect, for each set of steps and for those chosen from the shape (`coefficients="auto"`).

The law (arXiv 2505.04005): over the Frobenius norm, singular values shrink as 1 / sqrt(rows), so a fixed number of
steps leaves more of them behind as matrices grow. Nothing is multiplied here: Newton-Schulz is a scalar polynomial on
the singular values, and those of a Gaussian matrix are exactly those of a random bidiagonal one (Dumitriu, Edelman,
math-ph/0206043), which are counted below a threshold in O(rows). A second table has them from SVDs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zeta.coefficients import LONG, auto_coefficients, polynomial
from zeta.core import COEFFICIENTS, Coefficients
from zeta.newton_schulz_forms import flops
from zeta.palette import INK, OPTIMIZERS, OTHERS, SOFT

JORDAN = COEFFICIENTS["jordan"]
SETS: dict[str, Coefficients] = {
    **{f"jordan x{k}": JORDAN[:1] * k for k in (4, 5, 6, 8)},
    **{name: COEFFICIENTS[name] for name in ("you", "polar_express", "cans")},
}
SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
ASPECTS = (1, 1.5, 2, 3, 4)
NEARLY_SQUARE = (1, 1.001, 1.003, 1.01, 1.03, 1.1, 1.25, 1.5, 2, 3)
DIRECTIONS = 1 << 20  # singular values that a number is the mean of, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares, and the polynomials behind them")
    options = parser.parse_args()
    tables = {
        "Singular values left below 0.5, percent": [row(n, aspect) for n in SIZES for aspect in ASPECTS],
        "The same from SVDs of square matrices, and the law": [svd_row(n) for n in SIZES if n <= 2048],
    }
    if options.json:
        print(json.dumps(tables, indent=1))
    else:
        show(tables)
    if options.plot:
        draw(options.plot)


def row(n: int, aspect: float) -> dict[str, Any]:
    """The shares of n x (aspect n) with their sampling errors; `cost`: operations of auto over those of jordan x5."""
    m = round(n * aspect)
    auto = auto_coefficients(n, m)
    shares = share_left(n, m, {**SETS, "auto": auto})
    return {
        "rows": n,
        "cols": m,
        **{name: f"{100 * mean:.3f} ± {100 * error:.3f}" if mean else "0" for name, (mean, error) in shares.items()},
        "auto is": "jordan x5" if auto == JORDAN else f"{len(auto)} steps",
        "cost": f"{flops(n, m, auto) / flops(n, m, JORDAN):.2f}",
    }


def share_left(n: int, m: int, sets: dict[str, Coefficients]) -> dict[str, tuple[float, float]]:
    """{name: (mean share below 0.5, its standard error)} of Gaussian n x m matrices, n <= m."""
    seeds = max(64, DIRECTIONS // n)
    diagonal, below = bidiagonal(n, m, seeds, np.random.default_rng([n, m]))
    norm = np.sqrt((diagonal**2).sum(0) + (below**2).sum(0))
    ends = np.array([reach(steps) for steps in sets.values()])
    shares = count_below(diagonal, below, ends[:, None] * norm) / n
    errors = shares.std(axis=1) / np.sqrt(seeds)
    return dict(zip(sets, zip(shares.mean(axis=1).tolist(), errors.tolist(), strict=True), strict=True))


def bidiagonal(n: int, m: int, seeds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals (n, seeds) and subdiagonals (n - 1, seeds) with the singular values of Gaussian n x m matrices."""
    diagonal = rng.chisquare(np.arange(m, m - n, -1)[:, None], (n, seeds))
    below = rng.chisquare(np.arange(n - 1, 0, -1)[:, None], (n - 1, seeds))
    return np.sqrt(diagonal), np.sqrt(below)


def count_below(diagonal: np.ndarray, below: np.ndarray, t: np.ndarray) -> np.ndarray:
    """How many singular values lie below t (k, seeds): (k, seeds).

    They and their negatives are the eigenvalues of the symmetric tridiagonal matrix with zeros on its diagonal and the
    bidiagonal one's entries beside it; as many of those lie below t as its LDL^T less t has negative pivots.
    """
    beside = np.zeros((2 * len(diagonal) - 1, diagonal.shape[1]))
    beside[0::2], beside[1::2] = diagonal**2, below**2
    pivot = -np.broadcast_to(t, np.broadcast_shapes(np.shape(t), (1, diagonal.shape[1])))
    count = (pivot < 0).astype(int)
    for square in beside:
        pivot = -t - square / np.where(pivot == 0, np.finfo(float).tiny, pivot)
        count += pivot < 0
    return count - len(diagonal)


def reach(steps: Coefficients) -> float:
    """The s from which on p(s) >= 0.5. Raises ValueError where p falls below again, so that there is none."""
    s = np.geomspace(1e-7, 1, 200_001)
    low = polynomial(s, steps) < 0.5
    if (np.diff(low.astype(int)) > 0).any():
        raise ValueError(f"p falls below 0.5 again after it has reached it: {steps}")
    return float(s[low][-1])


def svd_row(n: int) -> dict[str, Any]:
    """Of square Gaussian matrices, by SVD; the law is that the last two columns are the same for every size."""
    seeds, values = max(2, 4096 // n), []
    for seed in range(seeds):
        s = np.linalg.svd(np.random.default_rng([n, seed]).standard_normal((n, n)), compute_uv=False)
        values.append(s / np.linalg.norm(s))
    s, cells = np.array(values), {}
    for name, steps in {**SETS, "auto": auto_coefficients(n, n)}.items():
        shares = 100 * (polynomial(s, steps) < 0.5).mean(axis=1)
        cells[name] = f"{shares.mean():.2f} ± {shares.std() / np.sqrt(seeds):.2f}"
    scaled = s * np.sqrt(n)
    law = {"median √n": f"{np.median(scaled):.3f}", "max √n": f"{scaled.max(axis=1).mean():.3f}"}
    return {"rows": n, "matrices": seeds, **cells, **law}


def show(tables: dict[str, list[dict[str, Any]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 190)
    for title, rows in tables.items():
        table = Table(*rows[0], title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        for before, cells in zip([None, *rows], rows, strict=False):
            if before and len(rows) > len(SIZES) and before["rows"] != cells["rows"]:
                table.add_section()
            table.add_row(*map(str, cells.values()))
        console.print(table)


AUTO = OPTIMIZERS["zeta"]
STYLES: dict[str, dict[str, Any]] = {  # you and cans lie on the curve before them: thin and dark on wide and light
    "jordan x5": dict(color=OTHERS[0], lw=4.5),
    "you": dict(color=INK, lw=1.2, ls="--"),
    "polar_express": dict(color=OTHERS[5], lw=4.5),
    "cans": dict(color=OTHERS[2], lw=1.2, ls="--"),
    "jordan x4": dict(color="#b9b0b6", lw=1.5),
    "jordan x6": dict(color="#85808f", lw=1.5),
    "jordan x8": dict(color="#4a4a5a", lw=1.5),
    "auto": dict(color=AUTO, lw=2.5, marker="o", ms=5),
}


def draw(file: Path) -> None:
    """Three pictures: the shares by size, the shares by aspect, and the polynomials behind them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="white")
    by_size, by_aspect, polynomials = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.2))
    draw_shares(by_size, {n: (n, n) for n in SIZES})
    by_size.set(xlabel="rows of a square matrix", ylabel="percent of singular values left below 0.5")
    by_size.set_title("more is left as matrices grow", loc="left", size=11, color=INK)
    n = SIZES[-1]
    draw_shares(by_aspect, {aspect: (n, round(aspect * n)) for aspect in NEARLY_SQUARE})
    by_aspect.set(xlabel=f"columns / rows, {n} rows")
    by_aspect.set_title("but only where nearly square", loc="left", size=11, color=INK)
    draw_polynomials(polynomials)
    handles = dict(zip(*reversed(by_size.get_legend_handles_labels()), strict=True))
    labels = {"jordan x5": "jordan x5 (the paper's)", "auto": 'ns_steps="auto", and its steps'}
    figure.legend(
        [handles[name] for name in STYLES],
        [labels.get(name, name) for name in STYLES],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(file, dpi=130)


def draw_shares(axes: Any, shapes: dict[float, tuple[int, int]]) -> None:
    """Shares in percent, of every set and of auto, by the keys of shapes."""
    left = [share_left(n, m, {**SETS, "auto": auto_coefficients(n, m)}) for n, m in shapes.values()]
    at = range(len(shapes))
    for name, style in STYLES.items():
        means, errors = (100 * np.array([shares[name][i] for shares in left]) for i in (0, 1))
        axes.errorbar(at, means, errors, label=name, **style)
    for x, mean, (n, m) in zip(at, means, shapes.values(), strict=True):  # of auto, the last
        where = {"xytext": (0, -14 if mean > 0.01 else 6), "textcoords": "offset points", "ha": "center"}
        axes.annotate(len(auto_coefficients(n, m)), (x, mean), color=AUTO, size=9, **where)
    axes.axhline(0.1, color=INK, linewidth=0.8)
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.4)
    axes.set_ylim(bottom=0)
    axes.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
    axes.set_xticks(at, [f"{key:g}" for key in shapes], rotation=45, ha="right", rotation_mode="anchor")
    axes.spines[["top", "right"]].set_visible(False)


def draw_polynomials(axes: Any) -> None:
    """Each p up to where it first is one; and where 0.1 % of a square matrix's singular values lie below."""
    s = np.geomspace(5e-7, 1e-2, 2001)
    for name, steps in SETS.items():
        draw_polynomial(axes, s, steps, STYLES[name])
    for k, style in ((6, ":"), (7, "--"), (8, "-")):
        steps = (LONG[0], *LONG[1 - k :])
        draw_polynomial(axes, s, steps, {"color": AUTO, "lw": 2.2, "ls": style})
        axes.text(reach(steps), 0.52, f"{k} ", color=AUTO, ha="right", weight="bold")
    for size in (128, 1024, 8192):
        axes.axvline(x := np.pi / 2 * 1e-3 / np.sqrt(size), color=SOFT, linewidth=1, zorder=0)
        axes.text(x, 1.02, f"{size}", size=8, ha="center", color=INK)
    axes.axhline(0.5, color=INK, linewidth=0.8)
    axes.set(xscale="log", ylim=(0, 1.07), ylabel="after Newton-Schulz")
    axes.set_xlabel("singular value / Frobenius norm\n(grey: 0.1 % of a square matrix's lie to the left)")
    axes.set_title("where auto's 6, 7 or 8 steps reach", loc="left", size=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def draw_polynomial(axes: Any, s: np.ndarray, steps: Coefficients, style: dict[str, Any]) -> None:
    p = polynomial(s, steps)
    end = int(np.argmax(p >= 1)) or len(s)
    axes.plot(s[:end], p[:end], **style)


if __name__ == "__main__":
    main()
