"""The Gram-space methods from their formulas, and what their weights must satisfy.

Nothing here imports flatmtl. Two kinds of oracle:

- `..._residual(gram, w, ...) -> Residual`: how far weights are from the optimality conditions of the
  problem with the ridge on the cosine diagonal (G_ii * (1 + ridge)), computed from the weights alone.
- solvers by other means (principal pivoting, quadprog, scipy, numpy.linalg, loops over the gradient
  vectors), for a direct comparison of the weights.

quadprog and scipy are looked for where they are used: a machine with a GPU may lack them.

Sums are in long double (64-bit mantissa), so that an oracle's own rounding stays out of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import oracles
import pytest
from oracles import WIDE, Array


class Residual(NamedTuple):
    """rows: worst |sum of the terms| / sum of |terms| of an equation (inequalities: the violation);
    strict: the same relative to what the equation is about, which cancellation makes harder."""

    rows: float
    strict: float


def scaled(gram: Array, ridge: float = 0.0) -> tuple[Array, Array]:
    """Norms n [T] and the matrix of cosines, clamped, 1 + ridge on the diagonal."""
    g = gram.astype(WIDE)
    n = np.sqrt(np.diag(g))
    c = np.clip((g + g.T) / 2 / np.outer(n, n), -1, 1)
    np.fill_diagonal(c, WIDE(1) + WIDE(ridge))
    return n, c


def backward_error(terms: Array, short_only: Array | bool = False) -> float:
    """Worst row of |sum| / sum |.|; where short_only, only a negative sum counts. 0/0 is 0."""
    total, size = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
    total = np.where(short_only, np.minimum(total, 0), total)
    return float((np.abs(total) / np.where(size > 0, size, 1)).max(initial=0))


def column(vector: Array) -> Array:
    return np.asarray(vector, dtype=WIDE)[:, None]


# ---- optimality from the weights alone -------------------------------------------------------


def mgda_residual(gram: Array, w: Array, ridge: float = 0.0) -> Residual:
    """(Gw)_i >= w'Gw, equal on the support."""
    n, c = scaled(gram, ridge)
    y = n * w
    slope = c @ y  # (Gw)_i / n_i
    value = y @ slope
    terms = np.concatenate([c * y, -column(value / n)], axis=1)
    gap = (value - (n * slope).min()) / value if value > 0 else 0.0
    return Residual(backward_error(terms, w == 0), float(gap))


def fair_residual(
    gram: Array, w: Array, alpha: float, c: Array | float = 1.0, ridge: float = 0.0
) -> Residual:
    """(Gw)_i = (c_i / w_i)^(1/alpha)."""
    if not (w > 0).all():
        return Residual(np.inf, np.inf)
    n, cosine = scaled(gram, ridge)
    right = (np.asarray(c, WIDE) / w.astype(WIDE)) ** (1 / WIDE(alpha)) / n
    terms = np.concatenate([cosine * (n * w), -column(right)], axis=1)
    return Residual(backward_error(terms), float(np.abs(terms.sum(axis=1) / right).max()))


def dual_cone_residual(gram: Array, w: Array, u: Array, ridge: float = 0.0) -> Residual:
    """w >= u, (Gw)_i >= 0, and 0 where w_i > u_i (what is lost in the rounding of u is not seen)."""
    if (w < u * (1 - 1e-14)).any():
        return Residual(np.inf, np.inf)
    n, c = scaled(gram, ridge)
    y = n * w
    held = w > u * (1 + 4e-16)
    slope = c @ y
    wrong = np.where(held, np.abs(slope), np.maximum(-slope, 0)).max()
    length = np.sqrt(y @ slope) if y @ slope > 0 else WIDE(1)
    return Residual(backward_error(c * y, ~held), float(wrong / length))


def imtl_g_residual(gram: Array, w: Array, ridge: float = 0.0) -> Residual:
    """<u_i, d> the same for all i, sum w = 1. Weights of the wrong sign are wrong."""
    n, c = scaled(gram, ridge)
    y = n * w
    slope = c @ y
    level = slope.mean()
    terms = np.concatenate([c * y, np.full((len(w), 1), -level)], axis=1)
    if level < -1e-9 * np.abs(terms).max():
        return Residual(np.inf, np.inf)
    total = abs(w.astype(WIDE).sum() - 1) / np.abs(w).sum()
    strict = np.abs(slope / level - 1).max()
    return Residual(max(backward_error(terms), float(total)), float(strict))


def config_residual(gram: Array, w: Array, p: Array | None = None, ridge: float = 0.0) -> Residual:
    """<u_i, d> proportional to p_i, and d'd = sum_i <g_i, d>."""
    n, c = scaled(gram, ridge)
    p = np.ones(len(w)) if p is None else p
    y = n * w
    slope = c @ y
    level = (slope @ p) / (p @ p)
    terms = np.concatenate([c * y, -column(level * p)], axis=1)
    length = np.concatenate([(np.outer(y, y) * c).ravel(), -(column(n) * c * y).ravel()])
    total = y @ slope
    strict = max(
        np.abs(slope - level * p).max() / abs(level), abs(total - n @ slope) / abs(n @ slope)
    )
    return Residual(max(backward_error(terms), backward_error(length)), float(strict))


def cagrad_residual(gram: Array, w: Array, c: float, ridge: float = 0.0) -> Residual:
    """d = g0 + sum x_i g_i, x >= 0: <g_i, d> >= t, equal where x_i > 0, and ||sum x_i g_i|| = c ||g0||.

    strict: the duality gap F(v) - min_i <g_i, d> at v = x / sum x, relative to ||g0|| times the mean
    norm. (In F, c ||g0|| is ||sum x_i g_i||, so that the gap is one of the direction.)
    """
    tasks = len(w)
    n, cosine = scaled(gram, ridge)
    g = cosine * np.outer(n, n)
    x = w.astype(WIDE) - WIDE(1) / tasks
    if (x < -1e-15).any():
        return Residual(np.inf, np.inf)
    x = np.where(x > 4e-16 / tasks, x, 0)
    plain = scaled(gram)[1] * np.outer(n, n)
    size = WIDE(c) ** 2 * plain.ravel() / tasks**2  # c^2 ||g0||^2, term by term
    length = np.concatenate([(np.outer(x, x) * g).ravel(), -size])
    if c == 0 or not x.any():
        return Residual(backward_error(length), backward_error(length))
    parts = plain / tasks + g * x  # of G x + b
    slope = parts.sum(axis=1)
    level = (x @ slope) / x.sum()
    terms = np.concatenate([parts, np.full((tasks, 1), -level)], axis=1)
    spread = level - slope.min()
    scale = np.sqrt(abs(plain.mean())) * n.mean()
    rows = max(backward_error(terms, x == 0), backward_error(length))
    return Residual(rows, float(spread / scale))


def pcd_scales(
    square: Array, eps: float, beta: float = 0.0, v: Array | None = None, steps: int = 1
):
    """1 / sqrt(vhat_i + eps), v = beta v + (1 - beta) ||g_i||^2 and vhat = v / (1 - beta^steps)."""
    v = (1 - beta) * square + (0 if v is None else beta * v)
    return 1 / np.sqrt(v / (1 - beta**steps) + eps), v


def pcd_residual(gram: Array, w: Array, s: Array, tau: float, ridge: float = 0.0) -> Residual:
    """d ~ s_0 g_0 + sum_j mu_j s_j g_j, <s_j g_j, d> >= tau ||s_j g_j||^2, equal where mu_j > 0,
    and ||sum w_i g_i|| = ||g_0||."""
    n, c = scaled(gram)
    if not w[0] > 0 or (w < 0).any():
        return Residual(np.inf, np.inf)
    y = n * w * (s[0] / w.astype(WIDE)[0])  # of the vector before it is rescaled to ||g_0||
    plain = (np.outer(n * w, n * w) * c).ravel()
    length = np.concatenate([plain, [-(n[0] ** 2)]])
    c[np.arange(1, len(w)), np.arange(1, len(w))] += WIDE(ridge)
    wanted = tau * s * n
    terms = np.concatenate([c * y, -column(wanted)], axis=1)[1:]
    wrong = np.where(w > 0, np.abs(c @ y - wanted), np.maximum(wanted - c @ y, 0))[1:]
    strict = wrong.max(initial=0) / np.sqrt(np.abs(y @ c @ y))
    rows = max(backward_error(terms, w[1:] == 0), backward_error(length))
    return Residual(rows, float(max(strict, abs(length.sum()) / n[0] ** 2)))


# ---- linear algebra in long double -----------------------------------------------------------


def solve(matrix: Array, right: Array) -> Array:
    """Gaussian elimination for a positive definite matrix; needs no pivots."""
    size = len(right)
    a = np.concatenate([matrix, column(right)], axis=1).astype(WIDE)
    for k in range(size):
        a[k + 1 :] -= np.outer(a[k + 1 :, k] / a[k, k], a[k])
    out = np.zeros(size, WIDE)
    for k in reversed(range(size)):
        out[k] = (a[k, size] - a[k, k + 1 : size] @ out[k + 1 :]) / a[k, k]
    return out


def eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors in the columns, by cyclic Jacobi rotations."""
    a = matrix.astype(WIDE)
    size = len(a)
    v = np.eye(size, dtype=WIDE)
    for _ in range(30):
        off = np.abs(a - np.diag(np.diag(a))).max(initial=0)
        if off <= 1e-19 * np.abs(np.diag(a)).max():
            break
        for p in range(size):
            for q in range(p + 1, size):
                if abs(a[p, q]) <= 1e-21 * np.sqrt(abs(a[p, p] * a[q, q])):
                    continue
                theta = (a[q, q] - a[p, p]) / (2 * a[p, q])
                t = (1 if theta >= 0 else -1) / (abs(theta) + np.sqrt(theta * theta + 1))
                cos = 1 / np.sqrt(t * t + 1)
                turn = np.array([[cos, t * cos], [-t * cos, cos]], WIDE)
                a[:, [p, q]] = a[:, [p, q]] @ turn
                a[[p, q]] = turn.T @ a[[p, q]]
                v[:, [p, q]] = v[:, [p, q]] @ turn
    order = np.argsort(np.diag(a))
    return np.diag(a)[order], v[:, order]


def nnqp(matrix: Array, q: Array) -> Array:
    """min 0.5 z'Mz + q'z over z >= 0 by block principal pivoting (Kim and Park's rule)."""
    size = len(q)
    held = q < 0
    best, patience = size + 1, 5
    for _ in range(200 + 50 * size):
        z = np.zeros(size, WIDE)
        if held.any():
            z[held] = solve(matrix[np.ix_(held, held)], -q[held])
        slope = matrix @ z + q
        wrong = np.where(held, z < 0, slope < -1e-16 * (np.abs(matrix) @ np.abs(z) + np.abs(q)))
        count = int(wrong.sum())
        if count == 0:
            return z
        if count < best:
            best, patience = count, 5
        elif patience > 0:
            patience -= 1
        else:  # Murty's rule always ends
            wrong = np.arange(size) == np.flatnonzero(wrong).max()
        held = held ^ wrong
    raise AssertionError("principal pivoting did not end")


# ---- other solvers ---------------------------------------------------------------------------


def mgda(gram: Array, ridge: float = 0.0) -> Array:
    n, c = scaled(gram, ridge)
    b = n.min() / n
    v = nnqp(c, -b) * b
    return (v / v.sum()).astype(np.float64)


def mgda_quadprog(gram: Array) -> Array:
    """On the simplex, in the scaled unknowns y = n w."""
    n, c = scaled(gram)
    tasks = len(n)
    b = (n.min() / n).astype(np.float64)
    sides = np.concatenate([b[:, None], np.eye(tasks)], axis=1)
    bounds = np.append(1.0, np.zeros(tasks))
    quadprog = pytest.importorskip("quadprog")
    y = quadprog.solve_qp(c.astype(np.float64), np.zeros(tasks), sides, bounds, 1)[0]
    w = np.maximum(y, 0) * b
    return w / w.sum()


def mgda_two(gram: Array) -> Array:
    e = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    x = np.clip((gram[1, 1] - gram[0, 1]) / e, 0, 1)
    return np.array([x, 1 - x])


def dual_proj(gram: Array, u: Array, ridge: float = 0.0) -> Array:
    """argmin v'Gv, v >= u."""
    n, c = scaled(gram, ridge)
    return (u + nnqp(c, c @ (n * u)) / n).astype(np.float64)


def dual_proj_quadprog(gram: Array, u: Array) -> Array:
    n, c = scaled(gram)
    scale = float((n * u).max())
    low = (n * u / scale).astype(np.float64)
    quadprog = pytest.importorskip("quadprog")
    y = quadprog.solve_qp(c.astype(np.float64), np.zeros(len(u)), np.eye(len(u)), low)[0]
    return np.maximum((y * scale / n).astype(np.float64), u)


def upgrad(gram: Array, u: Array, ridge: float = 0.0, solver=dual_proj) -> Array:
    """sum_i of the projections of u_i g_i on the dual cone."""
    options = (ridge,) if solver is dual_proj else ()
    return sum(solver(gram, np.where(np.arange(len(u)) == i, u, 0.0), *options)
               for i in range(len(u)))  # fmt: skip


def pcd(gram: Array, s: Array, tau: float, ridge: float = 0.0) -> tuple[Array, float, float]:
    """Weights; ridge * max y / max |b|: above 1e-3 the constraints contradict each other; and
    (||d|| / sum |w_i| n_i)^2: below 1e-14 nothing is left to be rescaled."""
    n, c = scaled(gram, ridge)
    b = tau * s[1:] * n[1:] - c[1:, 0] * s[0] * n[0]
    y = nnqp(c[1:, 1:], -b)
    w = np.append(s[0], y / n[1:])
    c[np.arange(len(n)), np.arange(len(n))] = 1
    square = (n * w) @ c @ (n * w)
    size = np.abs(b).max(initial=0)
    strain = float(ridge * y.max(initial=0) / size) if size > 0 else 0.0
    length = np.sqrt(square) if square > 0 else np.inf
    left = float(square / (n @ w) ** 2)
    return (w * n[0] / length).astype(np.float64), strain, left


def pcd_quadprog(jac: Array, s: Array, tau: float) -> Array:
    """The direction d itself: min 0.5 ||d - s_0 g_0||^2, <s_j g_j, d> >= tau ||s_j g_j||^2."""
    rows = jac * s[:, None]
    tasks, size = jac.shape
    if tasks == 1:
        return jac[0]
    bounds = tau * (rows[1:] ** 2).sum(axis=1)
    quadprog = pytest.importorskip("quadprog")
    d = quadprog.solve_qp(np.eye(size), rows[0], rows[1:].T.copy(), bounds)[0]
    return d * np.linalg.norm(jac[0]) / np.linalg.norm(d)


def fair(gram: Array, alpha: float, c: Array | float = 1.0, ridge: float = 0.0) -> Array:
    """(Gw)_i = (c_i / w_i)^(1/alpha): Newton on the convex 0.5 w'Gw - sum_i psi_i(w_i), psi' the right.

    In y = n w the matrix is that of cosines; damped so that y stays positive and the merit falls.
    """
    n, cosine = scaled(gram, ridge)
    p = 1 / WIDE(alpha)
    k = (np.asarray(c, WIDE) * n) ** p / n  # the equations are (C y)_i = k_i y_i^-p
    y = (k / (1 + WIDE(ridge))) ** (1 / (1 + p)) * np.ones(len(n), WIDE)

    def value(y: Array) -> WIDE:
        psi = np.log(y) if p == 1 else y ** (1 - p) / (1 - p)
        return y @ cosine @ y / 2 - (k * psi).sum()

    for _ in range(2000):
        slope = cosine @ y - k * y**-p
        hessian = cosine + np.diag(p * k * y ** (-p - 1))
        scale = 1 / np.sqrt(np.diag(hessian))
        step = -scale * solve(hessian * np.outer(scale, scale), slope * scale)
        decrement = -(slope @ step)
        down = step < 0
        length = min(WIDE(1), 0.9 * (-y[down] / step[down]).min(initial=WIDE(4)))
        now = value(y)
        for _ in range(60):
            if decrement < 1e-12 * abs(now):  # too near for the values to tell
                break
            if value(y + length * step) <= now - 0.1 * length * decrement:
                break
            length /= 2
        y = y + length * step
        if np.abs(step / y).max() < 1e-17:
            break
    return (y / n).astype(np.float64)


def fair_scipy(gram: Array, alpha: float, c: Array | float = 1.0) -> Array:
    """Root finding in log w, on the problem in y = n w."""
    n, cosine = (x.astype(np.float64) for x in scaled(gram))
    k = (c * n) ** (1 / alpha) / n

    def equations(v: Array) -> Array:
        return cosine @ np.exp(v) / (k * np.exp(-v / alpha)) - 1

    start = np.log(fair(gram, alpha, c) * n) + 0.01 * np.cos(np.arange(len(n)))
    optimize = pytest.importorskip("scipy.optimize")
    found = optimize.root(equations, start, method="hybr", options={"xtol": 1e-15})
    return np.exp(found.x) / n


def cagrad_dual_value(gram: Array, v: Array, c: float) -> float:
    """F(v) = g_v'g0 + c ||g0|| ||g_v||, which is above max_d min_i <g_i, d> for every v."""
    return float(v @ gram.mean(axis=1) + c * np.sqrt(gram.mean() * (v @ gram @ v)))


def cagrad(jac: Array, c: float) -> Array:
    """Weights; the gradients themselves are at hand.

    At the optimum v minimises ||g_v + g0 / m|| over the simplex, with m ||g_v|| = c ||g0||: MGDA of
    the shifted gradients g_i + g0 / m, and a scalar root in log m.
    """
    jac = jac.astype(WIDE)
    g0 = jac.mean(axis=0)
    radius = c * np.sqrt(g0 @ g0)

    def at(log_m: float) -> tuple[Array, WIDE]:
        v = mgda(oracles.gram(jac + g0 / np.exp(WIDE(log_m)))).astype(WIDE)
        return v, np.exp(WIDE(log_m)) * np.sqrt(((v @ jac) ** 2).sum())

    def excess(log_m: float) -> float:
        return float(np.log(at(log_m)[1] / radius))

    low = high = float(np.log(c))  # far from the root the shift hides the differences of the g_i
    while excess(high) < 0:
        high += 1
    while excess(low) > 0:
        low -= 1
    optimize = pytest.importorskip("scipy.optimize")
    v, _ = at(optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
    return (1 / WIDE(len(jac)) + radius * v / np.sqrt(((v @ jac) ** 2).sum())).astype(np.float64)


def cagrad_two(gram: Array, c: float) -> Array:
    """T = 2 in closed form: the weights."""
    g11, g12, g22 = gram[0, 0], gram[0, 1], gram[1, 1]
    e, k = g11 + g22 - 2 * g12, c * np.sqrt(gram.mean())
    q = (g11 - g22) / (2 * k)
    h = np.sqrt(max(g11 * g22 - g12**2, 0) / e)
    if e > q**2:
        y = -q * h / np.sqrt(e - q**2)
        x = np.clip((y * np.sqrt(e) - (g12 - g22)) / e, 0, 1)
    else:
        x = 0.0 if g11 > g22 else 1.0
    v = np.array([x, 1 - x])
    return 0.5 + k * v / np.sqrt(v @ gram @ v)


def imtl_g(gram: Array) -> Array:
    n = np.sqrt(np.diag(gram))
    y = np.linalg.pinv(gram / np.outer(n, n)) @ np.ones(len(n))
    return y / n / (y / n).sum()


def imtl_g_paper(jac: Array) -> Array:
    """alpha_2:T = g1 U' (D U')^-1, D_t = g1 - g_t, U_t = u1 - u_t, alpha_1 = 1 - the others."""
    u = jac / oracles.row_norms(jac)[:, None]
    d, u = jac[0] - jac[1:], u[0] - u[1:]
    rest = np.linalg.solve((d @ u.T).T, u @ jac[0])
    return np.append(1 - rest.sum(), rest)


def config(jac: Array, p: Array | None = None) -> Array:
    """The direction d: pinv(U) p, as long as the gradients' projections on it together."""
    u = jac / oracles.row_norms(jac)[:, None]
    best = np.linalg.pinv(u) @ (np.ones(len(jac)) if p is None else p)
    best = best / np.linalg.norm(best)
    return (jac @ best).sum() * best


def aligned(
    gram: Array,
    scale_mode: int = 0,
    tolerance: float = 2.0**-23,
    p: Array | None = None,
    eigh=eigen,
) -> tuple[Array, float, float]:
    """Weights; the condition of what is kept; how close an eigenvalue is to the limit (relative)."""
    tasks = len(gram)
    largest = np.abs(gram).max()  # the weights do not depend on the scale; eigh's errors might
    values, vectors = eigh((gram + gram.T) / 2 / largest)
    limit = values.max() * tasks * WIDE(tolerance)
    keep = values > limit
    kept, v = values[keep], vectors[:, keep]
    size = [kept.min(), np.sort(kept)[(len(kept) - 1) // 2], kept.mean()][scale_mode]
    p = np.ones(tasks) if p is None else p
    w = v @ (np.sqrt(size / kept) * (v.T @ p))
    nearest = np.abs(values / limit - 1).min()
    return w.astype(np.float64), float(kept.max() / kept.min()), float(nearest)


def gradvac(
    jac: Array, order: Array, target: Array, beta: float, eps: float
) -> tuple[Array, Array]:
    """On the gradient vectors: (sum of the moved gradients, new targets). eps has no dimension."""
    norms = oracles.row_norms(jac)
    active = [bool(np.isfinite(g).all() and (g != 0).any()) for g in jac]
    target, total = target.copy(), np.zeros(jac.shape[1])
    for i in range(len(jac)):
        if not active[i]:
            continue
        v = jac[i].copy()
        for j in order[i]:
            if j == i or not active[j]:
                continue
            length, h = np.sqrt(v @ v), target[i, j]
            phi = float(np.clip(v @ jac[j] / (length * norms[j]), -1, 1)) if length > 0 else 0.0
            if phi < h:
                wide = np.sqrt(1 - h * h)
                move = (h * np.sqrt(1 - phi * phi) - phi * wide) / (wide + eps)
                v = v + length / norms[j] * move * jac[j]
            target[i, j] = (1 - beta) * h + beta * phi
        total = total + v
    return total, target


def krum(jac: Array, byzantine: int, selected: int) -> Array:
    """The means of distances between vectors, one by one; rows that are zero or not finite are out."""
    active = [i for i, g in enumerate(jac) if np.isfinite(g).all() and (g != 0).any()]
    near = max(1, len(active) - byzantine - 2)
    scores = []
    for i in active:
        distances = sorted(float(np.linalg.norm(jac[i] - jac[j])) for j in active if j != i)
        scores.append((sum(distances[:near]), i))
    w = np.zeros(len(jac))
    best = [i for _, i in sorted(scores)[:selected]]
    w[best] = 1 / len(best)
    return w


def simplex(v: Array) -> Array:
    """The nearest point of the simplex: max(v - s, 0) with the shift s found by bisection."""
    low, high = WIDE(v.min() - 1), WIDE(v.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    out = np.maximum(v - low, 0)
    return (out / out.sum()).astype(np.float64)


def sdmgrad(
    a: Array,
    w: Array,
    lr: float,
    momentum: float,
    steps: int,
    lambda_: float,
    q: Array | None = None,
) -> tuple[Array, Array]:
    """(output, new state)."""
    q = np.full(len(w), 1 / len(w)) if q is None else q
    s = np.sqrt(np.maximum(np.diag(a), 0)).mean()
    a = a / s**2 if s > 0 else a
    v = np.zeros(len(w))
    for _ in range(steps):
        v = momentum * v + a @ (w + lambda_ * q)
        w = simplex(w - lr * v)
    return (w + lambda_ * q) / (1 + lambda_), w


def modo(a: Array, w: Array, gamma: float, rho: float) -> Array:
    return simplex(w - gamma * (a @ w + rho * w))


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max())
    return e / e.sum()


def pivrg_preference(scores: Array, bound: float = 2.0, min_temperature: float = 10.0) -> Array:
    temperature = max((scores.max() - scores.min()) / np.log(bound), min_temperature)
    return len(scores) * softmax(scores / temperature)


def normal(seed: int, step: int, tasks: int, batch: int) -> Array:
    """Box-Muller on Philox words: element (b, i) from the counter (0, i, b, step)."""
    mask = 0xFFFFFFFF
    key = [(seed & mask) ^ 0x7F4A7C15, ((seed >> 32) & mask) ^ ((step >> 32) & mask) ^ 0x9E3779B9]
    out = np.zeros((batch, tasks))
    for b in range(batch):
        for i in range(tasks):
            w = oracles.philox4x32_10([0, i, b, step & mask], key)
            u1 = (w[0] * 2**21 + (w[1] >> 11) + 0.5) / 2.0**53
            u2 = (w[2] * 2**21 + (w[3] >> 11)) / 2.0**53
            out[b, i] = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
    return out


def scale_weights(jac: Array, w: Array, scaling: str, max_norm: float | None = None) -> Array:
    if scaling != "raw":
        total, size = w.sum(), np.abs(w).sum()
        total = total if total > 1e-12 * size else size
        w = w / (total if total > 0 else 1) * (1 if scaling == "sum_to_one" else len(w))
    length = np.linalg.norm(w @ jac)
    return w * (max_norm / length) if max_norm is not None and length > max_norm else w


# ---- known weights ---------------------------------------------------------------------------

GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1]])
KNOWN: Sequence[tuple[str, dict, list[float], list[float]]] = [  # weighting.md section 10: w, d
    ("mean", {}, [0.5, 0.5], [1, 1, 1]),
    ("mgda", {}, [0.6, 0.4], [0, 1, 1]),
    ("nash_mtl", {"max_norm": None}, [0.591461, 0.407071], [0.076584, 0.998533, 0.998533]),
    ("fairgrad", {"alpha": 1.0}, [0.591461, 0.407071], [0.076584, 0.998533, 0.998533]),
    ("nash_mtl", {}, [0.418226, 0.287842], [0.0542, 0.7061, 0.7061]),
    ("fairgrad", {}, [0.471363, 0.319454], [0.031274, 0.790817, 0.790817]),
    ("imtl_g", {}, [0.592330, 0.407670], [0.076697, 1, 1]),
    ("pcgrad", {}, [2.222222, 1.578947], [0.584795, 3.801170, 3.801170]),
    ("gradvac", {}, [2.222222, 1.578947], [0.584795, 3.801170, 3.801170]),
    ("upgrad", {}, [1.111111, 0.789474], [0.292398, 1.900585, 1.900585]),
    ("dualproj", {}, [0.611111, 0.5], [0.555556, 1.111111, 1.111111]),
    ("cagrad", {"c": 0.5}, [0.704124, 0.5], [0.183503, 1.204124, 1.204124]),
    ("cagrad", {"c": 0.4, "rescale": 1}, [0.571810, 0.431034], [0.298968, 1.002844, 1.002844]),
    ("aligned_mtl", {}, [1.118144, 0.816522], [0.426558, 1.934666, 1.934666]),
]
