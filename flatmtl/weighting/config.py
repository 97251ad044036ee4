"""ConFIG."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class ConFIG(Weighting):
    """Conflict-free inverse gradients (Liu et al., arXiv 2408.11104).

    The direction whose cosines with the task gradients are in the proportion of the preference, with the
    length of the gradients' projections on it.

    Args:
        preference: [T], not negative; None: ones, as in the paper.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``preference`` is not a vector of finite numbers from 0 on; at a call, it
            has not one entry for each task.
    """

    paper = "Liu et al., ConFIG: towards conflict-free training of PINNs"
    arxiv = "2408.11104"
    year = 2024

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
        weights, bits, residual = ops.solve_config(gram, self.preference)
        return weights, SolveStatus(bits, residual)
