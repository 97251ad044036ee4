"""What the methods share that learn one number a task with the base optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatmtl.weighting import _options
from flatmtl.weighting._base import Weighting


class Learned(Weighting):
    """A weighting with a learnable number a task: a float64 ``nn.Parameter`` [T], ``learned``.

    Its gradient is written by the method, not by autograd, and a base optimizer moves it. It is the same
    object for good: states are loaded and reset in place. Copied or pickled together with a base
    optimizer that holds it, it stays the one that the copy holds.

    Args:
        tasks: T.
        init: before the first step, a number or [T].
        lr: the learning rate of its parameter group; None: the base optimizer's default.
        **options: as for every weighting of the kind.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    _learned_entry: str

    def __init__(
        self,
        tasks: int,
        *,
        init: float | _options.Vector,
        lr: float | None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**options)
        self.tasks = _options.whole("tasks", tasks, at_least=1)
        self.lr = None if lr is None else _options.real("lr", lr, at_least=0)
        if isinstance(init, (int, float)):
            begin = torch.full((tasks,), _options.real("init", init), dtype=torch.float64)
        else:
            begin = _options.vector("init", init, negative=True)
        if begin.shape[0] != tasks:
            raise ValueError(f"init must have one entry for each of the {tasks} tasks, got {init}")
        self._begin = begin
        self.learned = nn.Parameter(begin.clone())
        self._slope = torch.zeros_like(begin)

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

    def _learn(self, slope: Tensor, there: Tensor | None) -> None:
        """Notes the gradient [T] of this call; that of a task that is not there is 0."""
        self._slope = slope if there is None else torch.where(there, slope, 0.0)

    def accumulate(self) -> None:
        """Adds the gradient of the last call to that of ``learned``: for a loop without the optimizer."""
        grad = self.learned.grad
        self.learned.grad = self._slope.clone() if grad is None else grad + self._slope

    def _put(self, values: Tensor) -> None:
        with torch.no_grad():
            self.learned.copy_(values)
        self._slope = torch.zeros_like(self.learned, requires_grad=False)

    def reset(self) -> None:
        """Back to the state before the first call, in place; a base optimizer's momentum stays."""
        super().reset()
        self._put(self._begin)

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
        self._put(state[self._learned_entry])
