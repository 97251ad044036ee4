"""Scale-invariant loss."""

from __future__ import annotations

from torch import Tensor

from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import LossWeighting


class ScaleInvariant(LossWeighting):
    """Scale-invariant loss: sum_i log L_i, so that w_i = 1 / L_i; a baseline in several papers.

    Args:
        log1p: sum_i log(1 + L_i) in its place, w_i = 1 / (1 + L_i), which takes losses of 0 (as in the code
            of Aligned-MTL); it is not scale-invariant. A loss below 0 has weight 1 then.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call on the CPU, a loss is not above 0
            (without ``log1p``).
    """

    paper = "Navon et al., Multi-task learning as a bargaining game (as a baseline)"
    arxiv = "2202.01017"
    year = 2022

    def __init__(self, *, log1p: bool = False, scaling: Scaling = "raw") -> None:
        super().__init__(scaling=scaling)
        if not isinstance(log1p, bool):
            raise TypeError(f"log1p must be True or False, got {type(log1p).__name__}")
        self.log1p = log1p
        self.positive = not log1p

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        if self.log1p:
            return losses.clamp(min=0.0).add_(1.0).reciprocal_()
        return losses.reciprocal()
