"""IMTL-L."""

from __future__ import annotations

from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._learned import Learned
from flatmtl.weighting._loss import LossWeighting


class IMTLL(Learned, LossWeighting):
    """Impartial learning, on the losses (Liu et al., ICLR 2021): sum_i (exp(s_i) L_i - s_i), s learned.

    w_i = exp(s_i). For a loss that stays at L, s_i goes to -log L, where w_i L_i = 1. s follows the losses at
    the pace of its learning rate: losses far from 1 want a fitting ``init``, s_i = -log L_i.

    Args:
        tasks: T.
        init: s before the first step, a number or [T]; 0 is the paper's.
        lr: of s; None: the base optimizer's, as in the paper.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, there are not ``tasks`` losses.
    """

    paper = "Liu et al., Towards impartial multi-task learning (ICLR)"
    year = 2021

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
        weights = self._learned_for(losses).exp()
        self._learn((weights * losses).sub_(1.0), there)
        return weights
