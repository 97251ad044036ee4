"""Uncertainty weighting."""

from __future__ import annotations

from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._learned import Learned
from flatmtl.weighting._loss import LossWeighting


class UncertaintyWeighting(Learned, LossWeighting):
    """Uncertainty weighting (Kendall et al., arXiv 1705.07115): sum_i (exp(-s_i) L_i + s_i) / 2, s learned.

    w_i = exp(-s_i) / 2. For a loss that stays at L, s_i goes to log L. s follows the losses at the pace of
    its learning rate: losses far from 1 want a fitting ``init``, s_i = log L_i.

    Args:
        tasks: T.
        init: s before the first step, a number or [T]; 0, LibMTL -0.5.
        lr: of s; None: the base optimizer's.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, there are not ``tasks`` losses.
    """

    paper = "Kendall et al., Multi-task learning using uncertainty to weigh losses"
    arxiv = "1705.07115"
    year = 2018

    state = "learned s [T]"

    _learned_entry = "s"

    def __init__(
        self,
        tasks: int,
        *,
        init: float | _options.Vector = 0.0,
        lr: float | None = None,
        scaling: Scaling = "raw",
    ) -> None:
        super().__init__(tasks, init=init, lr=lr, scaling=scaling)

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        weights = self._learned_for(losses).neg().exp_().mul_(0.5)
        self._learn((weights * losses).neg_().add_(0.5), there)
        return weights
