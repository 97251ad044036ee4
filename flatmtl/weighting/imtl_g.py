"""IMTL-G."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting._base import SolveStatus, Weighting


class IMTLG(Weighting):
    """IMTL-G (Liu et al., ICLR 2021): equal projections of the update on all unit gradients, sum 1.

    With three tasks or more and conflicts, the solution may point against the gradients; then
    w_i is proportional to 1/||g_i||, and the status says so (``SolveStatus.fallback``).

    Args:
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    paper = "Liu et al., Towards impartial multi-task learning (ICLR)"
    year = 2021

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits, residual = ops.solve_imtl_g(gram)
        return weights, SolveStatus(bits, residual)
