"""What the methods with a learned number a task share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import LossWeighting


class Learned(LossWeighting):
    """A loss-space weighting with one learned number s_i a task, moved by the base optimizer.

    ``parameters()`` is one float64 [T]; an optimizer of flatmtl takes it as a group of its own, without
    weight decay. The gradient at a call is that of the method's total at the losses of that call; a
    task that is missing has 0.

    Args:
        tasks: T.
        init: s before the first step, a number or [T].
        lr: of s; None: the base optimizer's.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, there are not ``tasks`` losses.
    """

    state = "learned s [T]"

    def __init__(
        self,
        tasks: int,
        *,
        init: float | _options.Vector = 0.0,
        lr: float | None = None,
        scaling: Scaling = "raw",
    ) -> None:
        super().__init__(scaling=scaling)
        self.tasks = _options.whole("tasks", tasks, at_least=1)
        if isinstance(init, (int, float)):
            begin = torch.full((tasks,), _options.real("init", init), dtype=torch.float64)
        else:
            begin = _options.vector("init", init, negative=True)
        if begin.shape[0] != tasks:
            raise ValueError(f"init must have one entry for each of the {tasks} tasks, got {init}")
        self.lr = None if lr is None else _options.real("lr", lr, at_least=0)
        self._begin = begin
        self._learned = nn.Parameter(begin.clone())
        self._gradient: Tensor | None = None  # [T], at the last call

    def parameters(self) -> list[nn.Parameter]:
        """s, float64 [T]."""
        return [self._learned]

    def _gradients(self) -> list[Tensor]:
        if self._gradient is None:
            raise RuntimeError(f"{type(self).__name__} has not been called yet: no gradient")
        return [self._gradient]

    def _s(self, losses: Tensor) -> Tensor:
        """s on the losses' device, without a graph."""
        if losses.shape[0] != self.tasks:
            raise ValueError(
                f"losses must have one entry for each of the {self.tasks} tasks, got {losses.shape[0]}"
            )
        if self._learned.device != losses.device:
            self._learned.data = self._learned.data.to(
                losses.device
            )  # an optimizer holds the object
        return self._learned.detach()

    def _keep(self, gradient: Tensor, there: Tensor | None) -> None:
        """Notes the gradient [T] of this call."""
        self._gradient = gradient if there is None else torch.where(there, gradient, 0.0)

    def _set(self, values: Tensor) -> None:
        with torch.no_grad():  # in place: an optimizer holds it
            self._learned.copy_(values)
        self._gradient = None

    def reset(self) -> None:
        """s back to ``init``."""
        super().reset()
        self._set(self._begin)

    def state_dict(self) -> dict[str, Any]:
        """s."""
        return {**super().state_dict(), "s": self._learned.detach().clone()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        s = state["s"]
        if not isinstance(s, Tensor) or s.dtype != torch.float64 or s.shape != (self.tasks,):
            raise ValueError(f"state['s'] must be float64 [{self.tasks}], got {s!r}")

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        self._set(state["s"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gradient": None}
