"""Geometric loss strategy."""

from __future__ import annotations

from torch import Tensor

from flatmtl.weighting._loss import LossWeighting


class GLS(LossWeighting):
    """Geometric loss strategy (Chennupati et al., MultiNet++, arXiv 1904.08492): (prod_i L_i)^(1/T).

    w_i = M / (T L_i), M the geometric mean of the losses, by logarithms: no product that overflows. Of tasks
    that are missing neither M nor T knows.

    Args:
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: ``scaling`` is none of these; at a call on the CPU, a loss is not above 0.
    """

    paper = "Chennupati et al., MultiNet++: multi-stream feature aggregation and geometric loss strategy"
    arxiv = "1904.08492"
    year = 2019
    positive = True

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        logs = losses.log()  # 0 where a task is not there
        count = logs.shape[0] if there is None else there.sum()
        return (logs.sum() / count - logs).exp_().div_(count)
