"""A method like EMTL: relative contributions of the tasks with a variance penalty."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._loss import WithLosses

Contribution = Literal["norm_over_loss", "loss_over_norm"]

_CONTRIBUTIONS = ("norm_over_loss", "loss_over_norm")


class EMTLLike(WithLosses):
    """A reconstruction after the abstract of EMTL (arXiv 2306.09373). It is not the paper's formula.

    The abstract speaks of the tasks' relative contribution, "value of task-specific loss divides its raw
    gradient norm", and of a variance regularisation that makes them closer; which divides which,
    where the weights enter and with what coefficient it does not say, and no code is public. Here:
    with k_i = n_i / L_i over its mean, n_i = ||g_i||, and c_i = w_i k_i,

        w = argmin sum_i (w_i - 1)^2 + lambda Var(c),  sum w = T,  Var(c) = mean (c_i - mean c)^2.

    In closed form, with d_i = 1 + lambda k_i^2 / T, A = sum 1/d_i, B = sum k_i / d_i:
    w_i = T (A + lambda k_i B / T) / (d_i (A^2 + lambda B^2 / T)). So w > 0. As k is relative, nothing
    depends on a common scale of the gradients or of the losses. lambda = 0: w = 1; lambda large: all c_i
    equal, w_i proportional to 1 / k_i.

    ``weighting(gram, losses)``; every loss must be above 0. A task that is missing, or whose gradient is zero
    or not finite, has weight 0, and the others are weighed as if it were not there (T is theirs).

    Args:
        lambda_: the coefficient; 1, of no paper.
        contribution: "norm_over_loss": k_i = n_i / L_i; "loss_over_norm": L_i / n_i.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, as for every weighting of
            Gram matrix and losses.
    """

    diagonal_only = True
    paper = "a reconstruction after the abstract of EMTL"
    arxiv = "2306.09373"
    year = 2023
    needs = "norms and losses"
    positive = True

    def __init__(
        self,
        *,
        lambda_: float = 1.0,
        contribution: Contribution = "norm_over_loss",
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.lambda_ = _options.real("lambda_", lambda_, at_least=0)
        if contribution not in _CONTRIBUTIONS:
            raise ValueError(
                f"contribution must be one of {', '.join(_CONTRIBUTIONS)}, got {contribution!r}"
            )
        self.contribution = contribution

    def _weigh(
        self, gram: Tensor, losses: Tensor, there: Tensor | None
    ) -> tuple[Tensor, SolveStatus]:
        ones, bits = ops.solve_constant(gram)
        active = ones != 0
        if there is not None:
            active = active & there
        here = active.to(torch.float64)
        count = here.sum().clamp(min=1)
        norms = torch.where(active, gram.diagonal().to(torch.float64), 1.0).sqrt()
        k = norms / losses if self.contribution == "norm_over_loss" else losses / norms
        mean = torch.where(active, k, 0.0).sum() / count
        k = torch.where(active, k / mean, 0.0)  # [T]
        # The Hessian is diagonal plus rank one. Eliminating both multipliers leaves sums of positive
        # terms alone: nothing cancels, however far the contributions lie apart.
        rate = self.lambda_ / count
        d = 1 + rate * k * k
        a, b = (here / d).sum(), (k / d).sum()
        weights = here * count * (a + rate * k * b) / (d * (a * a + rate * b * b))
        return torch.where(active, weights, 0.0), SolveStatus(bits)
