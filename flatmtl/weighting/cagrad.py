"""CAGrad."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class CAGrad(Weighting):
    """Conflict-averse gradient descent (Liu et al., arXiv 2110.14048): exact.

    The update with the best worst descent, max_d min_i <g_i, d>, within ||d - g0|| <= c ||g0|| of the
    mean gradient g0. Where the gradients are Pareto-stationary it is g0, and the status says so
    (``SolveStatus.fallback``).

    Args:
        c: the radius; 0 is the mean, a large one MGDA's direction. 0.4 is the paper's for NYUv2.
        rescale: the weights are divided by 0: nothing, 1: 1 + c^2 (the official code), 2: 1 + c.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``c`` is negative or ``rescale`` none of these.
    """

    paper = "Liu et al., Conflict-averse gradient descent for multi-task learning"
    arxiv = "2110.14048"
    year = 2021

    def __init__(
        self,
        *,
        c: float = 0.4,
        rescale: int = 0,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.c = _options.real("c", c, at_least=0)
        if _options.whole("rescale", rescale) not in (0, 1, 2):
            raise ValueError(f"rescale must be 0, 1 or 2, got {rescale}")
        self.rescale = rescale

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits, residual = ops.solve_cagrad(gram, self.c, self.rescale)
        return weights, SolveStatus(bits, residual)
