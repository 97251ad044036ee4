"""FAMO."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import StatefulLoss, _sound
from flatmtl.weighting._shares import among, optional, per_task

_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8  # Adam's, as in torch


class FAMO(StatefulLoss):
    """Fast adaptive multi-task optimization (Liu et al., arXiv 2306.03792): all losses fall at a like rate.

    With z = softmax of the logits and D_i = L_i - b_i + eps: w_i = (z_i / D_i) / sum_j (z_j / D_j), the
    gradient of c sum_i z_i log D_i, where the constant c makes the weights sum to 1. After the step the
    losses of the same batch are looked at again, and the logits move by one step of Adam on how much log D_i
    fell: a task that fell less than the others gets more. ``MultiTaskOptimizer`` does that by one more
    forward pass; elsewhere call ``update``. A task that is missing takes part in neither, and keeps its logit
    and Adam's averages.

    Args:
        lr: of the logits, Adam's; 0.025 is the authors'.
        weight_decay: of the logits, the paper's gamma. 1e-3 is that of most of the authors' run scripts
            (Cityscapes 0.01, the toy 0); their class has 0.01.
        min_losses: b, the smallest values that the losses can have, [T]; None: 0. A loss below it counts as
            it.
        eps: 1e-8 is the authors'. It is absolute: losses should be well above it.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, ``min_losses`` has not one entry
            for each task.
    """

    paper = "Liu et al., FAMO: fast adaptive multitask optimization"
    arxiv = "2306.03792"
    year = 2023
    looks_back = True
    state = "logits, Adam's averages, last losses [5, T]"

    _entry = "logits"
    _rows = 5

    def __init__(
        self,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: _options.Vector | None = None,
        eps: float = 1e-8,
        scaling: Scaling = "raw",
    ) -> None:
        super().__init__(scaling=scaling)
        self.lr = _options.real("lr", lr, at_least=0)
        self.weight_decay = _options.real("weight_decay", weight_decay, at_least=0)
        self.min_losses = optional("min_losses", min_losses, negative=True)
        self.eps = _options.real("eps", eps, above=0)

    def _start(self, losses: Tensor) -> Tensor:
        # logits, mean gradient, mean squared gradient, steps of Adam, log D at the last call (NaN: none)
        held = super()._start(losses)
        held[4] = torch.nan
        return held

    def _logs(self, losses: Tensor) -> Tensor:
        """log D, [T]."""
        if self.min_losses is not None:
            self.min_losses = per_task("min_losses", self.min_losses, losses)  # moved once
            losses = losses - self.min_losses
        return losses.clamp(min=0.0).add_(self.eps).log_()

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        held = self._state_for(losses)
        logs = self._logs(losses)
        held[4].copy_(logs if there is None else torch.where(there, logs, torch.nan))
        return among(held[0] - logs, there)  # z / D, over its sum

    def update(self, losses: Tensor, there: Tensor | None = None) -> None:
        """Moves the logits, after the model's step.

        Args:
            losses: floating-point [T], of the batch of the last call, computed again.
            there: as at that call.

        Raises:
            RuntimeError: there was no call.
            ValueError, TypeError: as for a call.
        """
        if self._held is None:
            raise RuntimeError("FAMO must be called with the losses before the step first")
        losses, there, _ = _sound(losses, there, type(self).__name__, positive=False)
        logits, first, second, steps, before = self._state_for(losses).unbind(0)
        both = ~before.isnan()
        if there is not None:
            both = both & there
        fall = torch.where(both, before - self._logs(losses), 0.0)
        z = torch.where(both, among(logits, both), 0.0)
        gradient = z * (fall - (z @ fall)) + self.weight_decay * logits
        moves = both.to(torch.float64)
        steps.add_(moves)
        first.add_((gradient - first).mul_(moves * (1 - _BETA1)))
        second.add_((gradient.square() - second).mul_(moves * (1 - _BETA2)))
        size = (second / (1 - _BETA2**steps)).sqrt_().add_(_ADAM_EPS)
        step = (first / (1 - _BETA1**steps)).div_(size).mul_(self.lr)
        logits.sub_(torch.where(both, step, 0.0))

    def _after_step(self, losses: Tensor, there: Tensor | None) -> None:
        self.update(losses, there)
