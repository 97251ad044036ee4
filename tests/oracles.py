"""The formulas, written out in numpy float64 (or wider). Nothing here imports flatmtl.

Arrays: jac J [T, P] of task gradients g_i, gram G = J J^T [T, T], weights w [T].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
WIDE = np.longdouble  # 64-bit mantissa on x86: an honest reference for float64 rows


# ---- ops -------------------------------------------------------------------------------------


def gram(jac: Array) -> Array:
    """G_ij = <g_i, g_j>, in the dtype of jac."""
    if jac.dtype == WIDE:  # no BLAS for it: one row against all, in place of T*T dot products
        return np.stack([(jac * row).sum(axis=1) for row in jac]) if len(jac) else jac @ jac.T
    return jac @ jac.T


def row_norms(jac: Array) -> Array:
    return np.sqrt((jac * jac).sum(axis=1))


def combine(jac: Array, weights: Array) -> Array:
    """sum_i w_i g_i; a row whose weight is zero is left out even if it holds NaN."""
    out = np.zeros(jac.shape[1], dtype=jac.dtype)
    for row, weight in zip(jac, weights):
        if weight != 0:
            out = out + weight * row
    return out


def combine_flat(jac: Array, a: Array, sam: Array, b: Array) -> Array:
    """sum_i a_i g_i + b_i (s_i - g_i)."""
    out = np.zeros(jac.shape[1], dtype=jac.dtype)
    for g, a_i, s, b_i in zip(jac, a, sam, b):
        if a_i != 0:
            out = out + a_i * g
        if b_i != 0:
            out = out + b_i * (s - g)
    return out


def project(jac: Array, coefficients: Array) -> Array:
    if not len(coefficients):
        return np.zeros((0, jac.shape[1]), dtype=jac.dtype)
    return np.stack([combine(jac, row) for row in coefficients])


def affinity(gram_: Array, losses: Array, lr: float) -> Array:
    """Z[j, i] = lr G_ij / L_j: what a step on task i does to the loss of task j, first order."""
    tasks = len(losses)
    z = np.full((tasks, tasks), np.nan)
    for j in range(tasks):
        if losses[j] > 0 and np.isfinite(losses[j]):
            for i in range(tasks):
                z[j, i] = lr * gram_[i, j] / losses[j]
    return z


# dtype: bits of the mantissa with the leading one, exponent of the smallest step, largest value
FORMATS = {
    "float64": (53, -1074, np.finfo(np.float64).max),
    "float32": (24, -149, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": (8, -133, (2 - 2.0**-7) * 2.0**127),
    "float16": (11, -24, (2 - 2.0**-10) * 2.0**15),
}


def rounded(x: Array, dtype: str) -> Array:
    """float64 x to the nearest value of a format, ties to even, beyond the largest to infinity."""
    bits, lowest, largest = FORMATS[dtype]
    finite = np.where(np.isfinite(x), x, 0.0)
    _, exponent = np.frexp(finite)  # 2^(exponent - 1) <= |x| < 2^exponent
    step = np.ldexp(1.0, np.maximum(exponent - bits, lowest))
    near = np.rint(finite / step) * step if dtype != "float64" else finite
    near = np.where(np.abs(near) > largest, np.copysign(np.inf, near), near)
    return np.where(np.isfinite(x), np.copysign(near, x), x)


def pack(
    row: Array,
    grads: Sequence[Array],
    offsets: Sequence[int],
    dtype: str = "float64",
    accumulate: bool = False,
) -> Array:
    """The gradients, flattened, at their offsets, zero everywhere else, in the row's dtype.

    accumulate: row + the gradients, a float32 sum (float64 for such rows) rounded to the row's dtype;
    the row itself everywhere else.
    """
    out = row.copy() if accumulate else np.zeros_like(row)
    for grad, offset in zip(grads, offsets):
        part = slice(offset, offset + grad.size)
        new = grad.reshape(-1)
        if accumulate:
            new = rounded(row[part] + new, "float64" if dtype == "float64" else "float32")
        out[part] = rounded(new, dtype)
    return out


def adaptive_sq_norm(saved: Array, row: Array, eta: float) -> float:
    return (((np.abs(saved) + eta) * row) ** 2).sum()


def perturb(saved: Array, row: Array, sq_norm: float, rho: float) -> Array:
    """SAM: theta + rho g / ||g||; theta where the norm is zero or not finite."""
    if not np.isfinite(sq_norm) or sq_norm == 0:
        return saved.copy()
    return saved + rho / np.sqrt(sq_norm) * row


def perturb_adaptive(saved: Array, row: Array, sq_norm: float, rho: float, eta: float) -> Array:
    """ASAM: theta + rho (|theta| + eta)^2 g / || (|theta| + eta) g ||."""
    if not np.isfinite(sq_norm) or sq_norm == 0:
        return saved.copy()
    return saved + rho / np.sqrt(sq_norm) * (np.abs(saved) + eta) ** 2 * row


# ---- solvers ---------------------------------------------------------------------------------


def pcgrad_rows(jac: Array, order: Array) -> Array:
    """The projected gradients [T, P], by projecting the gradient vectors themselves.

    For every i, and every j != i in the order given: if <v_i, g_j> < 0, v_i loses its part along
    g_j. Rows that are zero or not finite take no part and come out as zero.
    """
    active = [bool(np.isfinite(g).all() and (g != 0).any()) for g in jac]
    rows = np.zeros_like(jac)
    for i in range(len(jac)):
        if not active[i]:
            continue
        v = jac[i].copy()
        for j in order[i]:
            if j == i or not active[j]:
                continue
            dot = v @ jac[j]
            if dot < 0:
                v = v - dot / (jac[j] @ jac[j]) * jac[j]
        rows[i] = v
    return rows


def pcgrad(jac: Array, order: Array) -> Array:
    return pcgrad_rows(jac, order).sum(axis=0)


def mgda_enumerate(gram_: Array) -> tuple[Array, float]:
    """Minimum of w'Gw over the simplex by trying every support (T <= 10): (w, w'Gw).

    On a support S the optimum solves [G 1; 1' 0] [w; -m] = [0; 1], here with w = y / n so that
    G becomes the matrix of cosines. The best feasible candidate is the optimum.
    """
    tasks = len(gram_)
    norms = np.sqrt(np.diag(gram_))
    cosines = gram_ / np.outer(norms, norms)
    best, best_value = None, np.inf
    for size in range(1, tasks + 1):
        for support in itertools.combinations(range(tasks), size):
            s = list(support)
            u = norms[s].min() / norms[s]  # 1 / n, kept near 1
            kkt = np.block([[cosines[np.ix_(s, s)], u[:, None]], [u[None, :], np.zeros((1, 1))]])
            right = np.append(np.zeros(size), 1.0)
            v = np.linalg.lstsq(kkt, right, rcond=1e-14)[0][:size] * u
            if not np.isfinite(v).all() or (v < -1e-9 * np.abs(v).max()).any() or v.sum() <= 0:
                continue
            w = np.zeros(tasks)
            w[s] = np.maximum(v, 0) / np.maximum(v, 0).sum()
            value = w @ gram_ @ w
            if value < best_value:
                best, best_value = w, value
    assert best is not None
    return best, best_value


def mgda_frank_wolfe(gram_: Array, steps: int) -> tuple[Array, float]:
    """The same minimum by Frank-Wolfe with away steps, for problems too large to enumerate."""
    tasks = len(gram_)
    w = np.zeros(tasks)
    w[np.argmin(np.diag(gram_))] = 1.0
    for _ in range(steps):
        slope = gram_ @ w
        value = w @ slope
        toward = int(np.argmin(slope))
        held = np.flatnonzero(w > 0)
        away = int(held[np.argmax(slope[held])])
        if value - slope[toward] >= slope[away] - value:
            step, limit = -w, 1.0
            step[toward] += 1.0
        else:
            step, limit = w.copy(), w[away] / max(1 - w[away], 1e-300)
            step[away] -= 1.0
        curvature = step @ gram_ @ step
        if curvature <= 0:
            break
        length = min(limit, max(0.0, -(slope @ step) / curvature))
        w = np.maximum(w + length * step, 0)
        if length == limit and limit != 1.0:
            w[away] = 0.0
        w /= w.sum()
    return w, w @ gram_ @ w


def mgda_gap(gram_: Array, w: Array) -> float:
    """(w'Gw - min_i (Gw)_i) / w'Gw: zero at the optimum, and twice it bounds the excess."""
    slope = gram_ @ w
    value = w @ slope
    return (value - slope.min()) / value if value > 0 else 0.0


# ---- random numbers --------------------------------------------------------------------------


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32 with ten rounds (Salmon et al., SC 2011), on Python integers."""
    mask = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


PHILOX_KNOWN = [  # (counter, key, output), the published known-answer vectors
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


# ---- training on quadratics ------------------------------------------------------------------

Aggregate = Callable[[Array], Array]


def mean(jac: Array) -> Array:
    return jac.mean(axis=0)


def pcgrad_sum(order: Array) -> Aggregate:
    return lambda jac: pcgrad(jac, order)


def mgda(jac: Array) -> Array:
    """The min-norm point of the gradients that are not zero."""
    norms = row_norms(jac)
    active = np.flatnonzero(norms > 0)
    if not len(active):
        return np.zeros(jac.shape[1])
    w, _ = mgda_enumerate(gram(jac[active]))
    return combine(jac[active], w)


class Quadratic:
    """L = 0.5 || A x - b ||^2 with x = (shared, head)."""

    def __init__(self, a: Array, b: Array) -> None:
        self.a, self.b = a, b

    def loss(self, x: Array) -> float:
        return 0.5 * ((self.a @ x - self.b) ** 2).sum()

    def gradient(self, x: Array) -> Array:
        return self.a.T @ (self.a @ x - self.b)


def ascend(x: Array, g: Array, rho: float, adaptive: bool = False, eta: float = 0.0) -> Array:
    """x + eps for one block of parameters with its own norm."""
    if adaptive:
        return perturb_adaptive(x, g, adaptive_sq_norm(x, g, eta), rho, eta)
    return perturb(x, g, (g * g).sum(), rho)


def fs_mtl_gradients(
    tasks: Sequence[Quadratic],
    shared: Array,
    heads: Sequence[Array],
    aggregate: Aggregate,
    rho: float | None,
    rho_head: float | None = None,
    adaptive: bool = False,
    eta: float = 0.0,
) -> tuple[Array, list[Array]]:
    """One decomposed FS-MTL step: (shared gradient, head gradients).

    d = aggregate(losses) + aggregate(flats), each head its own SAM gradient. The norms of the
    shared part and of the own head are separate. rho None: no sharpness.
    """
    n = len(shared)
    clean = [q.gradient(np.concatenate([shared, h])) for q, h in zip(tasks, heads)]
    g = np.stack([c[:n] for c in clean])
    if rho is None:
        return aggregate(g), [c[n:] for c in clean]
    rho_head = rho if rho_head is None else rho_head
    perturbed = [
        q.gradient(
            np.concatenate(
                [
                    ascend(shared, c[:n], rho, adaptive, eta),
                    ascend(h, c[n:], rho_head, adaptive, eta),
                ]
            )
        )
        for q, h, c in zip(tasks, heads, clean)
    ]
    s = np.stack([p[:n] for p in perturbed])
    return aggregate(g) + aggregate(s - g), [p[n:] for p in perturbed]


def sam_step(task: Quadratic, x: Array, rho: float, lr: float) -> Array:
    """Plain SAM with SGD, one norm over all parameters: the step of davda54/sam."""
    g = task.gradient(x)
    return x - lr * task.gradient(x + rho * g / np.linalg.norm(g))
