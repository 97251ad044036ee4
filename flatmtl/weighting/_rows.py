"""What the methods share that see the task gradients themselves, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmtl import cuda_graphs
from flatmtl.weighting._base import Weighting
from flatmtl.weighting._loss import LossWeighting, WithLosses

STATE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RowMethod(Weighting):
    """An aggregation of the rows of J that their Gram matrix does not determine: ``aggregate(jac, method)``.

    In ``METHODS`` and in the optimizer it stands where a weighting does. It has no ``scaling`` and no
    ``max_norm``: not all of these updates are weighted sums.
    """

    needs = "rows"

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, gram: Tensor) -> Tensor:
        """Raises TypeError: a Gram matrix is not enough."""
        raise TypeError(
            f"{type(self).__name__} must be given the task gradients themselves, got a Gram matrix: "
            "flatmtl.aggregate(jac, method)"
        )

    def aggregate(
        self,
        jac: Tensor,
        out: Tensor,
        *,
        losses: Tensor | None = None,
        sound: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | None:
        """Writes the update into ``out``; leaves ``jac`` as it is.

        Args:
            jac: [T, P].
            out: [P], on the device of ``jac``, of its dtype or float32 beside half precision.
            losses: float64 [T], for the methods that look at them.
            sound: bool [T], the tasks whose gradients count; None: all. The rows of the others may hold NaN
                and must not reach ``out`` or the state.
            scale: 0-dim float64, by which the rows are too large (a GradScaler's); None: 1. ``out`` is
                to be as much too large; the state is of the unscaled gradients.

        Returns:
            float64 [T], the weights where the update is sum_i w_i jac_i; else None.
        """
        raise NotImplementedError


class RowState(RowMethod):
    """A row method that keeps a [T, P] matrix from step to step.

    The new matrix is made beside the old one, and takes its place when the step is made: a step that is
    dropped or skipped leaves it as it was. So twice [T, P] in ``state_dtype`` are held.

    Args:
        state_dtype: of what is kept; None: that of the rows. ``torch.bfloat16`` halves it for float32 rows.

    Raises:
        TypeError: ``state_dtype`` is no floating-point type for rows.
    """

    _entry: str

    def __init__(self, *, state_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if state_dtype is not None and state_dtype not in STATE_TYPES:
            raise TypeError(
                "state_dtype must be torch.float32, float64, bfloat16, float16 or None, got "
                f"{state_dtype!r}"
            )
        self.state_dtype = state_dtype
        self._held: Tensor | None = None  # [T, P]
        self._next: Tensor | None = None  # [T, P], what it will be if the step is made
        self._layout: tuple[tuple[int, int, int], ...] | None = None
        self._pending = False

    def _state_for(self, jac: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept [T, P], zeros at first, and where its successor goes; ``_pending`` is set.

        Raises:
            ValueError: it is of rows of another shape.
        """
        if self._held is None or self._held.device != jac.device:
            cuda_graphs.refuse(
                f"{type(self).__name__} must have been called before, on this device,"
            )
        if self._held is None:
            dtype = self.state_dtype or jac.dtype
            self._held = torch.zeros(jac.shape, dtype=dtype, device=jac.device)
        elif self._held.shape != jac.shape:
            raise ValueError(
                f"jac must be like those before (their {self._entry} has shape "
                f"{list(self._held.shape)}), got {list(jac.shape)}: reset() starts anew"
            )
        elif self._held.device != jac.device:
            self._held = self._held.to(jac.device)
        if self._next is None or self._next.shape != jac.shape or self._next.device != jac.device:
            self._next = torch.empty_like(self._held)
        self._pending = True
        return self._held, self._next

    def _made(self, ok: Tensor | None) -> None:
        super()._made(ok)
        if not self._pending:
            return
        assert self._held is not None
        assert self._next is not None
        # copied, not swapped: a captured CUDA graph goes on reading from where it lies
        if ok is None:
            self._held.copy_(self._next)
        else:
            self._held.copy_(torch.where(ok.to(self._held.device), self._next, self._held))
        self._pending = False

    def _undone(self) -> None:
        super()._undone()
        self._pending = False

    def reset(self) -> None:
        """Back to the state before the first step."""
        super().reset()
        self._held = self._next = self._layout = None
        self._pending = False

    def _carry(self, layout: tuple[tuple[int, int, int], ...], size: int) -> None:
        """What is kept, moved to where the parameters lie now.

        Args:
            layout: of every parameter its id, offset in a row and length.
            size: of a row.
        """
        held, old = self._held, self._layout
        if held is not None and old is not None and old != layout:
            moved = held.new_zeros(held.shape[0], size)
            at = {name: (start, length) for name, start, length in old}
            for name, start, length in layout:
                if name in at:
                    was, _ = at[name]
                    moved[:, start : start + length] = held[:, was : was + length]
            self._held, self._next = moved, None
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        """What is kept [T, P]; None before the first step."""
        held = self._held
        return {**super().state_dict(), self._entry: None if held is None else held.clone()}

    def __getstate__(self) -> dict[str, Any]:
        # a copy is of other parameters, which lie as these do
        return {**super().__getstate__(), "_layout": None, "_next": None, "_pending": False}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        held = state[self._entry]
        if held is not None and not (
            isinstance(held, Tensor) and held.dtype in STATE_TYPES and held.dim() == 2
        ):
            raise ValueError(
                f"state[{self._entry!r}] must be None or a floating-point [T, P] matrix, got {held!r}"
            )

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        held = state[self._entry]
        self._held = None if held is None else held.detach().clone().contiguous()
        self._next = self._layout = None
        self._pending = False


def check_takes_gram(weighting: Weighting) -> None:
    """Raises TypeError for a method to which a Gram matrix alone is not enough."""
    if isinstance(weighting, (LossWeighting, WithLosses, RowMethod)):
        raise TypeError(
            f"weighting must work on Gram matrices, got {type(weighting).__name__}, which needs "
            f"{weighting.needs}"
        )
