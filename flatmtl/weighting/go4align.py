"""GO4Align."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._clusters import centres
from flatmtl.weighting._loss import StatefulLoss


class GO4Align(StatefulLoss):
    """Group optimization for multi-task alignment (Shen et al., arXiv 2404.06486, eq. 3 to 7).

    Each task has an indicator p_i q_i: p_i = mean(L) / L_i balances the scales, and q, which begins equal,
    q_i <- q_i exp(-beta L_i) over their sum, remembers the losses. The indicators are clustered by k-means,
    and a task's weight is its cluster's mean. k-means is solved exactly here (in one dimension dynamic
    programming does that); the paper does not say how. A task that is missing keeps its q, and the others
    their sum.

    From the paper's text alone: the authors' code, which has no licence, was not used, nor were its results
    compared. It may scale the weights otherwise.

    Args:
        groups: clusters, from 1 to T; the paper chooses it by validation. 1: equal weights, T: each its own.
        beta: how much a loss counts, in one over the units of the losses. The paper chooses it by validation;
            1e-4 is what others report of the authors' code.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, there are fewer than ``groups``
            losses; on the CPU, a loss is not above 0.
    """

    paper = "Shen et al., GO4Align: group optimization for multi-task alignment"
    arxiv = "2404.06486"
    year = 2024
    state = "log q [1, T]"
    positive = True

    _entry = "log_q"
    _rows = 1

    def __init__(self, groups: int, *, beta: float = 1e-4, scaling: Scaling = "raw") -> None:
        super().__init__(scaling=scaling)
        self.groups = _options.whole("groups", groups, at_least=1)
        self.beta = _options.real("beta", beta, at_least=0)

    def _start(self, losses: Tensor) -> Tensor:
        return super()._start(losses).sub_(math.log(losses.shape[0]))

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        tasks = losses.shape[0]
        if tasks < self.groups:
            raise ValueError(
                f"losses must have at least groups = {self.groups} entries, got {tasks}"
            )
        held = self._state_for(losses)[0]
        moved = held - losses * self.beta
        if there is None:
            held.copy_(moved.log_softmax(0))
            scale = losses.mean() / losses
        else:
            share = torch.where(there, held, -torch.inf).logsumexp(0)
            moved = torch.where(there, moved, -torch.inf).log_softmax(0) + share
            held.copy_(torch.where(there, moved, held))
            scale = torch.where(there, losses, 0.0).sum() / (there.sum() * losses)
        return centres(scale * held.exp(), self.groups, there)
