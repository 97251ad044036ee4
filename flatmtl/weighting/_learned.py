"""What the methods share that learn one number a task with the base optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, Weighting


class Learned(Weighting):
    """A weighting with a learnable number a task: a float64 ``nn.Parameter`` [T], ``learned``.

    Its gradient is written by the method, not by autograd, and a base optimizer moves it. It is the same
    object for good: states are loaded and reset in place. Copied or pickled together with a base
    optimizer that holds it, it stays the one that the copy holds.

    Args:
        tasks: T.
        lr: the learning rate of its parameter group; None: the base optimizer's default.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    _learned_entry: str
    _learned_start: float

    def __init__(
        self,
        tasks: int,
        *,
        lr: float | None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.tasks = _options.whole("tasks", tasks, at_least=1)
        self.lr = None if lr is None else _options.real("lr", lr, at_least=0)
        start = torch.full((tasks,), self._learned_start, dtype=torch.float64)
        self.learned = nn.Parameter(start)
        self._slope = torch.zeros_like(start)

    def parameters(self) -> list[nn.Parameter]:
        """The learnable, alone: float64 [T]."""
        return [self.learned]

    def _gradients(self) -> list[Tensor]:
        return [self._slope]

    def _learned_for(self, losses: Tensor) -> Tensor:
        """The learnable's values [T], on the losses' device: it moves there at the first call.

        Raises:
            ValueError: there are not as many losses as numbers.
        """
        if losses.shape[0] != self.tasks:
            raise ValueError(
                f"losses must have one entry for each of the {self.tasks} tasks of "
                f"{type(self).__name__}, got {losses.shape[0]}"
            )
        if self.learned.device != losses.device:
            # the object stays: a base optimizer may hold it
            self.learned.data = self.learned.data.to(losses.device)
        return self.learned.detach()

    def reset(self) -> None:
        """Back to the state before the first call, in place; a base optimizer's momentum stays."""
        super().reset()
        with torch.no_grad():
            self.learned.fill_(self._learned_start)
        self._slope = torch.zeros_like(self.learned, requires_grad=False)

    def state_dict(self) -> dict[str, Any]:
        """The learnable's values and what else the method keeps."""
        return {**super().state_dict(), self._learned_entry: self.learned.detach().clone()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        held = state[self._learned_entry]
        if not (
            isinstance(held, Tensor)
            and held.dtype == torch.float64
            and held.shape == (self.tasks,)
            and bool(held.isfinite().all())
        ):
            raise ValueError(
                f"state[{self._learned_entry!r}] must be finite float64 [{self.tasks}], got {held!r}"
            )

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        with torch.no_grad():
            self.learned.copy_(state[self._learned_entry])
        self._slope = torch.zeros_like(self.learned, requires_grad=False)
