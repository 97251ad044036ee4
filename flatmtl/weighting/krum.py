"""Krum."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class Krum(Weighting):
    """(Multi-)Krum (Blanchard et al., NeurIPS 2017): the mean of the most central gradients.

    A gradient's score is the sum of its distances to its T - ``byzantine`` - 2 nearest others; the
    ``selected`` lowest ones are averaged.

    Args:
        byzantine: how many gradients may be arbitrary, at least 0; T must be ``byzantine`` + 3 or more
            unless it is 0.
        selected: how many are averaged, at least 1.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is out of range; at a call, there are too few tasks.
    """

    paper = "Blanchard et al., Machine learning with adversaries (NeurIPS)"
    year = 2017

    def __init__(
        self,
        *,
        byzantine: int,
        selected: int = 1,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.byzantine = _options.whole("byzantine", byzantine, at_least=0)
        self.selected = _options.whole("selected", selected, at_least=1)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, bits = ops.solve_krum(gram, self.byzantine, self.selected)
        return weights, SolveStatus(bits)
