"""FairGrad."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class FairGrad(Weighting):
    """Fair resource allocation (Ban and Ji, arXiv 2402.15638): (G w)_i = w_i^(-1/alpha), exact.

    Every task descends to first order. alpha = 1 is Nash-MTL's direction, a large alpha goes to MGDA's.

    Args:
        alpha: above 0, at most 5 (the weights would span more than float64 does); 2 is what every
            released script of the authors uses.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``alpha`` is out of range.
    """

    paper = "Ban and Ji, Fair resource allocation in multi-task learning"
    arxiv = "2402.15638"
    year = 2024

    def __init__(
        self, *, alpha: float = 2.0, scaling: Scaling = "raw", max_norm: float | None = None
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.alpha = _options.real("alpha", alpha, above=0, at_most=5)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits, residual = ops.solve_alpha_fair(gram, self.alpha)
        return weights, SolveStatus(bits, residual)
