"""What UPGrad and DualProj share."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class DualCone(Weighting):
    """Projections on the dual cone of the task gradients: of each one, or of their combination."""

    _each: bool

    def __init__(
        self,
        *,
        preference: _options.Vector | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.preference = None if preference is None else _options.vector("preference", preference)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        self.preference = _options.placed("preference", self.preference, gram)
        weights, bits, residual = ops.solve_dual_cone(gram, self.preference, self._each)
        return weights, SolveStatus(bits, residual)
