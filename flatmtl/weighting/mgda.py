"""MGDA."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting._base import SolveStatus, Weighting


class MGDA(Weighting):
    """Multiple-gradient descent (Desideri 2012; Sener and Koltun, arXiv 1810.04650): exact.

    The shortest vector in the convex hull of the task gradients: min w'Gw, w >= 0, sum w = 1. Solved to
    the end by an active set, where Frank-Wolfe iterations stop short. A task whose gradient is zero is
    left out (strictly, the solution would then be zero), one that is not finite likewise. The solution
    is that of the Gram matrix with a ridge of 1e-10 on its cosine form, raised up to 1e-6 where float32
    rounding asks for it (``SolveStatus.ridge_raised``).

    Args:
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    paper = "Sener and Koltun, Multi-task learning as multi-objective optimization"
    arxiv = "1810.04650"
    year = 2018

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits, residual = ops.solve_mgda(gram)
        return weights, SolveStatus(bits, residual)
