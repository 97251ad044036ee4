"""Given weights."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class Constant(Weighting):
    """Given weights.

    A task whose gradient is zero or not finite gets 0.

    Args:
        weights: [T], any finite numbers.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``weights`` is not a vector of finite numbers; at a call, it has not one
            entry for each task.
    """

    diagonal_only = True
    paper = "Caruana, Multitask learning"
    year = 1997
    needs = "nothing"

    def __init__(
        self,
        weights: _options.Vector,
        *,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.weights: Tensor | None = _options.vector("weights", weights, negative=True)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        self.weights = _options.placed("weights", self.weights, gram)
        weights, bits = ops.solve_constant(gram, self.weights)
        return weights, SolveStatus(bits)
