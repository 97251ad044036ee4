"""MoDo."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._cross import TwoBatches


class MoDo(TwoBatches):
    """Multi-objective gradient with double sampling (Chen et al., arXiv 2305.20057).

    Call it with the products J1 J2' of the gradients of two batches. One batch's Gram matrix is taken
    too; the step of the weights is then biased. It is not normalised: ``gamma`` has the unit of 1/G.

    Args:
        gamma: step size of the weights, above 0; 0.1.
        rho: their regularisation, at least 0; 0.1.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    paper = "Chen et al., Three-way trade-off in multi-objective learning"
    arxiv = "2305.20057"
    year = 2023

    def __init__(
        self,
        *,
        gamma: float = 0.1,
        rho: float = 0.1,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.gamma = _options.real("gamma", gamma, above=0)
        self.rho = _options.real("rho", rho, at_least=0)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        held = self._state_for(_check.gram("gram", gram))
        weights, bits = ops.solve_modo_(gram, held, self.gamma, self.rho)
        return weights, SolveStatus(bits)
