"""CAGrad: the best worst descent within a ball around the mean gradient.

For a value t of the inner minimum, the nearest d to g0 with <g_i, d> >= t is g0 + sum_i x_i g_i, where
G x + b >= t, x >= 0, complementary: a non-negative QP. Its distance ||x||_G grows from 0 at t = min b,
convexly, and the solution is where it is K. On a fixed support its square is a parabola in t, so that
one step from the right support is exact (csrc/solvers/cagrad.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops._status import FALLBACK
from flatmtl.ops.reference_solvers._nnqp import nnqp, passive_solve
from flatmtl.ops.reference_solvers._problem import (
    TOLERANCE,
    Attempt,
    backward_error,
    conclude,
    either_rank,
    largest,
    mapped,
    open_gram,
    ratio,
    settled,
    with_rising_ridge,
)

_ROUNDS = 60


def _on_the_sphere(
    cosine: Tensor, u: Tensor, beta: Tensor, active: Tensor, low: Tensor, high: Tensor
) -> Attempt:
    """y of C y + beta >= t u, y >= 0, complementary, y'Cy = 1, with t in [low, high] [B, 1].

    u, beta: [B, T].
    """
    t = high
    best = Attempt(torch.zeros_like(u), torch.full_like(t[:, 0], torch.inf), t[:, 0] < -torch.inf)
    for _ in range(_ROUNDS):
        start = nnqp(cosine, t * u - beta, active)
        y, passive = start.y, start.y > 0
        excess = (y * mapped(cosine, y)).sum(1, keepdim=True) - 1
        high, low = torch.where(excess >= 0, t, high), torch.where(excess >= 0, low, t)
        # ||y + s p||^2 = ||y||^2 + 2 slope s + curvature s^2 on this support: the larger root
        p, _ = passive_solve(cosine, u, passive)
        slope, curvature = (u * y).sum(1, keepdim=True), (u * p).sum(1, keepdim=True)
        under = slope.square() - curvature * excess
        reach = slope + under.clamp(min=0).sqrt()
        step = torch.where((under >= 0) & (reach > 0), -ratio(excess, reach), torch.inf)
        inside = (t + step >= low) & (t + step <= high)
        step = torch.where(inside, step, 0.0)
        y = (y + step * p).clamp(min=0)
        found = _judged(cosine, u, beta, active, y, t + step, start.sound)
        better = found.residual < best.residual
        best = Attempt(
            torch.where(better.unsqueeze(1), found.solution, best.solution),
            torch.where(better, found.residual, best.residual),
            torch.where(better, found.sound, best.sound),
        )
        if settled(best.residual <= 1e-14):
            break
        t = torch.where(inside & (step != 0), t + step, 0.5 * (low + high))
    return best


def _judged(
    cosine: Tensor, u: Tensor, beta: Tensor, active: Tensor, y: Tensor, t: Tensor, sound: Tensor
) -> Attempt:
    terms = cosine * y.unsqueeze(1)
    rows = terms.sum(2) + beta - t * u
    size = terms.abs().sum(2) + beta.abs() + (t * u).abs()
    rows = torch.where(active & ((y > 0) | (rows < 0)), rows, 0.0)
    residual = largest(backward_error(rows, size))
    square, around = (y * terms.sum(2)).sum(1), (y * terms.abs().sum(2)).sum(1)
    residual = torch.maximum(residual, backward_error(square - 1, around + 1))
    return Attempt(y, residual, sound & (residual <= TOLERANCE))


@either_rank()
def solve_cagrad(
    gram: Tensor, c: float, rescale: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    active, tasks = problem.active, problem.tasks
    some = active.any(1, keepdim=True)
    least = torch.where(active, problem.norm, torch.inf).amin(1, keepdim=True)
    least = torch.where(some, least, 1.0)
    mean = problem.norm.sum(1, keepdim=True) / tasks
    # <g_i, g0> / n_i, and ||g0||; norms relative to their mean
    relative = ratio(problem.norm, mean)
    along = torch.where(active, mapped(problem.cosine, relative), 0.0) / tasks
    g0 = (relative * along).sum(1, keepdim=True).clamp(min=0).div(tasks).sqrt()
    radius = c * g0  # K
    still = ~(radius > 1e-8)  # below, ||g0|| is the rounding of G
    radius = torch.where(still, 1.0, radius)
    # in units of K: y'Cy = 1, C y + beta >= t u; u = 1/n relative to the largest
    beta, u = along / radius, problem.inverse * least
    low = torch.where(active, ratio(beta, u), torch.inf).amin(1, keepdim=True)
    low = torch.where(some, low, 0.0)

    def attempt(ridge: float) -> Attempt:
        # Cauchy and Schwarz; the ridge lengthens every gradient
        bound = torch.where(active, ratio(beta + (1 + ridge) ** 0.5, u), torch.inf)
        high = torch.where(some, bound.amin(1, keepdim=True), 1.0)
        found = _on_the_sphere(problem.ridged(ridge), u, beta, active, low, high)
        unasked = still.squeeze(1) | ~some.squeeze(1)
        return Attempt(
            torch.where(unasked.unsqueeze(1), 0.0, found.solution),
            torch.where(unasked, 0.0, found.residual),
            found.sound | unasked,
        )

    found, bits = with_rising_ridge(attempt, ridge)
    y = found.solution
    # The combination's length, without the ridge, against the lengths it is made of. Next to nothing:
    # the gradients cancel, the point is Pareto-stationary.
    square = (y * mapped(problem.cosine, y)).sum(1)
    stationary = square < (1e-6 * y.sum(1)).square()
    y = torch.where(stationary.unsqueeze(1), 0.0, y)
    residual = torch.where(stationary, 0.0, found.residual)
    bits = torch.where(stationary, FALLBACK, bits)
    factor = {0: 1.0, 1: 1 / (1 + c * c), 2: 1 / (1 + c)}[rescale]
    weights = (1 / tasks + y * radius * mean * problem.inverse) * factor
    return conclude(problem, weights, bits, residual)
