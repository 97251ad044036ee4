"""The methods that are one non-negative QP in the cosine form: MGDA, UPGrad, DualProj, PCD."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops._status import FALLBACK
from flatmtl.ops.reference_solvers._nnqp import nnqp
from flatmtl.ops.reference_solvers._problem import (
    Attempt,
    Problem,
    conclude,
    either_rank,
    mapped,
    open_gram,
    ratio,
    with_rising_ridge,
)


@either_rank()
def solve_mgda(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    b = ratio(problem.inverse, problem.inverse.amax(1, keepdim=True))  # the scale cancels
    found, bits = with_rising_ridge(
        lambda r: nnqp(problem.ridged(r), b, problem.active).attempt(), ridge
    )
    v = found.solution * b
    weights = ratio(v, v.sum(1, keepdim=True))
    return conclude(problem, weights, bits, found.residual)


@either_rank()
def solve_dual_cone(
    gram: Tensor, preference: Tensor | None, each: bool, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], preference [T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    batch, tasks = problem.norm.shape
    top = problem.norm.amax(1, keepdim=True)
    start = ratio(problem.norm, top)  # n u, relative to the largest norm
    start = start / tasks if preference is None else start * preference
    # One problem a row [B, R, T]: R = T starts u_i e_i, or the one start u.
    starts = torch.diag_embed((start > 0).double()) if each else start.unsqueeze(1)
    rows = starts.shape[1]
    use = problem.active.unsqueeze(1).expand(batch, rows, tasks)

    def attempt(ridge: float) -> Attempt:
        cosine = problem.ridged(ridge).unsqueeze(1).expand(batch, rows, tasks, tasks)
        b = -(starts @ problem.ridged(ridge))
        solved = nnqp(
            cosine.reshape(-1, tasks, tasks), b.reshape(-1, tasks), use.reshape(-1, tasks)
        )
        return solved.attempt()

    found, bits = with_rising_ridge(attempt, ridge)
    y = found.solution.view(batch, rows, tasks)
    moved = (start.unsqueeze(2) * y).sum(1) if each else y.sum(1)
    weights = (start + moved) * top * problem.inverse
    union = torch.zeros_like(problem.bits)
    for row in bits.view(batch, rows).unbind(1):
        union = union | row
    return conclude(problem, weights, union, found.residual.view(batch, rows).amax(1))


def _scales(problem: Problem, state: Tensor, diagonal: Tensor, beta: float, eps: float) -> Tensor:
    """Moves the averages of ||g_i||^2 in ``state`` [B, T + 1]; their inverse roots [B, T]."""
    mean, steps = state[:, :-1], state[:, -1:]
    seen = problem.valid.unsqueeze(1)
    moved = torch.where(diagonal.isfinite(), beta * mean + (1 - beta) * diagonal, mean)
    mean.copy_(torch.where(seen, moved, mean))
    steps.add_(seen.double())
    unbiased = mean / (1 - beta**steps)
    root = (unbiased + eps).sqrt()
    return torch.where(problem.active, ratio(torch.ones_like(root), root), 0.0)


@either_rank(1)
def solve_pcd_(
    gram: Tensor, state: Tensor, tau: float, beta: float, eps: float, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], state [.., T + 1] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    s = _scales(problem, state, gram.diagonal(dim1=1, dim2=2), beta, eps)
    length = s * problem.norm  # [B, T], of the scaled gradients
    primary = length[:, :1]
    first = torch.arange(problem.tasks, device=gram.device) == 0
    lead = problem.active[:, :1]
    use = problem.active & ~first & lead
    b = torch.where(use, tau * length - problem.cosine[:, :, 0] * primary, 0.0)

    def attempt(ridge: float) -> Attempt:
        solved = nnqp(problem.ridged(ridge), b, use)
        # Only the ridge holds the multipliers of constraints that contradict each other.
        hopeless = ridge * solved.y.amax(1) > 1e-3 * b.abs().amax(1)
        y = torch.where(hopeless.unsqueeze(1), -1.0, solved.y)
        return Attempt(y, torch.where(hopeless, 0.0, solved.residual), solved.sound | hopeless)

    found, bits = with_rising_ridge(attempt, ridge)
    hopeless = (found.solution < 0).any(1)
    y = torch.where(first, primary, found.solution.clamp(min=0))  # wtilde_i n_i
    square = (y * mapped(problem.cosine, y)).sum(1)
    vanishes = ~(square > 1e-14 * y.sum(1).square())
    length = torch.where(vanishes, 0.0, ratio(problem.norm[:, 0], square.clamp(min=0).sqrt()))
    weights = torch.where(lead, y * problem.inverse * length.unsqueeze(1), 0.0)
    bits = torch.where(hopeless, FALLBACK, bits) | vanishes.long() * FALLBACK
    led = lead.squeeze(1)
    bits, residual = torch.where(led, bits, 0), torch.where(led, found.residual, 0.0)
    return conclude(problem, weights, bits, residual)
