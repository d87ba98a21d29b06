"""Zeta (arXiv 2606.14187): whiten every coordinate of the momentum, then its spectrum.

The whole algorithm, in array-API operations: it runs on NumPy, torch, MLX or any other array library, and on NumPy in
float64 it is the oracle that every backend is held to. Leading axes are a batch of matrices, one update each.

A rule is written once, in two halves, and runs wherever parameters lie: `local` entry by entry, `whole` on matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace

from zeta import stages as plain
from zeta.stages import Array as Array
from zeta.stages import Shape, entries, frobenius, one

State = dict[str, Array]
Stages = Any  # `zeta.stages`, or a backend's own under the same names
Step = tuple[Array, State]
Sums = Mapping[str, tuple[str, Shape]]  # sums over a gradient: each a stage ("squares") and a shape
Keeps = dict[str, Shape]  # the state's keys, each with its shape for a matrix (rows, cols)
Coefficients = tuple[tuple[float, float, float], ...]
SMALLEST = 2**-126  # of float32's normal numbers


class Orthogonalize(Protocol):
    def __call__(self, x: Array, /) -> Array: ...


@dataclass(frozen=True)
class Hyper:
    """The settings of one step. Defaults are the paper's. `lr` and `weight_decay` may be 0-d arrays."""

    lr: Any = 1e-3  # lr * 0.2 is the RMS of an entry's change
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: Any = 0.1  # decoupled: a step first multiplies the weights by 1 - lr * weight_decay

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, Real):  # an array is left on its device, its value unseen
                if not 0 <= float(value) < inf:
                    raise ValueError(f"{name} is {value!r}, but must be finite and >= 0")
                object.__setattr__(self, name, float(value))  # a NumPy scalar would widen float32 arrays
            elif name == "eps" or not hasattr(value, "dtype"):
                raise ValueError(f"{name} is {value!r}, but must be a number")
        if self.eps < SMALLEST:
            raise ValueError(
                f"eps is {self.eps!r}, but must be at least 2**-126: an entry without a gradient yet is 0 / eps"
            )
        betas = tuple(self.betas) if isinstance(self.betas, Sequence) else ()
        if len(betas) != 2 or not all(isinstance(b, Real) and 0 <= b < 1 for b in betas):
            raise ValueError(f"betas is {self.betas!r}, but must be two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(map(float, betas)))


def local(g: Array, state: State, hyper: Hyper, stages: Stages) -> Step:
    """(x, state): coordinate whitening, entry by entry."""
    (b1, b2), eps = hyper.betas, hyper.eps
    m = stages.ema(state["exp_avg"], g, b1)  # b1 m + (1 - b1) g
    v = stages.ema_sq(state["exp_avg_sq"], g, b2)  # b2 v + (1 - b2) g g
    return stages.whiten(m, v, eps), {"exp_avg": m, "exp_avg_sq": v}  # m / (sqrt(v) + eps)


def whole(x: Array, sums: State, state: State, hyper: Hyper, orthogonalize: Orthogonalize, stages: Stages) -> Step:
    """(u, state): spectral whitening of whole matrices; 0.2 sqrt(rows cols) / (|u| + eps) u."""
    return stages.to_rms(orthogonalize(x), hyper.eps), {}


class Rule(NamedTuple):
    """An optimizer of matrices: `rule.init(param)`, then `rule.update(...)` a step, which its parts alone determine.

    Every backend runs the same parts, on one device or over ranks: `local` where the entries lie, `whole` at a matrix's
    owner, `zeta.stages.apply` where the weights lie.
    """

    local: Callable[[Array, State, Hyper, Stages], Step]  # (g, state, hyper, stages) -> (x, state), entry by entry
    whole: Callable[..., Step]  # (x, sums, state, hyper, orthogonalize, stages) -> (u, state), of whole matrices
    keeps: Keeps  # all of the state
    carried: tuple[str, ...] = ()  # those of `whole`; the others are `local`'s, with a number for every entry
    sums: Sums = {}  # noqa: RUF012 (of a tuple; of the gradient, for `whole`)
    orthogonalizes: bool = True  # whether `whole` calls `orthogonalize`
    defaults: Hyper = Hyper()
    decomposes: bool = False  # whether `whole` calls eigh or svd, for which the host waits for a GPU

    @property
    def summed(self) -> dict[str, tuple[str, Shape]]:
        """All sums over the gradient: those of `whole`, and whether there is one, for `zeta.stages.apply`."""
        return {**self.sums, "moved": ("nonzero_count", one)}

    def init(self, param: Array) -> State:
        """Zeros for param (..., rows, cols): float64 where param is, else float32."""
        check_matrix(param)
        xp = array_namespace(param)
        zero = xp.zeros_like(param[..., :1, :1], dtype=wide(param))  # on param's device in every library
        return {key: xp.broadcast_to(zero, shape) + 0 for key, shape in _shapes(self.keeps, param).items()}

    def update(
        self, grad: Array, state: State, param: Array, hyper: Hyper, orthogonalize: Orthogonalize | None = None
    ) -> tuple[Array, State]:
        """(param, state) after one step; grad and param (..., rows, cols). The arguments are left as they were.

        `orthogonalize` maps (..., rows, cols) to the same shape; None is `newton_schulz` of this file.
        Zeta's v overflows in float32 where |g| exceeds 1e19. Raises ValueError where shapes do not fit.
        """
        check_matrix(param)
        check_shapes(param, _shapes(self.keeps, param), grad, state)
        xp = array_namespace(param)

        def same_dtype(x: Array) -> Array:
            return xp.astype((orthogonalize or newton_schulz)(x), x.dtype)

        g = xp.astype(grad, wide(param))
        sums = {key: getattr(plain, stage)(g, flat_axes(shape)) for key, (stage, shape) in self.summed.items()}
        x, moments = self.local(g, {k: a for k, a in state.items() if k not in self.carried}, hyper, plain)
        carried = {key: state[key] for key in self.carried}
        u, carried = self.whole(x, sums, carried, hyper, same_dtype, plain)
        moved = xp.astype(sums["moved"] > 0, u.dtype)
        w = plain.apply(xp.astype(param, u.dtype), u, hyper.lr, hyper.weight_decay, moved)
        return xp.astype(w, param.dtype), moments | carried


zeta = Rule(local, whole, {"exp_avg": entries, "exp_avg_sq": entries})
init, update = zeta.init, zeta.update


def shrunk(*raw: tuple[float, float, float], safety: float) -> Coefficients:
    """The published coefficients of p(x), as those of p(x / safety): rounding must not push a value above one, where
    the steepest of these polynomials leave their range (published `cans` on a row vector in bfloat16 gives 1e11)."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in raw)


# (a, b, c) of each step x <- a x + b x^3 + c x^5 on the singular values. Fewer steps: a slice.
COEFFICIENTS: dict[str, Coefficients] = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,  # Keller Jordan, "Muon" (2024); the Zeta paper's choice
    "you": (  # Jiacheng You, in the modded-nanogpt speed run (2025)
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": shrunk(  # Amsel et al., arXiv 2505.16932, and its factor
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        safety=1.01,
    ),
    "cans": shrunk(  # Grishina, Smirnov, Rakhuba, "CANS", arXiv 2506.10935; the factor is ours
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
        safety=1.02,
    ),
}


def newton_schulz(x: Array, coefficients: Coefficients = COEFFICIENTS["jordan"]) -> Array:
    """x (..., rows, cols) with its singular values moved towards one and its singular vectors kept.

    Every singular value s of x becomes p(s / |x|_F), p the composition of the steps: with `jordan`, 0.68 to 1.13 for
    all above 1 % of the norm. Zero stays zero. Source: Keller Jordan, "Muon" (2024).
    """
    check_matrix(x)
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, coefficients).mT
    xp = array_namespace(x)
    x = xp.astype(normalize(xp.astype(x, wide(x))), x.dtype)  # the norm of a half-precision x may overflow in it
    for a, b, c in coefficients:
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x


def normalize(x: Array) -> Array:
    """x (..., rows, cols) divided by each matrix's Frobenius norm, whatever its size: 1e-30 and 1e30 lose nothing.

    The paper adds eps to the norm instead, which would leave an input smaller than eps far from orthogonal.
    """
    xp = array_namespace(x)
    top = xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / xp.where(top == 0, xp.ones_like(top), top)  # now the norm is 0, or between 1 and sqrt(rows cols)
    norm = frobenius(x)
    return x / xp.where(norm == 0, xp.ones_like(norm), norm)


def wide(x: Array) -> Any:
    """float64 for a float64 x, else float32: the dtype of moments and norms. Raises TypeError for integers."""
    if "float" not in str(x.dtype):  # MLX has no isdtype
        raise TypeError(f"an array of {x.dtype} was given, but real floating-point numbers are needed: convert it")
    xp = array_namespace(x)
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def check_shapes(param: Array, keeps: dict[str, tuple[int, ...]], grad: Array, state: State) -> None:
    """Raises ValueError unless grad has param's shape, and state all of `keeps` and nothing else."""
    if tuple(grad.shape) != tuple(param.shape):
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}, but its parameter has {tuple(param.shape)}: they must agree"
        )
    given = {key: tuple(array.shape) for key, array in state.items()}
    if given != keeps:
        raise ValueError(f"the state is {given}, but its parameter needs {keeps}: make it with this optimizer's init")


def check_matrix(x: Array) -> None:
    if x.ndim < 2:
        raise ValueError(f"a matrix (..., rows, cols) is needed, got shape {tuple(x.shape)}: use zeta.adamw for it")


def flat_axes(shape: Shape) -> tuple[int, ...]:
    """The axes of a matrix along which an array of this shape holds one number."""
    return tuple(axis for axis, n in zip((-2, -1), shape(2, 2), strict=True) if n == 1)


def _shapes(keeps: Keeps, param: Array) -> dict[str, tuple[int, ...]]:
    *stack, rows, cols = param.shape
    return {key: (*stack, *shape(rows, cols)) for key, shape in keeps.items()}
