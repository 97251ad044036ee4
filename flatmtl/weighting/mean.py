"""The mean of the task gradients."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting._base import SolveStatus, Weighting


class Mean(Weighting):
    """w_i = 1/T: the gradient of the mean loss (linear scalarisation).

    A task whose gradient is zero or not finite gets 0; the others keep 1/T.

    Args:
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    diagonal_only = True
    paper = "Caruana, Multitask learning"
    year = 1997
    needs = "nothing"

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        tasks = _check.gram("gram", gram).shape[-1]
        weights, bits = ops.solve_constant(gram, None, 1 / tasks)
        return weights, SolveStatus(bits)
