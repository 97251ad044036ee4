"""What the methods that look at the losses share: from losses to one weight a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmtl.ops import _check
from flatmtl.ops._status import INVALID_LOSS
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful, Weighting


class LossWeighting(Weighting):
    """Maps the task losses to weights; a step is one backward pass of sum_i w_i L_i.

    ``weighting(losses)``: [T] -> float64 [T], w_i = d(total)/d(L_i) where the method is a function of the
    losses. Nothing is read on the host of a CUDA tensor. A task that is missing gets weight 0, and what is
    kept of it stays as it was. In an optimizer the tasks' own parameters get their weighted gradient,
    as from one backward pass of the weighted loss.

    Args:
        scaling: "raw", the method's own weights; "sum_to_one" or "sum_to_tasks", divided by their sum,
            the latter times T.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    needs = "losses"
    one_pass = True
    #: Whether every loss must be above 0 (the method takes logarithms, or divides by losses).
    positive: bool = False

    def __init__(self, *, scaling: Scaling = "raw") -> None:
        super().__init__(scaling=scaling)

    def __call__(self, losses: Tensor, there: Tensor | None = None) -> Tensor:
        """Weights for the losses of one batch.

        Args:
            losses: floating-point [T].
            there: bool [T], the tasks that the batch has; None: all. The losses of the others may be
                anything.

        Returns:
            float64 [T].

        Raises:
            ValueError, TypeError: the losses have another shape or dtype, or do not fit the state; on
                the CPU, where looking costs nothing, also: a loss is not finite, or not above 0 for a method
                that needs that. On CUDA such a loss has weight 0 (``SolveStatus.invalid_loss``).
        """
        losses, there, bits = _sound(losses, there, type(self).__name__, positive=self.positive)
        weights = self._weigh(losses, there)
        if there is not None:
            weights = torch.where(there, weights, 0.0)
        self._last = SolveStatus(bits)
        if self.scaling == "raw":
            return weights
        size = weights.shape[0] if self.scaling == "sum_to_tasks" else 1
        total = weights.sum()
        return weights * torch.where(total != 0, size / total, 0.0)  # no task is there

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        """losses float64 [T], sound (1 where a task is not there) -> weights float64 [T].

        ``there``: bool [T]; None: all. What is kept of a task that is not there must stay.
        """
        raise NotImplementedError

    def _at_step(self, gram: Tensor | None, losses: Tensor | None, there: Tensor | None) -> Tensor:
        assert losses is not None
        return self(losses, there)

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        return weights


class StatefulLoss(LossWeighting, Stateful):
    """A loss-space weighting that keeps one float64 tensor [_rows, T] from call to call.

    A method says what it is by ``_entry``, ``_rows`` and, where it does not begin with zeros, ``_start``.
    It is written in place, so that a captured CUDA graph moves it at every replay.
    """

    _rank = 2
    _input = "losses"
    _rows: int

    def _size(self, losses: Tensor) -> tuple[int, ...]:
        return (self._rows, losses.shape[-1])

    def _start(self, losses: Tensor) -> Tensor:
        return torch.zeros(self._size(losses), dtype=torch.float64, device=losses.device)


class WithLosses(Weighting):
    """A weighting of the Gram matrix and the losses: ``weighting(gram, losses)``, one problem at a time.

    A task that is missing, and one whose gradient is zero or not finite, gets weight 0. The arguments
    are those of ``Weighting``.
    """

    needs = "gram and losses"
    #: Whether every loss must be above 0 (the method takes logarithms, or divides by losses).
    positive: bool = False

    def __call__(  # type: ignore[override]
        self, gram: Tensor, losses: Tensor, there: Tensor | None = None
    ) -> Tensor:
        """Weights for one Gram matrix and the losses that it is of.

        Args:
            gram: float32 or float64 [T, T], symmetric positive semi-definite.
            losses: floating-point [T], on the same device.
            there: bool [T], the tasks that the batch has; None: all.

        Returns:
            float64 [T].

        Raises:
            ValueError, TypeError: ``gram`` does not fit, as for every weighting, or ``losses`` does not, as
                for the loss-space ones.
        """
        tasks = _check.gram("gram", gram).shape[-1]
        if gram.dim() != 2:
            raise ValueError(
                f"gram must have shape [T, T] for {type(self).__name__}, got {list(gram.shape)}"
            )
        _check.like("losses", _check.tensor("losses", losses), "gram", gram, dtype=False)
        losses, there, bits = _sound(losses, there, type(self).__name__, positive=self.positive)
        if losses.shape[0] != tasks:
            raise ValueError(
                f"losses must have one entry for each of the {tasks} tasks, got {losses.shape[0]}"
            )
        weights, status = self._weigh(gram, losses, there)
        if there is not None:
            weights = torch.where(there, weights, 0.0)
        self._last = SolveStatus(status.bits | bits, status.residual)
        return self._scaled(gram, weights)

    def _weigh(
        self, gram: Tensor, losses: Tensor, there: Tensor | None
    ) -> tuple[Tensor, SolveStatus]:
        """gram [T, T], losses float64 [T] (1 where a task is not there) -> weights [T], status.

        ``there``: bool [T]; None: all. What is kept of a task that is not there must stay.
        """
        raise NotImplementedError

    def _at_step(self, gram: Tensor | None, losses: Tensor | None, there: Tensor | None) -> Tensor:
        assert gram is not None
        assert losses is not None
        return self(gram, losses, there)


_NONE = torch.zeros((), dtype=torch.int64)  # no status bits, on the CPU


def _sound(
    losses: Tensor, there: Tensor | None, method: str, *, positive: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses float64 [T], without a graph, 1 where a task is not there; ``there``; status bits.

    Raises:
        ValueError, TypeError: a loss that the method cannot take (values: on the CPU only; on CUDA its
            task is not there).
    """
    result = _check.tensor("losses", losses).detach().to(torch.float64)
    if result.dim() != 1 or result.shape[0] < 1:
        raise ValueError(
            f"losses must have shape [T] with at least one task, got {list(result.shape)}"
        )
    if there is not None and (there.dtype != torch.bool or there.shape != result.shape):
        raise ValueError(
            f"there must be bool {list(result.shape)}, as losses, got {there.dtype} {list(there.shape)}"
        )
    if there is not None:
        _check.like("there", there, "losses", result, dtype=False)
    if result.device.type == "cpu":
        bits = _NONE
        if not torch.compiler.is_compiling():
            _refuse(result, there, method, positive=positive)
    else:
        sound = result.isfinite() & (result > 0) if positive else result.isfinite()
        wrong = ~sound if there is None else ~sound & there
        bits = wrong.any() * INVALID_LOSS
        there = sound if there is None else sound & there
    if there is not None:
        result = torch.where(there, result, 1.0)
    return result, there, bits


def _refuse(losses: Tensor, there: Tensor | None, method: str, *, positive: bool) -> None:
    """Raises ValueError for losses on the CPU that the method cannot take."""
    counted = None if there is None else there.tolist()
    for task, value in enumerate(losses.tolist()):
        if counted is not None and not counted[task]:
            continue
        if not math.isfinite(value):
            raise ValueError(f"losses must be finite, got {value} for task {task}")
        if positive and value <= 0:
            raise ValueError(f"losses must be above 0 for {method}, got {value} for task {task}")
