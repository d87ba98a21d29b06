"""What whitening does to a run's own matrices: scale, spectrum, and how far Newton-Schulz is from orthogonal.

Pure functions in NumPy float64, two SVDs a matrix, on what `zeta.checkpoint` saves. Two targets, because whitening
moves the target: polar(M), the momentum's own orthogonal factor, at which Muon aims, and polar(X) of the whitened one.
"""

from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zeta.checkpoint import read_lines
from zeta.coefficients import Steps, polynomial, steps_for
from zeta.core import COEFFICIENTS, Coefficients, Hyper
from zeta.routing.by_name import route
from zeta.routing.layout import Route, piece, shapes
from zeta.stages import whiten
from zeta.whitening.uniformity import Evenness, Matrix, evenness

Record = dict[str, Any]
POINTS = 33  # of a spectrum


class View(NamedTuple):
    """A matrix as Newton-Schulz meets it: M before whitening, X after."""

    rows: Evenness
    cols: Evenness
    blocks: Evenness
    rank: int  # singular values above rounding; the numbers below are of these
    condition: float  # the largest over the smallest of them
    spectrum: list[float]  # 33 of them, from the largest to the smallest, over their root mean square
    error: float  # |NS(x) - polar(x)| / |polar(x)|, Frobenius
    left: float  # the share that Newton-Schulz leaves below 0.5
    cosine: float  # between NS(x) and polar(M)


def inspect(
    arrays: Mapping[str, Matrix],
    *,
    lr: float,
    step: int = 0,
    eps: float = Hyper().eps,
    coefficients: Steps = COEFFICIENTS["jordan"],
    routes: Mapping[str, Route] | None = None,
) -> Iterator[Record]:
    """A record for each matrix that goes to Newton-Schulz: of what a trainer's `arrays` or a checkpoint holds.

    `routes` is what `zeta.routes(model)` says, None for what the names say. A matrix without momentum (an expert that
    saw no token) is left out. Raises ValueError where no parameter has both moments, or one is not finite.
    """
    Hyper(lr=lr, eps=eps)  # checks the values
    prefix, whitened = "optimizer.exp_avg_sq.", False
    if any(full.startswith("optimizer.steps.") for full in arrays):
        raise ValueError("this is SOAP's state, whose variance is one between eigenvectors: inspect Zeta's or AdamW's")
    for name in (full.removeprefix(prefix) for full in arrays if full.startswith(prefix)):
        if missing := {name, f"optimizer.exp_avg.{name}"} - arrays.keys():
            raise ValueError(f"there is {prefix}{name}, but no {sorted(missing)}: give all that the run saved")
        r = routes[name] if routes else route(name, arrays[name].shape)
        if r.treatment != "zeta":
            continue
        whitened = True
        stacks = [matrices(arrays[key], r) for key in (f"optimizer.exp_avg.{name}", prefix + name, name)]
        for i, (m, v, w) in enumerate(zip(*stacks, strict=True)):
            label = name.removesuffix(".weight") + (f"[{i}]" if len(stacks[0]) > 1 else "")
            if not all(np.isfinite(array).all() for array in (m, v, w)):
                raise ValueError(f"{label} or its moments hold NaN or infinity: look at an earlier step")
            if m.any():
                yield {"step": step, "matrix": label, **examine(m, v, w, lr, eps, coefficients)}
    if not whitened:
        raise ValueError(
            "no matrix has both moments, exp_avg and exp_avg_sq: Zeta and AdamW keep them, after the first step"
        )


def matrices(x: Matrix, route: Route) -> list[Matrix]:
    """Each matrix (rows, cols) that a parameter holds."""
    return [matrix for i, shape in enumerate(shapes(route)) for matrix in piece(x, route, i).reshape(shape)]


def examine(m: Matrix, v: Matrix, w: Matrix, lr: float, eps: float, coefficients: Steps) -> Record:
    """The numbers of one matrix (rows, cols): M and X as `View`s, and the step that Zeta would take from here."""
    rounding = float(np.finfo(m.dtype).eps)
    m, v, w = (array.astype(np.float64) for array in (m, v, w))
    before, after = factors(m, rounding), factors(whiten(m, v, eps), rounding)
    target = before.u @ before.vt
    views = [view(f, target, steps_for(coefficients, *m.shape)) for f in (before, after)]
    weight = sqrt(np.mean(w**2))
    return {
        "shape": m.shape,
        "before": plain(views[0]),
        "after": plain(views[1]),
        "weight_rms": weight,
        "update_rms": 0.2 * lr,
        "change": 0.2 * lr / weight if weight else None,  # |update| / |weights|, without decay
    }


class Factors(NamedTuple):
    """x = u diag(s) vt over its rank, and x itself."""

    x: Matrix
    u: Matrix
    s: Matrix
    vt: Matrix


def factors(x: Matrix, rounding: float) -> Factors:
    """The SVD of x (rows, cols) without what is rounding of its largest singular value."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = int((s > s[0] * max(x.shape) * rounding).sum())
    return Factors(x, u[:, :rank], s[:rank], vt[:rank])


def view(f: Factors, target: Matrix, steps: Coefficients) -> View:
    """Newton-Schulz in exact arithmetic: the polynomial applied to the singular values."""
    s = f.s / np.linalg.norm(f.s)
    p = polynomial(s, steps)
    product = (f.u * p) @ f.vt
    return View(
        **evenness(f.x),
        rank=len(s),
        condition=float(s[0] / s[-1]),
        spectrum=[float(value) for value in np.quantile(s * sqrt(len(s)), np.linspace(1, 0, POINTS))],
        error=float(sqrt(np.mean((p - 1) ** 2))),
        left=float(np.mean(p < 0.5)),
        cosine=float(np.sum(product * target) / (np.linalg.norm(p) * np.linalg.norm(target))),
    )


def plain(v: View) -> Record:
    """The view as JSON has it."""
    return {name: value._asdict() if isinstance(value, Evenness) else value for name, value in v._asdict().items()}


def read_series(path: Path) -> list[Record]:
    """The records of an inspect.jsonl; a last line that a kill cut short is left out. Raises ValueError for others."""
    try:
        records = read_lines(path)
    except ValueError:  # of JSON, or of bytes that are no text
        records = [{}]
    if not all(map(is_record, records)):
        raise ValueError(f"{path} is no inspect.jsonl: give the one that train_lm.py --inspect wrote")
    return records


def is_record(x: Any) -> bool:
    """Whether x, as JSON has it, is what `inspect` yields: its keys, and those of both views."""
    whole = isinstance(x, dict) and {"step", "matrix", "shape", "before", "after", "change"} <= x.keys()
    return whole and all(
        isinstance(x[side], dict) and x[side].keys() == set(View._fields) for side in ("before", "after")
    )
