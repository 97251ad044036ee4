"""GradNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops._status import INVALID_LOSS
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful
from flatmtl.weighting._learned import Learned
from flatmtl.weighting._loss import WithLosses

_LEAST = 1e-4  # of a weight, before all are divided so that their sum is T
_LARGEST = 1e100  # of L_i / L_i(0): two infinite ones would have no ratio


class GradNorm(Learned, Stateful, WithLosses):
    """GradNorm (Chen et al., arXiv 1711.02257): weights learned so that all tasks train at one rate.

    With n_i = ||g_i|| and r_i = (L_i / L_i(0)) / mean, w goes down the gradient of
    sum_i |w_i n_i - mean_j(w_j n_j) r_i^alpha|, the second term held constant, by the base optimizer's step.
    After it w is at least 1e-4 (here, not in the paper) and divided so that sum w = T. The update is that
    of the w before the step. The tasks' own parameters are weighted by w too.

    Two things are not the paper's. It takes n_i at the last shared layer's weights, to save time; here they
    are of all shared parameters, or of the features with ``jacobian=Representation(trunk)``, which
    saves that time too. And the gradient of w is divided by mean n_j: the paper's,
    sign(w_i n_i - ...) n_i, makes SGD's step grow with the gradients; Adam hardly sees a common factor.

    ``weighting(gram, losses)``, the losses at least 0. L_i(0) is task i's first loss above 0. A task that is
    missing, or whose gradient is zero or not finite, has weight 0 in that call, counts in no mean and
    keeps its w to the bit.

    Args:
        tasks: T.
        alpha: how strongly rates are pulled together; 1.5. 0: equal norms.
        lr: the learning rate of w; 0.025. None: the base optimizer's default.
        scaling: as for every weighting; not of w itself.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, as for every weighting of
            Gram matrix and losses, and for a negative loss.
    """

    diagonal_only = True
    paper = "Chen et al., GradNorm (ICML)"
    arxiv = "1711.02257"
    year = 2018
    needs = "norms and losses"
    state = "w [T], first losses [T]"

    _entry = "first"
    _learned_entry = "w"

    def __init__(
        self,
        tasks: int,
        *,
        alpha: float = 1.5,
        lr: float | None = 0.025,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(tasks, init=1.0, lr=lr, scaling=scaling, max_norm=max_norm)
        self.alpha = _options.real("alpha", alpha, at_least=0)
        self._before: Tensor | None = None  # w at the last call
        self._active: Tensor | None = None  # the tasks that took part in it
        self._pending = False

    def _size(self, losses: Tensor) -> tuple[int, ...]:
        return (self.tasks,)

    def _start(self, losses: Tensor) -> Tensor:
        # NaN: a task's first loss is yet to come
        return torch.full((self.tasks,), torch.nan, dtype=torch.float64, device=losses.device)

    def _weigh(
        self, gram: Tensor, losses: Tensor, there: Tensor | None
    ) -> tuple[Tensor, SolveStatus]:
        w = self._learned_for(losses)
        negative = losses < 0
        if losses.device.type == "cpu" and bool(negative.any()):
            task = int(negative.long().argmax())
            raise ValueError(
                f"losses must be at least 0 for GradNorm, got {float(losses[task])} for task {task}"
            )
        ones, bits = ops.solve_constant(gram)
        active = (ones != 0) & ~negative
        bits = bits | negative.any() * INVALID_LOSS
        begins = losses > 0
        if there is not None:
            active, begins = active & there, begins & there
        first = self._state_for(losses)
        # in place, so that a captured CUDA graph moves it at every replay
        first.copy_(torch.where(first.isnan() & begins, losses, first))
        self._slope = self._slopes(w, gram, losses / first, active)
        self._before, self._active, self._pending = w.clone(), active, True
        return torch.where(active, w, 0.0), SolveStatus(bits)

    def _slopes(self, w: Tensor, gram: Tensor, relative: Tensor, active: Tensor) -> Tensor:
        """The gradient of w [T] over mean n_j; ``relative`` is L_i / L_i(0), NaN before the first loss."""
        norms = torch.where(active, gram.diagonal().to(torch.float64), 0.0).sqrt()
        count = active.sum().clamp(min=1)
        relative = torch.where(relative.isnan(), 1.0, relative.clamp(max=_LARGEST))
        mean = torch.where(active, relative, 0.0).sum() / count
        rate = torch.where(mean > 0, relative / mean, 1.0)
        contribution = w * norms
        target = contribution.sum() / count * rate**self.alpha
        slope = torch.sign(contribution - target) * norms / (norms.sum() / count)
        return torch.where(active, slope, 0.0)

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        return self._before

    def _made(self, ok: Tensor | None) -> None:
        super()._made(ok)
        if not self._pending:
            return
        assert self._before is not None
        assert self._active is not None
        moved = torch.where(self._active, self.learned.detach().clamp(min=_LEAST), 0.0)
        room = self.tasks - torch.where(self._active, 0.0, self._before).sum()
        taken = self._active if ok is None else self._active & ok.to(self._active.device)
        with torch.no_grad():
            self.learned.copy_(torch.where(taken, moved * (room / moved.sum()), self._before))
        self._pending = False

    def reset(self) -> None:
        """Back to the state before the first call, in place; a base optimizer's momentum stays."""
        super().reset()
        self._before = self._active = None
        self._pending = False

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        w, first = state["w"], state["first"]
        if not (bool((w > 0).all()) and abs(float(w.sum()) / self.tasks - 1) <= 1e-6):
            raise ValueError(f"state['w'] must be above 0 with sum {self.tasks}, got {w.tolist()}")
        if first is not None and first.shape != (self.tasks,):
            raise ValueError(
                f"state['first'] must have shape [{self.tasks}], got {list(first.shape)}"
            )

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        self._before = self._active = None
        self._pending = False
