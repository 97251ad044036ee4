"""Dynamic weight average."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import StatefulLoss
from flatmtl.weighting._shares import shares


class DWA(StatefulLoss):
    """Dynamic weight average (Liu et al., MTAN, arXiv 1803.10704): w = T softmax(r / temperature).

    r_i is the mean loss of the last period over that of the period before it, so that the tasks that fall
    more slowly get more weight. The authors' periods are epochs: ``steps`` is then the number of steps in
    one. A task's periods consist of the calls in which it was there; until it has two, its r is 1. T: the
    tasks that are there.

    Args:
        temperature: 2 is the paper's; large: equal weights.
        steps: calls in a period. 1: each loss over the one before, which is as noisy as the batches are.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call on the CPU, a loss is not above 0.
    """

    paper = "Liu et al., End-to-end multi-task learning with attention"
    arxiv = "1803.10704"
    year = 2019
    state = "losses of the last periods [4, T]"
    positive = True

    _entry = "periods"
    _rows = 4

    def __init__(
        self, *, temperature: float = 2.0, steps: int = 1, scaling: Scaling = "raw"
    ) -> None:
        super().__init__(scaling=scaling)
        self.temperature = _options.real("temperature", temperature, above=0)
        self.steps = _options.whole("steps", steps, at_least=1)

    def _start(self, losses: Tensor) -> Tensor:
        # means of the last period and of the one before it (NaN: none); the present one's sum and count
        held = super()._start(losses)
        held[:2] = torch.nan
        return held

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        held = self._state_for(losses)
        last, older, total, count = held.unbind(0)
        rate = (last / older).nan_to_num_(nan=1.0)
        weights = shares(rate, there, self.temperature)
        if self.steps == 1:
            _put(older, last, there)
            _put(last, losses, there)
            return weights
        total.add_(losses if there is None else losses * there)
        count.add_(1.0 if there is None else there)
        full = count >= self.steps
        _put(older, last, full)
        _put(last, total / count, full)
        held[2:].masked_fill_(full, 0.0)
        return weights


def _put(held: Tensor, values: Tensor, where: Tensor | None) -> None:
    held.copy_(values if where is None else torch.where(where, values, held))
