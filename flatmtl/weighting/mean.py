"""The plain mean and sum of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting._base import SolveStatus, Weighting, active_tasks


class Mean(Weighting):
    """w_i = 1/T: the gradient of the mean loss (linear scalarisation).

    A task whose gradient is zero or not finite gets 0; the others keep 1/T.
    """

    diagonal_only = True

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        active, bits = active_tasks(gram)
        return active.to(torch.float64) / gram.shape[1], SolveStatus(bits)


class Sum(Weighting):
    """w_i = 1: the gradient of the summed loss.

    A task whose gradient is zero or not finite gets 0.
    """

    diagonal_only = True

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        active, bits = active_tasks(gram)
        return active.to(torch.float64), SolveStatus(bits)
