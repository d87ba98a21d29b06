"""Every rule once more, from its paper and in plain NumPy: for one matrix, and without a line of `zeta`.

A function takes (gradient, state, w, lr, b1, b2, eps, decay) and gives the new w; it keeps its state in the dict, which
is empty at first. Three conventions are zeta's, the same for all: the momentum is an average, m = b1 m + (1 - b1) g,
with no correction of its bias; decay is decoupled; a matrix whose gradient is zero is decayed and not moved, but its
state is updated. Where a paper leaves a scale to its reader it is the RMS of 0.2 of arXiv 2502.16982.
"""

from math import ceil, inf, sqrt

import numpy as np


def zeta(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2606.14187; eps stands beside the norm of the update as well."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * g**2
    u = newton_schulz(m / (np.sqrt(v) + eps))
    return moved(w, 0.2 * sqrt(g.size) / (np.sqrt(np.sum(u**2)) + eps) * u, g, lr, decay)


def eta(g, state, w, lr, b1, b2, eps, decay):
    """zeta/README.md, "The family": rows, then columns of one size, and none that has no gradient.

    Left open there: a dead column's fading momentum still counts in the size of a row, a dead row's in none.
    """
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    x = b1 * m + (1 - b1) * g
    x = x / or_one(np.sqrt(np.mean(x**2, axis=1, keepdims=True))) * np.any(g != 0, axis=1, keepdims=True)
    x = x / or_one(np.sqrt(np.mean(x**2, axis=0, keepdims=True))) * np.any(g != 0, axis=0, keepdims=True)
    return moved(w, 0.2 * sqrt(max(g.shape)) * newton_schulz(x), g, lr, decay)


def muon(g, state, w, lr, b1, b2, eps, decay):
    """Keller Jordan, 2024, with Nesterov momentum; the scale is that of arXiv 2502.16982."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u = newton_schulz(b1 * m + (1 - b1) * g)
    return moved(w, 0.2 * sqrt(max(g.shape)) * u, g, lr, decay)


def adamuon(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2507.11005: the sign before, an entry's own variance after."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u = newton_schulz(np.sign(m))
    v = state["update_sq"] = b2 * state.get("update_sq", 0.0) + (1 - b2) * u**2
    return moved(w, at_rms(u / (np.sqrt(v) + eps)), g, lr, decay)


def normuon(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2510.05491: a variance for each row (a neuron's weights), after."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u = newton_schulz(m)
    v = state["row_sq"] = b2 * state.get("row_sq", 0.0) + (1 - b2) * np.mean(u**2, axis=1, keepdims=True)
    return moved(w, at_rms(u / (np.sqrt(v) + eps)), g, lr, decay)


def whiten_after(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2510.25000, variance-adapted Muon: AdaMuon without the sign."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u = newton_schulz(m)
    v = state["update_sq"] = b2 * state.get("update_sq", 0.0) + (1 - b2) * u**2
    return moved(w, at_rms(u / (np.sqrt(v) + eps)), g, lr, decay)


def whiten_both(g, state, w, lr, b1, b2, eps, decay):
    """No paper's: Zeta's variance before, AdaMuon's after."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * g**2
    u = newton_schulz(m / (np.sqrt(v) + eps))
    after = state["update_sq"] = b2 * state.get("update_sq", 0.0) + (1 - b2) * u**2
    return moved(w, at_rms(u / (np.sqrt(after) + eps)), g, lr, decay)


def rank1_before(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2604.09967 (Muon^2-F): of Zeta's variance only the means of rows and columns are kept."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    r = state["row_sq"] = b2 * state.get("row_sq", 0.0) + (1 - b2) * np.mean(g**2, axis=1, keepdims=True)
    c = state["col_sq"] = b2 * state.get("col_sq", 0.0) + (1 - b2) * np.mean(g**2, axis=0, keepdims=True)
    u = newton_schulz(m / (np.sqrt(r * c / or_one(np.mean(r))) + eps))
    return moved(w, at_rms(u), g, lr, decay)


def rank1_after(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2510.25000, Muon with a variance of rank one."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u = newton_schulz(m)
    r = state["row_sq"] = b2 * state.get("row_sq", 0.0) + (1 - b2) * np.mean(u**2, axis=1, keepdims=True)
    c = state["col_sq"] = b2 * state.get("col_sq", 0.0) + (1 - b2) * np.mean(u**2, axis=0, keepdims=True)
    return moved(w, at_rms(u / (np.sqrt(r * c / or_one(np.mean(r))) + eps)), g, lr, decay)


def rank1_both(g, state, w, lr, b1, b2, eps, decay):
    """No paper's: a variance of rank one before, another after."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    r = state["row_sq"] = b2 * state.get("row_sq", 0.0) + (1 - b2) * np.mean(g**2, axis=1, keepdims=True)
    c = state["col_sq"] = b2 * state.get("col_sq", 0.0) + (1 - b2) * np.mean(g**2, axis=0, keepdims=True)
    u = newton_schulz(m / (np.sqrt(r * c / or_one(np.mean(r))) + eps))
    r = state["update_row_sq"] = b2 * state.get("update_row_sq", 0.0) + (1 - b2) * np.mean(u**2, axis=1, keepdims=True)
    c = state["update_col_sq"] = b2 * state.get("update_col_sq", 0.0) + (1 - b2) * np.mean(u**2, axis=0, keepdims=True)
    return moved(w, at_rms(u / (np.sqrt(r * c / or_one(np.mean(r))) + eps)), g, lr, decay)


def signum(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 1802.04434; the 0.2 is zeta's."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    return moved(w, 0.2 * np.sign(m), g, lr, decay)


def olion(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 2602.01105: as in its authors' code the mixture holds the momentum that has seen this gradient."""
    m = state["exp_avg"] = b2 * state.get("exp_avg", 0.0) + (1 - b2) * g
    u = np.sign(newton_schulz(b1 * m + (1 - b1) * g))
    return moved(w, at_rms(u), g, lr, decay)


def adago(g, state, w, lr, b1, b2, eps, decay, gamma=1.0, floor=0.01):
    """arXiv 2509.02981, with v = 1 at first; zeta's smallest step is a share of lr, and its scale Muon's."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    size = min(np.sqrt(np.sum(g**2)), gamma)
    v_sq = state["v_sq"] = state.get("v_sq", 1.0) + size**2
    u = max(floor, size / np.sqrt(v_sq)) * newton_schulz(m)
    return moved(w, 0.2 * sqrt(max(g.shape)) * u, g, lr, decay)


def dion2(g, state, w, lr, b1, b2, eps, decay, fraction=0.25):
    """arXiv 2512.16928: of the shorter side only the largest lines move, and of the sum only theirs decays."""
    m = state["exp_avg"] = state.get("exp_avg", 0.0) + g
    u = np.zeros(g.shape)
    lines, moves = (m.T, u.T) if g.shape[0] > g.shape[1] else (m, u)  # views
    largest = np.argsort(-np.sum(np.abs(lines), axis=1))[: ceil(fraction * len(lines))]
    moves[largest] = newton_schulz(lines[largest])
    if g.any():  # else nothing moves, and all of it waits
        lines[largest] = b1 * lines[largest]
    return moved(w, 0.2 * sqrt(max(g.shape)) * u, g, lr, decay)


def shampoo(g, state, w, lr, b1, b2, eps, decay, precondition_frequency=10):
    """arXiv 1802.09568, on the momentum, with averages for its sums, a relative floor for its epsilon, roots seldom."""
    if "left" not in state and not g.any():
        return moved(w, 0 * w, g, lr, decay)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    left = state["left"] = b2 * state.get("left", 0.0) + (1 - b2) * g @ g.T
    right = state["right"] = b2 * state.get("right", 0.0) + (1 - b2) * g.T @ g
    past = state.setdefault("past", [])
    if len(past) % precondition_frequency == 0:
        state["roots"] = inverse_fourth_root(left), inverse_fourth_root(right)
    past.append(g)
    return moved(w, at_rms(state["roots"][0] @ m @ state["roots"][1]), g, lr, decay)


def soap(g, state, w, lr, b1, b2, eps, decay, precondition_frequency=10):
    """arXiv 2409.11321: Adam in eigenvectors, at times new, of the factors so far; the first step only gathers them."""
    gathered = "left" in state
    if gathered:
        past = state.setdefault("past", [])
        if len(past) % precondition_frequency == 0:
            state["bases"] = np.linalg.eigh(state["left"])[1], np.linalg.eigh(state["right"])[1]
        past.append(g)
        t, (a, b) = len(past), state["bases"]
        m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
        v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * (a.T @ g @ b) ** 2
        adam = (a.T @ m @ b) / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    if gathered or g.any():
        state["left"] = b2 * state.get("left", 0.0) + (1 - b2) * g @ g.T
        state["right"] = b2 * state.get("right", 0.0) + (1 - b2) * g.T @ g
    return moved(w, a @ adam @ b.T if gathered else 0 * w, g, lr, decay)


def schattor(g, state, w, lr, b1, b2, eps, decay, p=4.0):
    """arXiv 2606.15702, ball form; scaled such that equal singular values give an RMS of 0.2."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u, _ = steepest(m, p)
    return moved(w, 0.2 * sqrt(max(g.shape)) * min(g.shape) ** (1 / p) * u, g, lr, decay)


def schattor_regularised(g, state, w, lr, b1, b2, eps, decay, p=4.0):
    """arXiv 2606.15702, regularised form: the ball's direction times the dual norm."""
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    u, size = steepest(m, p)
    return moved(w, size * u, g, lr, decay)


def adamw(g, state, w, lr, b1, b2, eps, decay):
    """arXiv 1711.05101: of any shape, with its biases corrected; without a gradient it moves on."""
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * g**2
    u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    return w - lr * decay * w - lr * u


def moved(w, u, g, lr, decay):
    return w - lr * decay * w - (lr * u if g.any() else 0.0)


def at_rms(u):
    return 0.2 * u / or_one(np.sqrt(np.mean(u**2)))


def or_one(x):
    """x with ones for zeros: nothing divided by nothing is nothing."""
    return np.where(x == 0, 1.0, x)


def newton_schulz(x):
    """Five steps of Keller Jordan's polynomial on x of norm one."""
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / or_one(np.sqrt(np.sum(y**2)))
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    return y.T if x.shape[0] > x.shape[1] else y


def inverse_fourth_root(a):
    """a^(-1/4) for a symmetric a, whose eigenvalues are taken for at least a millionth of the largest."""
    s, q = np.linalg.eigh(a)
    return q @ np.diag(or_one(np.maximum(s, 1e-6 * s.max())) ** -0.25) @ q.T


def steepest(m, p):
    """(u, |m|_q): u of Schatten-p norm one with the largest <m, u>, which is |m|_q, 1/p + 1/q = 1."""
    a, s, b = np.linalg.svd(m, full_matrices=False)
    s = np.where(s > 1e-6 * s.max(), s, 0.0)  # zeta's: what float32's rounding leaves of zero is no direction
    if p == 1:
        d, size = s == s.max(), s.max()
    else:
        q = 1.0 if p == inf else p / (p - 1)
        size = np.sum(s**q) ** (1 / q)
        d = np.where(s > 0, s, 1.0) ** (q - 1) / or_one(size) ** (q - 1) * (s > 0)
    return a @ np.diag(d * (s > 0)) @ b, size
