"""SLAW."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import StatefulLoss


class SLAW(StatefulLoss):
    """Scaled loss approximate weighting (Crawshaw and Kosecka, arXiv 2109.08218): w_i is as 1/s_i, sum w = T.

    s_i is the standard deviation of the task's loss over the calls: arithmetic over the first 1 / (1 - beta)
    of them, then exponentially averaged. It stands for the norm of the task's gradient. At its first loss
    a task has none and gets weight 1; so at the first call all do. T: the tasks that are there.

    Args:
        beta: how much of the averages stays; 0.99 is that of the authors' code.
        eps: a lower bound on s, in units of the losses; 1e-5 is that of the authors' code. It decides
            where losses vary by less: losses of 1e-8 all get weight 1 unless it is smaller.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Crawshaw and Kosecka, SLAW: scaled loss approximate weighting"
    arxiv = "2109.08218"
    year = 2021
    state = "mean, variance and count of the losses [3, T]"

    _entry = "statistics"
    _rows = 3

    def __init__(self, *, beta: float = 0.99, eps: float = 1e-5, scaling: Scaling = "raw") -> None:
        super().__init__(scaling=scaling)
        self.beta = _options.real("beta", beta, at_least=0, below=1)
        self.eps = _options.real("eps", eps, above=0)
        self._least = max(self.eps**2, sys.float_info.min)  # of a variance

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        mean, variance, count = self._state_for(losses).unbind(0)  # [T] each, views
        count.add_(1.0 if there is None else there)
        share = count.reciprocal().clamp_(min=1 - self.beta)  # of the new loss in the averages
        if there is not None:
            share = torch.where(there, share, 0.0)
        # E[L^2] - E[L]^2 without a difference of large numbers (Welford)
        apart = losses - mean
        mean.lerp_(losses, share)
        variance.lerp_(apart.mul_(losses - mean), share)
        inverse = variance.clamp(min=self._least).rsqrt_()
        readable = count.device.type == "cpu" and not torch.compiler.is_compiling()
        if there is None and readable and min(count.tolist()) > 1:
            return inverse.div_(inverse.sum()).mul_(count.shape[0])  # as below, in fewer operations
        seen = count > 1  # a task's first loss says nothing about how it varies
        taken = seen if there is None else seen & there
        inverse.mul_(taken)
        return inverse.div_(inverse.sum()).mul_(taken.sum()).where(seen, 1.0)
