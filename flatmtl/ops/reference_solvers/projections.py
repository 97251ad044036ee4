"""PCGrad and GradVac: projections of gradients on one another, on coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers._problem import either_rank, open_gram, ratio
from flatmtl.ops.reference_solvers.random import draw_order_


@either_rank(1)
def solve_pcgrad(gram: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gram, order [.., T, T] -> weights [.., T], coefficients [.., T, T], status [..]."""
    problem = open_gram(gram)
    gram, active, tasks = problem.gram, problem.active, problem.tasks
    norm2 = gram.diagonal(dim1=1, dim2=2)
    product = gram.clone()  # K G
    coefficients = torch.diag_embed(active.double())
    own = torch.arange(tasks, device=gram.device)
    for visit in range(tasks):
        j = order[:, :, visit]  # [B, T]
        p = product.gather(2, j.unsqueeze(2)).squeeze(2)
        square = norm2.gather(1, j)
        conflict = (p < 0) & (j != own) & (square > 0) & active
        c = torch.where(conflict, p / square, 0.0).unsqueeze(2)
        coefficients.scatter_add_(2, j.unsqueeze(2), -c)
        product -= c * gram.gather(1, j.unsqueeze(2).expand_as(gram))
    return coefficients.sum(1), coefficients, problem.bits


@either_rank(1, 2)
def solve_gradvac(
    gram: Tensor, order: Tensor, target: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """gram, order, target [.., T, T] -> weights [.., T], status [..]; target is moved."""
    problem = open_gram(gram)
    active, tasks = problem.active, problem.tasks
    # Unit gradients, and norms relative to the largest: K_ij n_j in place of K_ij.
    top = problem.norm.amax(1, keepdim=True)
    coefficients = torch.diag_embed(ratio(problem.norm, top))
    product = coefficients @ problem.cosine
    own = torch.arange(tasks, device=gram.device)
    for visit in range(tasks):
        j = order[:, :, visit]  # [B, T]
        at = j.unsqueeze(2)
        meet = active & active.gather(1, j) & (j != own)
        length = (coefficients * product).sum(2).clamp(min=0).sqrt()  # of the projected gradient
        phi = ratio(product.gather(2, at).squeeze(2), length).clamp(-1, 1)
        goal = target.gather(2, at).squeeze(2)
        sine = (1 - goal * goal).clamp(min=0).sqrt()
        gain = length * (goal * (1 - phi * phi).sqrt() - phi * sine) / (sine + eps)
        # a goal of 1 and no eps: no finite correction does it
        gain = torch.where(meet & (phi < goal) & gain.isfinite(), gain, 0.0).unsqueeze(2)
        moved = torch.where(meet, (1 - beta) * goal + beta * phi, goal)
        target.scatter_(2, at, moved.unsqueeze(2))
        coefficients.scatter_add_(2, at, gain)
        product += gain * problem.cosine.gather(1, at.expand_as(gram))
    return coefficients.sum(1) * top * problem.inverse, problem.bits


def _drawn(gram: Tensor, rng: Tensor) -> Tensor:
    batch = gram.shape[0] if gram.dim() == 3 else 1
    return draw_order_(rng, gram.shape[-1], batch).reshape(gram.shape)


def solve_pcgrad_drawn_(gram: Tensor, rng: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """solve_pcgrad in an order of rng int64 [2], (seed, step), step += 1."""
    return solve_pcgrad(gram, _drawn(gram, rng))


def solve_gradvac_drawn_(
    gram: Tensor, rng: Tensor, target: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """solve_gradvac in an order of rng int64 [2], (seed, step), step += 1."""
    return solve_gradvac(gram, _drawn(gram, rng), target, beta, eps)
