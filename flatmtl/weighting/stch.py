"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import StatefulLoss
from flatmtl.weighting._shares import among, optional, per_task, shares


class STCH(StatefulLoss):
    """Smooth Tchebycheff scalarization (Lin et al., arXiv 2402.19078): a smooth maximum of the losses.

    mu log sum_i exp(lambda_i (L_i - z_i) / mu), so that w_i = lambda_i softmax(lambda (L - z) / mu)_i. A
    small mu is the maximum of lambda_i (L_i - z_i) alone.

    With ``warmup``, the form of the authors' multi-task code: sum_i log L_i (w_i = 1 / L_i) for so many
    calls, whose mean losses m are kept; from then on T mu log sum_i exp(log(L_i / m_i) / mu), so that
    w_i = T softmax(log(L / m) / mu)_i / L_i. Losses must then be above 0. A task counts the calls in which it
    was there, and takes part in the maximum only once it has had its own; T: those there that have.

    Args:
        mu: how smooth, in units of lambda_i L_i, without one in the second form. 1 is LibMTL's; the paper
            tries 0.01 to 1.
        preference: lambda, [T], not negative; None: 1/T. Only without ``warmup``.
        reference: z, the smallest values that the losses can have, [T]; None: 0. Only without ``warmup``.
        warmup: calls before the second form; 0: the first form. The authors' scripts warm up for epochs.
        average: how many of the last of these the means are over; None: all. The authors' code: one epoch.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, an option has not one entry for
            each task.
    """

    paper = "Lin et al., Smooth Tchebycheff scalarization for multi-objective optimization"
    arxiv = "2402.19078"
    year = 2024
    state = "mean losses and count of the warm-up [2, T]"

    _entry = "reference"
    _rows = 2

    def __init__(
        self,
        *,
        mu: float = 1.0,
        preference: _options.Vector | None = None,
        reference: _options.Vector | None = None,
        warmup: int = 0,
        average: int | None = None,
        scaling: Scaling = "raw",
    ) -> None:
        super().__init__(scaling=scaling)
        self.mu = _options.real("mu", mu, above=0)
        self.preference = optional("preference", preference)
        self.reference = optional("reference", reference, negative=True)
        self.warmup = _options.whole("warmup", warmup, at_least=0)
        for name in ("preference", "reference"):
            if self.warmup > 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None with warmup, which has none")
        self.average = warmup if average is None else _options.whole("average", average)
        if average is not None and not 1 <= average <= warmup:
            raise ValueError(f"average must be from 1 to warmup, {warmup}, got {average}")
        self.positive = self.warmup > 0

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        if self.warmup:
            return self._relative(losses, there)
        preference: Tensor | float = 1 / losses.shape[0]
        if self.preference is not None:
            self.preference = preference = per_task("preference", self.preference, losses)
        if self.reference is not None:
            self.reference = per_task("reference", self.reference, losses)
            losses = losses - self.reference
        return among(losses * preference, there, self.mu).mul_(preference)

    def _relative(self, losses: Tensor, there: Tensor | None) -> Tensor:
        """The weights of the form with a warm-up; counts this call."""
        mean, count = self._state_for(losses).unbind(0)
        warm = count < self.warmup
        counted = warm if there is None else warm & there
        # of those that are averaged; until these begin, each loss takes the place of the one before
        nth = (count - (self.warmup - self.average - 1)).clamp_(min=1.0)
        ready = ~warm if there is None else there & ~warm
        smooth = shares(losses.log() - mean.log(), ready, self.mu)
        weights = torch.where(warm, 1.0, smooth) / losses
        mean.lerp_(losses, nth.reciprocal_().mul_(counted))
        count.add_(counted)
        return weights

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        return super()._tensors(gram) if self.warmup else []
