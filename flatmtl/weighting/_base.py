"""What every weighting shares: from a Gram matrix of task gradients to one weight a task."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from flatmtl.ops import _check
from flatmtl.ops.reference import INACTIVE_TASK, NO_ACTIVE_TASK, NOT_CONVERGED, RIDGE_RAISED

W = TypeVar("W", bound="Weighting")


@dataclass(frozen=True)
class SolveStatus:
    """What a solve left behind, on its device; the properties read it (and wait for it on CUDA).

    Attributes:
        bits: int64 [B].
        residual: float64 [B], of the method's optimality conditions; None where a method has none.
    """

    bits: Tensor
    residual: Tensor | None = None

    def _any(self, bit: int) -> bool:
        return bool((self.bits & bit).any())

    @property
    def no_active_task(self) -> bool:
        """Every gradient of some problem was zero or not finite; its weights are 0."""
        return self._any(NO_ACTIVE_TASK)

    @property
    def inactive_task(self) -> bool:
        """Some task's gradient was zero or not finite; its weight is 0."""
        return self._any(INACTIVE_TASK)

    @property
    def not_converged(self) -> bool:
        """The solver stopped short of its tolerance; ``residual`` says how far."""
        return self._any(NOT_CONVERGED)

    @property
    def ridge_raised(self) -> bool:
        """The Gram matrix was too noisy for the method's ridge; a larger one, up to 1e-6, was used."""
        return self._any(RIDGE_RAISED)

    @property
    def ok(self) -> bool:
        """All tasks took part and the solver reached its tolerance."""
        return not self._any(NO_ACTIVE_TASK | INACTIVE_TASK | NOT_CONVERGED)


class Weighting:
    """Maps the Gram matrix of the task gradients to weights; the update is d = sum_i w_i g_i.

    ``weighting(gram)``: [T, T] -> float64 [T], or [B, T, T] -> [B, T] for B problems at once. Nothing is
    read on the host. A task whose gradient is zero or not finite gets weight 0.
    """

    #: True if only the diagonal of the Gram matrix is looked at (the squared norms).
    diagonal_only = False

    def __init__(self) -> None:
        self._last: SolveStatus | None = None

    def __call__(self, gram: Tensor) -> Tensor:
        """Weights for one Gram matrix or a batch.

        Args:
            gram: float32 or float64 [T, T] or [B, T, T], symmetric.

        Returns:
            float64 [T] or [B, T].

        Raises:
            ValueError, TypeError: ``gram`` has another shape or dtype.
        """
        square = _check.gram("gram", gram)
        single = square.dim() == 2
        weights, self._last = self._solve(square.unsqueeze(0) if single else square)
        return weights[0] if single else weights

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        """gram [B, T, T] -> weights float64 [B, T], status."""
        raise NotImplementedError

    def last_status(self) -> SolveStatus:
        """The status of the last call.

        Raises:
            RuntimeError: there was none.
        """
        if self._last is None:
            raise RuntimeError(f"{type(self).__name__} has not been called yet: there is no status")
        return self._last

    def reset(self) -> None:
        """Back to the state before the first call."""

    def twin(self: W) -> W:
        """A copy with a state and a random stream of its own, for a second family of gradients."""
        other = copy.deepcopy(self)
        other.reset()
        return other

    def state_dict(self) -> dict[str, Any]:
        """What must be saved for a resumed run to go on bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: ``state`` does not have the entries of this weighting.
        """
        self._check_state(state, set())

    def _check_state(self, state: dict[str, Any], keys: set[str]) -> None:
        if set(state) != keys:
            raise ValueError(
                f"state must have the entries {sorted(keys)} of {type(self).__name__}, "
                f"got {sorted(state)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # the last status is a reading, not a state: copies and pickles go without
        return {**self.__dict__, "_last": None}


def active_tasks(gram: Tensor) -> tuple[Tensor, Tensor]:
    """gram [B, T, T] -> which tasks have a finite, non-zero gradient, bool [B, T]; status bits [B]."""
    norm2 = gram.diagonal(dim1=1, dim2=2)
    active = norm2.isfinite() & (norm2 > 0)
    none, some = ~active.any(1), ~active.all(1)
    return active, none.to(torch.int64) * NO_ACTIVE_TASK + some.to(torch.int64) * INACTIVE_TASK
