"""IMTL: losses on one scale by what is learned, gradients by equal projections."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._learned import Learned
from flatmtl.weighting._loss import WithLosses


class IMTL(Learned, WithLosses):
    """IMTL (Liu et al., ICLR 2021): IMTL-L on the losses, IMTL-G on the gradients of the scaled losses.

    IMTL-L scales loss i by e^(s_i), with s learned: its gradient is that of sum_i e^(s_i) L_i - s_i, which
    is least where e^(s_i) L_i = 1. IMTL-G then finds the a_i, of sum 1, with which the gradients
    e^(s_i) g_i project alike on the update. w_i = a_i e^(s_i); the tasks' own parameters get the gradient
    of e^(s_i) L_i. The direction in the shared parameters is ``IMTLG``'s, as that does not see how a loss
    is scaled; s decides its length. The paper takes the gradients at the features
    (``jacobian=Representation(trunk)``).

    ``weighting(gram, losses)``; every loss must be above 0, or its scale has no optimum. Where the
    solution points against the gradients, w_i is proportional to 1/||g_i||, as for ``IMTLG``.

    Args:
        tasks: T.
        lr: the learning rate of s; None: the base optimizer's default, as in the paper.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, as for every weighting of
            Gram matrix and losses.
    """

    paper = "Liu et al., Towards impartial multi-task learning (ICLR)"
    year = 2021
    positive = True
    state = "log scales of the losses s [T]"

    _learned_entry = "s"

    def __init__(
        self,
        tasks: int,
        *,
        lr: float | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(tasks, init=0.0, lr=lr, scaling=scaling, max_norm=max_norm)
        self._factors: Tensor | None = None

    def _weigh(
        self, gram: Tensor, losses: Tensor, there: Tensor | None
    ) -> tuple[Tensor, SolveStatus]:
        s = self._learned_for(losses)
        self._factors = factors = s.exp()
        self._learn(factors * losses - 1, there)
        # a does not see a common factor; without it the squares cannot overflow
        relative = (s - s.max()).exp()
        scaled = gram * (relative.unsqueeze(0) * relative.unsqueeze(1))
        if there is not None:
            scaled = torch.where(there.unsqueeze(0) & there.unsqueeze(1), scaled, 0.0)
        ridge = (
            1e-10 if gram.dtype == torch.float64 else 1e-6
        )  # a Gram matrix is as exact as it came
        alpha, bits, residual = ops.solve_imtl_g(scaled, ridge)
        return alpha * factors, SolveStatus(bits, residual)

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        return self._factors
