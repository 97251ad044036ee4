"""SDMGrad and MoDo: weights from the products of two batches' gradients, A = J1 J2'."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers._problem import (
    activity_bits,
    either_rank,
    mapped,
    pairs,
)


def find_active_cross(cross: Tensor) -> Tensor:
    """cross [.., T, T] -> bool [.., T]: a row and a column that are finite, and not all zero.

    A gradient with a NaN spoils its own row or column, and with it one entry of every other task's:
    a product with a task whose own is not finite counts against that task alone
    (csrc/solvers/two_batch.h has the same).
    """
    own = cross.diagonal(dim1=-2, dim2=-1).isfinite()
    finite = cross.isfinite()
    sound = ((finite & finite.mT) | ~own.unsqueeze(-2)).all(-1)
    some = finite & (cross != 0)
    return own & sound & some.any(-1) & some.any(-2)


def _project(point: Tensor, active: Tensor) -> Tensor:
    """The nearest point of the simplex of the active tasks; [B, T], exactly, by sorting."""
    # relative to the largest: the projection does not change, and huge entries do not cancel
    top = point.masked_fill(~active, -torch.inf).amax(1, keepdim=True)
    point = point - torch.where(top.isfinite(), top, 0.0)
    ordered = point.masked_fill(~active, -torch.inf).sort(1, descending=True).values
    ordered = torch.where(ordered.isfinite(), ordered, 0.0)
    count = torch.arange(1, point.shape[1] + 1, dtype=torch.float64, device=point.device)
    excess = ordered.cumsum(1) - 1
    held = (ordered * count > excess) & (count <= active.sum(1, keepdim=True))
    last = (held.sum(1, keepdim=True) - 1).clamp(min=0)
    level = excess.gather(1, last) / (last + 1)
    return torch.where(active, (point - level).clamp(min=0), 0.0)


def _remember(state: Tensor, w: Tensor, active: Tensor) -> None:
    # where no task is active there is nothing to learn from
    state.copy_(torch.where(active.any(1, keepdim=True), w, state))


@either_rank(1)
def solve_sdmgrad_(
    cross: Tensor,
    state: Tensor,
    preference: Tensor | None,
    lr: float,
    momentum: float,
    steps: int,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """cross [.., T, T], state [.., T], preference [T] -> weights [.., T], status [..]."""
    tasks = cross.shape[1]
    active = find_active_cross(cross)
    cross = torch.where(pairs(active), cross, 0.0)
    scale = cross.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1) / tasks
    scale = torch.where(scale > 0, scale, 1.0).view(-1, 1, 1)
    cross = cross / scale / scale
    q = active.double() * (1 / tasks if preference is None else preference)
    w = torch.where(active, state, 0.0)
    velocity = torch.zeros_like(w)
    for _ in range(steps):
        velocity = momentum * velocity + mapped(cross, w + lambda_ * q)
        w = _project(w - lr * velocity, active)
    _remember(state, w, active)
    return (w + lambda_ * q) / (1 + lambda_), activity_bits(active)


@either_rank(1)
def solve_modo_(cross: Tensor, state: Tensor, gamma: float, rho: float) -> tuple[Tensor, Tensor]:
    """cross [.., T, T], state [.., T] -> weights [.., T], status [..]."""
    active = find_active_cross(cross)
    cross = torch.where(pairs(active), cross, 0.0)
    w = torch.where(active, state, 0.0)
    w = _project(w - gamma * (mapped(cross, w) + rho * w), active)
    _remember(state, w, active)
    return w, activity_bits(active)
