"""Solvers that are one formula or one linear system: constants, IMTL-G, ConFIG, Aligned-MTL, Krum."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops._status import FALLBACK
from flatmtl.ops.reference_solvers._problem import (
    TOLERANCE,
    Attempt,
    Problem,
    activity_bits,
    backward_error,
    conclude,
    either_rank,
    find_active,
    largest,
    limit_norm,
    mapped,
    open_gram,
    ratio,
    with_rising_ridge,
)


@either_rank()
def solve_constant(gram: Tensor, preference: Tensor | None, value: float) -> tuple[Tensor, Tensor]:
    """gram [.., T, T], preference [T] -> weights [.., T]: preference, or value; status [..]."""
    active = find_active(gram)
    weights = value if preference is None else preference
    return torch.where(active, weights, gram.new_zeros(())), activity_bits(active)


def _solve_cosine(problem: Problem, p: Tensor, ridge: float) -> tuple[Attempt, Tensor]:
    """y of C y = p [B, T], with a ridge that makes C positive definite."""

    def attempt(ridge: float) -> Attempt:
        cosine = problem.ridged(ridge)
        factor, info = torch.linalg.cholesky_ex(cosine)
        y = torch.zeros_like(p)
        for _ in range(3):  # the solution, and two steps of refinement
            rest = p - mapped(cosine, y)
            y = y + torch.cholesky_solve(rest.unsqueeze(2), factor).squeeze(2)
        terms = cosine * y.unsqueeze(1)
        error = backward_error(p - terms.sum(2), p.abs() + terms.abs().sum(2))
        residual = largest(error)
        return Attempt(y, residual, (info == 0) & (residual <= TOLERANCE))

    return with_rising_ridge(attempt, ridge)


@either_rank()
def solve_imtl_g(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    found, bits = _solve_cosine(problem, problem.active.double(), ridge)
    a = found.solution * ratio(problem.inverse, problem.inverse.amax(1, keepdim=True))
    total = a.sum(1)
    turned = ~(total > 0)  # the update would point the other way
    weights = torch.where(
        turned.unsqueeze(1), problem.equal_contributions(), ratio(a, total.unsqueeze(1))
    )
    return conclude(problem, weights, bits | turned.long() * FALLBACK, found.residual)


@either_rank()
def solve_config(
    gram: Tensor, preference: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], preference [T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    p = problem.active.double()
    if preference is not None:
        p = p * preference
    found, bits = _solve_cosine(problem, p, ridge)
    y = found.solution
    # C y = p, but for rounding
    square, along = (y * p).sum(1), (problem.norm * p).sum(1)
    none = ~(square > 0)
    weights = y * problem.inverse * ratio(along, square).unsqueeze(1)
    weights = torch.where(none.unsqueeze(1), problem.equal_contributions(), weights)
    return conclude(problem, weights, bits | none.long() * FALLBACK, found.residual)


@either_rank()
def solve_aligned(
    gram: Tensor, preference: Tensor | None, scale_mode: int, rank_tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], preference [T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    # relative to the largest norm: the result does not depend on the scale
    top = problem.norm.amax(1).square()
    scaled = ratio(problem.symmetric, top.view(-1, 1, 1))
    values, vectors = torch.linalg.eigh(scaled)  # [B, T], [B, T, T]
    largest_value = values.amax(1, keepdim=True)
    keep = values > largest_value * problem.tasks * rank_tolerance
    kept = keep.sum(1, keepdim=True)
    if scale_mode == 2:
        scale = ratio(torch.where(keep, values, 0.0).sum(1, keepdim=True), kept.double())
    else:  # the kept ones come first when the others count as infinite
        ordered = torch.where(keep, values, torch.inf).sort(1).values
        at = (kept - 1).clamp(min=0) // 2 if scale_mode == 1 else torch.zeros_like(kept)
        scale = ordered.gather(1, at)
    stretch = torch.where(keep, (scale / values.where(keep, scale)).sqrt(), 0.0)
    p = problem.active.double()
    if preference is not None:
        p = p * preference
    weights = mapped(vectors, stretch * mapped(vectors.mT, p))
    error = (scaled @ vectors - vectors * values.unsqueeze(1)).abs().flatten(1).amax(1)
    residual = ratio(error, largest_value.squeeze(1))
    return conclude(problem, weights, torch.zeros_like(problem.bits), residual)


@either_rank()
def solve_krum(gram: Tensor, byzantine: int, selected: int) -> tuple[Tensor, Tensor]:
    """gram [.., T, T] -> weights [.., T], status [..]."""
    problem = open_gram(gram)
    gram, active, tasks = problem.gram, problem.active, problem.tasks
    norm2 = gram.diagonal(dim1=1, dim2=2)
    square = norm2.unsqueeze(2) + norm2.unsqueeze(1) - (gram + gram.mT)
    distance = square.clamp(min=0).sqrt()
    own = torch.eye(tasks, dtype=torch.bool, device=gram.device)
    distance = distance.masked_fill(own | ~active.unsqueeze(1), torch.inf).sort(2).values
    count = active.sum(1, keepdim=True)  # [B, 1]
    near = (count - byzantine - 2).clamp(min=1).minimum(count - 1)
    position = torch.arange(tasks, device=gram.device)
    score = torch.where(position < near.unsqueeze(2), distance, 0.0).sum(2)
    score = score.masked_fill(~active, torch.inf)
    best = score.sort(dim=1, stable=True).indices  # ties: the lower task first
    chosen = count.clamp(max=selected)
    share = torch.where(position < chosen, 1 / chosen.double().clamp(min=1), 0.0)
    return torch.zeros_like(score).scatter(1, best, share), problem.bits


@either_rank(1)
def scale_weights(gram: Tensor, weights: Tensor, scaling: int, max_norm: float) -> Tensor:
    """gram [.., T, T], weights [.., T] -> weights, scaled to a sum and to a largest ||d||."""
    if scaling:
        total, size = weights.sum(1, keepdim=True), weights.abs().sum(1, keepdim=True)
        total = torch.where(total > 1e-12 * size, total, size)
        weights = ratio(weights, total) * (1.0 if scaling == 1 else float(gram.shape[1]))
    return limit_norm(gram, weights, max_norm)
