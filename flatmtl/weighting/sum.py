"""The sum of the task gradients."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting._base import SolveStatus, Weighting


class Sum(Weighting):
    """w_i = 1: the gradient of the summed loss.

    A task whose gradient is zero or not finite gets 0.

    Args:
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    diagonal_only = True
    paper = "Caruana, Multitask learning"
    year = 1997
    needs = "nothing"

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits = ops.solve_constant(gram)
        return weights, SolveStatus(bits)
