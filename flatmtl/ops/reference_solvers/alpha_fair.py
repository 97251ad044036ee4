"""Alpha-fair weights, (G w)_i = (c_i / w_i)^(1/alpha): FairGrad, PIVRG and (alpha = 1) Nash-MTL."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops._status import FALLBACK, INVALID_GRAM, NOT_CONVERGED
from flatmtl.ops.reference_solvers._problem import (
    TOLERANCE,
    Attempt,
    Problem,
    backward_error,
    conclude,
    either_rank,
    largest,
    limit_norm,
    mapped,
    open_gram,
    settled,
    with_rising_ridge,
)

_STAGES = 24
_APPROACH, _FINISH = 32, 64  # iterations, of a stage on the way and of the last


def _newton(
    cosine: Tensor,
    kappa: Tensor,
    alpha: float,
    active: Tensor,
    y: Tensor,
    iterations: int,
    enough: float,
) -> Attempt:
    """y > 0 of (C y)_i = exp((kappa_i - log y_i) / alpha), by primal-dual Newton on y and r = C y.

    kappa, y (where it starts): [B, T]. A step keeps y and r positive. The best iterate is kept: near
    stationarity the last ones wander within the rounding.
    """
    r = ((kappa - y.log()) / alpha).exp()
    # the best multiple of the start
    square, wanted = (y * mapped(cosine, y)).sum(1, keepdim=True), (y * r).sum(1, keepdim=True)
    usable = square > 1e-12 * wanted
    multiple = torch.where(usable, wanted / square.where(usable, 1.0), 1.0)
    y = y * multiple ** (alpha / (1 + alpha))
    r = ((kappa - y.log()) / alpha).exp()
    eye = torch.eye(kappa.shape[1], dtype=torch.float64, device=kappa.device)
    best = Attempt(y, torch.full_like(y[:, 0], torch.inf), torch.zeros_like(usable[:, 0]))
    for _ in range(iterations):
        terms = cosine * y.unsqueeze(1)
        image = terms.sum(2)
        goal = ((kappa - y.log()) / alpha).exp()
        error = torch.where(active, backward_error(image - goal, terms.abs().sum(2) + goal), 0.0)
        plain = torch.where(active, backward_error(image - goal, goal), 0.0)
        residual = largest(error)
        better = residual < best.residual
        best = Attempt(
            torch.where(better.unsqueeze(1), y, best.solution),
            torch.where(better, residual, best.residual),
            best.sound | (residual <= TOLERANCE),
        )
        if settled((largest(plain) <= enough) | (residual <= 4e-16)):
            break
        first = y.log() + alpha * r.log() - kappa
        gap = image - r
        # diag(y) (C + diag(r / (alpha y))) diag(y), scaled to 1 on the diagonal
        matrix = y.unsqueeze(2) * terms + eye * (r * y / alpha).unsqueeze(1)
        size = matrix.diagonal(dim1=1, dim2=2).rsqrt()
        matrix = matrix * size.unsqueeze(2) * size.unsqueeze(1)
        factor, info = torch.linalg.cholesky_ex(matrix)
        right = size * y * (-(r / alpha) * first - gap)
        move = y * size * torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
        move = torch.where((info == 0).unsqueeze(1), move, 0.0)
        move_r = gap + mapped(cosine, move)
        fall = torch.maximum(-move / y, -move_r / r).amax(1, keepdim=True)
        length = torch.where(fall > 0.9, 0.9 / fall, 1.0)
        y, r = y + length * move, r + length * move_r
    return best


def _staged(cosine: Tensor, kappa: Tensor, alpha: float, active: Tensor) -> Attempt:
    """The solution, wide scales approached in stages from kappa = 0, where norms do not matter."""
    # one for every factor e of y and r, which go with exp(kappa / (1 + alpha)), or exp(4) of kappa
    unit = min(1 + alpha, 4.0)
    stages = (1 + (kappa.abs().amax(1, keepdim=True) / unit).floor()).clamp(max=_STAGES)
    y, before = torch.ones_like(kappa), torch.zeros_like(stages)
    for stage in range(1, _STAGES + 1):
        share = (stage / stages).clamp(max=1)
        start = y * ((share - before) * kappa / (1 + alpha)).exp()
        y = _newton(cosine, share * kappa, alpha, active, start, _APPROACH, 1e-3).solution
        before = share
        if settled(share == 1):
            break
    return _newton(cosine, kappa, alpha, active, y, _FINISH, 1e-13)


def _solve(
    problem: Problem, alpha: float, preference: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, T], bits [B], residual [B]."""
    active = problem.active
    # y = n w: (C y)_i = exp((kappa_i - log y_i) / alpha), the mean of kappa taken out
    kappa = (1 - alpha) * torch.where(active, problem.norm, 1.0).log()
    if preference is not None:
        kappa = kappa + torch.where(active, preference, 1.0).log()
    count = active.sum(1, keepdim=True).clamp(min=1)
    mean = kappa.sum(1, keepdim=True) / count
    kappa = torch.where(active, kappa - mean, 0.0)
    found, bits = with_rising_ridge(
        lambda r: _staged(problem.ridged(r), kappa, alpha, active), ridge
    )
    weights = found.solution * (mean / (1 + alpha)).exp() * problem.inverse
    return weights, bits, found.residual


@either_rank()
def solve_alpha_fair(
    gram: Tensor, alpha: float, preference: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], preference [T] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    return conclude(problem, *_solve(problem, alpha, preference, ridge))


@either_rank(1)
def solve_nash_(
    gram: Tensor, last: Tensor, every: int, max_norm: float, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram [.., T, T], last [.., T + 1] -> weights [.., T], status [..], residual [..]."""
    problem = open_gram(gram)
    kept, calls = last[:, :-1], last[:, -1:]
    # a task without a kept weight that has a gradient now must not wait for its turn
    due = (calls % every == 0).squeeze(1) | (problem.active & ~(kept > 0)).any(1)
    weights, bits, residual = conclude(problem, *_solve(problem, 1.0, None, ridge))
    failed = (bits & NOT_CONVERGED) != 0
    some = problem.active.any(1)
    reused = torch.where(problem.active, kept, 0.0)
    back = failed & (kept != 0).any(1)
    bits = torch.where(back, bits | FALLBACK, bits)
    bits = torch.where(due, bits, problem.bits)
    residual = torch.where(due, residual, 0.0)
    good = due & some & ~failed
    kept.copy_(torch.where(good.unsqueeze(1), weights, kept))
    calls += torch.where((problem.bits & INVALID_GRAM) == 0, 1.0, 0.0).unsqueeze(1)
    weights = torch.where((back | ~due).unsqueeze(1), reused, weights)
    return limit_norm(gram, weights, max_norm), bits, residual
