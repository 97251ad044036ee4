"""How far given weights are from the solution of a method: one independent measure a method, in numpy.

Everything is computed in float64 on the raw Gram matrix, without a ridge, from what the method's paper asks
for, and knows nothing of flatmtl's solvers: the measures are the same for everyone. Weights are judged in
the scale of the paper's formula; the entrants undo a rescaling of their own before (bench/peers.py).

0 is exact; above ``FAILED`` counts as a failure; infinity: not finite, or not in the method's domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Judge = Callable[[Array], float]  # weights [T] -> residual

FAILED = 1e-3


# ---------------------------------------------------------------- an oracle of quadratic programs


def dual_cone(gram: Array, lower: Array) -> Array:
    """Columns v_k: argmin v'Gv subject to v >= lower_k, for the columns of ``lower`` [T, K]; K programs.

    Principal pivoting on all violated signs at once, and on the last one alone where that has cycled
    (which ends for every positive definite G). The solution's optimality is checked.
    """
    scale = np.sqrt(np.diag(gram))
    cosine, base = gram / np.outer(scale, scale), lower * scale[:, None]
    offset = cosine @ base  # y = z n >= 0, C y + offset >= 0, complementary
    tasks, programs = base.shape
    passive = np.zeros((programs, tasks), bool)
    fewest, patience = np.full(programs, tasks + 1), np.full(programs, 3)
    eye = np.eye(tasks)
    tolerance = 1e-13 * np.abs(cosine).sum(1) * np.abs(base).max()
    for _ in range(100 * tasks):
        both = passive[:, :, None] & passive[:, None, :]
        y = np.linalg.solve(
            np.where(both, cosine, eye), np.where(passive, -offset.T, 0)[..., None]
        )[..., 0]
        slack = y @ cosine + offset.T
        wrong = np.where(passive, y < -tolerance, slack < -tolerance)
        count = wrong.sum(1)
        if not count.any():
            break
        better = count < fewest
        fewest, patience = np.where(better, count, fewest), np.where(better, 3, patience - 1)
        last = tasks - 1 - np.argmax(wrong[:, ::-1], axis=1)
        single = np.zeros_like(wrong)
        single[np.arange(programs), last] = True
        passive ^= wrong & np.where((patience > 0)[:, None], True, single)
    else:
        raise ArithmeticError("the oracle's quadratic program did not end")
    return lower + (np.maximum(y, 0) / scale).T


# ---------------------------------------------------------------- the measures


def _distance(gram: Array, exact: Array) -> Judge:
    """|d - d*| / |d*| between the updates."""
    length = math.sqrt(exact @ gram @ exact)

    def judge(w: Array) -> float:
        off = w - exact
        return math.sqrt(max(off @ gram @ off, 0.0)) / length

    return judge


def _mgda(gram: Array) -> Judge:
    def judge(w: Array) -> float:
        # the Frank-Wolfe gap bounds the excess of |d|^2 over its minimum; both relative to |d|^2
        projections = gram @ w
        gap = (w @ projections - projections.min()) / (w @ projections)
        return max(gap, -w.min(), abs(w.sum() - 1))

    return judge


def _alpha_fair(alpha: float) -> Callable[[Array], Judge]:
    def of_gram(gram: Array) -> Judge:
        def judge(w: Array) -> float:
            if not (w > 0).all():
                return math.inf
            return float(np.abs((gram @ w) * w ** (1 / alpha) - 1).max())

        return judge

    return of_gram


def _cagrad(c: float) -> Callable[[Array], Judge]:
    def of_gram(gram: Array) -> Judge:
        tasks = len(gram)
        toward = gram.mean(1)  # <g_i, g0>
        radius = c * math.sqrt(gram.mean())

        def judge(w: Array) -> float:
            x = w - 1 / tasks
            outside = math.sqrt(max(x @ gram @ x, 0.0)) / radius - 1
            share = np.maximum(x, 0)
            share = share / share.sum() if share.any() else np.full(tasks, 1 / tasks)
            terms = share @ toward, radius * math.sqrt(share @ gram @ share)
            gap = (sum(terms) - (gram @ w).min()) / (abs(terms[0]) + terms[1])
            return max(gap, outside)

        return judge

    return of_gram


def _spread(gram: Array) -> Judge:
    norms = np.sqrt(np.diag(gram))

    def judge(w: Array) -> float:
        projections = (gram @ w) / norms
        return float(np.ptp(projections) / np.abs(projections).max())

    return judge


def _imtl_g(gram: Array) -> Judge:
    spread = _spread(gram)
    return lambda w: max(spread(w), abs(w.sum() - 1))


def _config(gram: Array) -> Judge:
    spread = _spread(gram)

    def judge(w: Array) -> float:
        # |d| is the sum of the projections of the gradients on d
        square = w @ gram @ w
        return max(spread(w), abs((gram @ w).sum() / square - 1))

    return judge


def _upgrad(gram: Array) -> Judge:
    tasks = len(gram)
    return _distance(gram, dual_cone(gram, np.eye(tasks) / tasks).sum(1))


def _dualproj(gram: Array) -> Judge:
    tasks = len(gram)
    return _distance(gram, dual_cone(gram, np.full((tasks, 1), 1 / tasks))[:, 0])


def _aligned(gram: Array) -> Judge:
    values, vectors = np.linalg.eigh(gram)
    return _distance(gram, math.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.sum(0))


def _pcd(tau: float = 0.02, eps: float = 1e-8) -> Callable[[Array], Judge]:
    def of_gram(gram: Array) -> Judge:
        # the first call: the average of the squared norms is the squared norms
        scales = 1 / np.sqrt(np.diag(gram) + eps)
        scaled = gram * np.outer(scales, scales)
        # min |d - g_0|^2 with <g_j, d> >= tau |g_j|^2: multipliers mu >= 0 of the rows 1, 2, ...
        secondary, asked = scaled[1:, 1:], tau * np.diag(scaled)[1:] - scaled[1:, 0]
        inverse = np.linalg.solve(
            secondary, asked
        )  # dual_cone's program in z: z >= 0, S z - b >= 0
        multipliers = dual_cone(secondary, -inverse[:, None])[:, 0] + inverse
        raw = scales * np.concatenate([[1.0], multipliers])
        return _distance(gram, raw * math.sqrt(gram[0, 0] / (raw @ gram @ raw)))

    return of_gram


def _krum(byzantine: int, selected: int) -> Callable[[Array], Judge]:
    def of_gram(gram: Array) -> Judge:
        square = np.diag(gram)
        distances = np.sqrt(np.maximum(square[:, None] + square - 2 * gram, 0))
        np.fill_diagonal(distances, math.inf)
        nearest = np.sort(distances, 1)[:, : len(gram) - byzantine - 2]
        best = np.argsort(nearest.sum(1), kind="stable")[:selected]
        exact = np.zeros(len(gram))
        exact[best] = 1 / selected
        return _distance(gram, exact)

    return of_gram


#: What the residual of each method is, for the report.
MEANING = {
    "mgda": "relative Frank-Wolfe gap",
    "nash_mtl": "max of |(Gw)ᵢ wᵢ - 1|",
    "fairgrad": "max of |(Gw)ᵢ wᵢ^(1/α) - 1|, α = 2",
    "pivrg": "as FairGrad (equal scores)",
    "cagrad": "relative duality gap, or how far d is outside the ball; c = 0.4",
    "upgrad": "distance of d from the exact solution, relative",
    "dualproj": "distance of d from the exact solution, relative",
    "imtl_g": "spread of the projections, relative",
    "config": "spread of the projections, relative",
    "aligned_mtl": "distance of d from the exact solution, relative",
    "pcd": "distance of d from the exact solution, relative (first call)",
    "krum": "distance of d from the selection's, relative",
}

_JUDGES: dict[str, Callable[[Array], Judge]] = {
    "mgda": _mgda,
    "nash_mtl": _alpha_fair(1.0),
    "fairgrad": _alpha_fair(2.0),
    "pivrg": _alpha_fair(2.0),
    "cagrad": _cagrad(0.4),
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "imtl_g": _imtl_g,
    "config": _config,
    "aligned_mtl": _aligned,
    "pcd": _pcd(),
    "krum": _krum(0, 1),
}


def judge(name: str, gram: Array) -> Judge:
    """The measure of one method of ``MEANING`` on one problem."""
    return _guarded(_JUDGES[name](gram))


def _guarded(inner: Judge) -> Judge:
    def guarded(weights: Array) -> float:
        if not np.isfinite(weights).all():
            return math.inf
        value = inner(weights)
        return value if math.isfinite(value) else math.inf

    return guarded
