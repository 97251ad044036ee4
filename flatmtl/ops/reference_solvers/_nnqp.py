"""Non-negative quadratic programmes:  min 0.5 y'Cy - b'y,  y >= 0,  C positive definite.

The active set of csrc/solvers/nnqp.h (Lawson and Hanson), on a batch of problems: the most violated
task enters the passive set, the passive equations are solved, a step that would leave the orthant stops
at its boundary, where the task that got there leaves again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers._problem import (
    TOLERANCE,
    Attempt,
    backward_error,
    largest,
    mapped,
    settled,
)


class Nnqp(NamedTuple):
    """A solved batch.

    Attributes:
        y: [B, T].
        residual: [B], the backward error of C y = b where y > 0 and of C y >= b elsewhere.
        sound: bool [B], the active set came to an end and the equations hold.
    """

    y: Tensor
    residual: Tensor
    sound: Tensor

    def attempt(self) -> Attempt:
        """As one ridge's attempt."""
        return Attempt(*self)


def passive_solve(cosine: Tensor, b: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
    """z of C z = b on the passive tasks, 0 elsewhere [B, T]; bool [B, 1], C is not definite there."""
    block = passive.unsqueeze(2) & passive.unsqueeze(1)
    eye = torch.eye(b.shape[1], dtype=torch.float64, device=b.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(block, cosine, eye))
    right = torch.where(passive, b, 0.0).unsqueeze(2)
    z = torch.cholesky_solve(right, factor).squeeze(2)
    # as in C++, a pivot below 1e-14 is rounding, not curvature
    flat = factor.diagonal(dim1=1, dim2=2).amin(1) < 1e-7
    return z, ((info != 0) | flat).unsqueeze(1)


def nnqp(cosine: Tensor, b: Tensor, use: Tensor) -> Nnqp:
    """cosine [B, T, T], b [B, T], use bool [B, T] (y stays 0 elsewhere)."""
    batch, tasks = b.shape
    y = torch.zeros_like(b)
    passive = torch.zeros_like(use)
    barred = torch.zeros_like(use)
    entering = torch.ones(batch, 1, dtype=torch.bool, device=b.device)
    done = torch.zeros_like(entering)
    index = torch.arange(tasks, device=b.device)
    for _ in range(6 * tasks + 20):
        terms = cosine * y.unsqueeze(1)
        slack = b - terms.sum(2)
        violated = slack > 1e-14 * (b.abs() + terms.abs().sum(2))
        slack = torch.where(violated & use & ~passive & ~barred, slack, 0.0)
        best = index == slack.argmax(1, keepdim=True)
        any_left = slack.amax(1, keepdim=True) > 0
        done = done | (entering & ~any_left)
        if settled(done):
            break
        newcomer = best & entering & any_left & ~done
        passive = passive | newcomer
        z, indefinite = passive_solve(cosine, b, passive)
        # A newcomer that does not grow, or that the others determine, is barred.
        stuck = (newcomer & ~(z > 0)).any(1, keepdim=True) | indefinite
        blocking = passive & ~(z > 0)
        ratio = torch.where(blocking, y / (y - z).where(blocking, 1.0), 1.0)
        alpha = ratio.amin(1, keepdim=True)
        full = ~blocking.any(1, keepdim=True)
        moved = torch.where(full, z, y + alpha * (z - y))
        leaves = blocking & (ratio <= alpha)
        advance = ~done & ~stuck
        y = torch.where(advance & passive, torch.where(leaves, 0.0, moved), y)
        passive = torch.where(advance, passive & (y > 0), passive & ~(stuck & newcomer))
        y = torch.where(passive, y, 0.0)
        barred = torch.where(advance & full, False, barred | (stuck & newcomer))
        entering = full | stuck

    # One step of refinement makes the error of every row small, not only of the largest.
    z, _ = passive_solve(cosine, b - mapped(cosine, y), passive)
    y = torch.where(passive & (y + z > 0), y + z, y)

    terms = cosine * y.unsqueeze(1)
    rest = b - terms.sum(2)
    rest = torch.where(use & ((y > 0) | (rest > 0)), rest, 0.0)
    residual = largest(backward_error(rest, b.abs() + terms.abs().sum(2)))
    # The equations hold also in the plain sense, up to what rounding leaves of b where y is large.
    scale = torch.where(use, b, 0.0).abs().amax(1)
    plain = rest.abs().amax(1) <= 1e-6 * scale + 1e-13 * y.sum(1)
    return Nnqp(y, residual, done.squeeze(1) & (residual <= TOLERANCE) & plain)
