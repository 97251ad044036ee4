"""What every weighting shares: from a Gram matrix of task gradients to one weight a task."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from flatmtl import cuda_graphs, ops
from flatmtl.ops._status import (
    FALLBACK,
    INACTIVE_TASK,
    INVALID_GRAM,
    INVALID_LOSS,
    NO_ACTIVE_TASK,
    NOT_CONVERGED,
    RIDGE_RAISED,
)
from flatmtl.weighting import _options

W = TypeVar("W", bound="Weighting")
Scaling = Literal["raw", "sum_to_one", "sum_to_tasks"]

_SCALINGS = ("raw", "sum_to_one", "sum_to_tasks")  # the operator's numbers


@dataclass(frozen=True)
class SolveStatus:
    """What a solve left behind, on its device; the properties read it (and wait for it on CUDA).

    Attributes:
        bits: int64, 0-dim for one Gram matrix, [B] for a batch.
        residual: float64, the shape of ``bits``: the largest componentwise backward error of the
            method's optimality conditions; None where a method has none.
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
    def fallback(self) -> bool:
        """The method had no usable answer; the weights are those of its fallback."""
        return self._any(FALLBACK)

    @property
    def invalid_gram(self) -> bool:
        """The matrix was no Gram matrix; the weights are 0 (CUDA only: the CPU raises ValueError)."""
        return self._any(INVALID_GRAM)

    @property
    def invalid_loss(self) -> bool:
        """Some loss was not one that the method can take; its weight is 0 (CUDA only, as above)."""
        return self._any(INVALID_LOSS)

    @property
    def ok(self) -> bool:
        """All tasks took part and the solver reached its tolerance by the method's own way."""
        return not self._any(
            NO_ACTIVE_TASK | INACTIVE_TASK | NOT_CONVERGED | FALLBACK | INVALID_GRAM | INVALID_LOSS
        )


class Weighting:
    """Maps the Gram matrix of the task gradients to weights; the update is d = sum_i w_i g_i.

    ``weighting(gram)``: [T, T] -> float64 [T], or [B, T, T] -> [B, T] for B problems at once. Nothing is
    read on the host of a CUDA tensor. A task whose gradient is zero or not finite gets weight 0.

    Args:
        scaling: "raw", the method's own weights; "sum_to_one" or "sum_to_tasks", divided by their sum
            (by the sum of their absolute values if that is not clearly positive), the latter times T.
        max_norm: a bound on the update's norm, ||d|| = sqrt(w'Gw); None: no bound. Applied last.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    #: True if only the diagonal of the Gram matrix is looked at (the squared norms).
    diagonal_only: bool = False
    #: Where the method is from: authors and title or venue, arXiv number ("": none), year.
    paper: str = ""
    arxiv: str = ""
    year: int = 0
    #: What it looks at: "gram", "norms", "losses", "gram and losses", "norms and losses", "rows", "rows
    #: and losses", "cross-gram of two batches" or "nothing".
    needs: str = "gram"
    #: Whether a step is one backward pass of the weighted loss, with no gradient of a task's own.
    one_pass: bool = False
    #: Whether the losses after the step are wanted too: one more forward pass (``_after_step``).
    looks_back: bool = False
    #: What it keeps from call to call; "" if nothing.
    state: str = ""

    def __init__(self, *, scaling: Scaling = "raw", max_norm: float | None = None) -> None:
        if scaling not in _SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(_SCALINGS)}, got {scaling!r}")
        if max_norm is not None:
            max_norm = _options.real("max_norm", max_norm, above=0)
            self.diagonal_only = False  # the update's norm needs all products
        self.scaling = scaling
        self.max_norm = max_norm
        self._last: SolveStatus | None = None

    def __call__(self, gram: Tensor) -> Tensor:
        """Weights for one Gram matrix or a batch.

        Args:
            gram: float32 or float64 [T, T] or [B, T, T], symmetric positive semi-definite (for the
                methods of two batches, their cross-Gram matrix: any).

        Returns:
            float64 [T] or [B, T].

        Raises:
            ValueError, TypeError: ``gram`` has another shape or dtype, is no Gram matrix (on the CPU,
                where looking costs nothing), or does not fit the method's options or state.
        """
        weights, self._last = self._solve(gram)
        return self._scaled(gram, weights)

    def _at_step(self, gram: Tensor | None, losses: Tensor | None, there: Tensor | None) -> Tensor:
        """The weights of an optimizer's step, whatever the method looks at.

        Args:
            gram: float64 [T, T] or [B, T, T]; None where no task gradients are taken (``one_pass``).
            losses: float64 [T], NaN where a task is missing or its loss is not finite; None for the
                methods that do not look at them.
            there: bool [T], the tasks whose loss is there and finite; None: all of them.

        Returns:
            float64 [T] or [B, T].
        """
        assert gram is not None
        return self(gram)

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        """float64 [T], of the gradients of the tasks' own parameters at this step; None: each as it is.

        ``weights``: those of the shared ones; None where the update is no weighted sum.
        """
        return None

    def parameters(self) -> list[nn.Parameter]:
        """What the method learns, for the optimizer's parameter groups; mostly nothing."""
        return []

    def _gradients(self) -> list[Tensor]:
        """The gradients of ``parameters()`` at the last call, in their order."""
        return []

    def _after_step(self, losses: Tensor, there: Tensor | None) -> None:
        """Takes the losses of the same batch after the step (``looks_back``), as in ``_at_step``."""

    def _undone(self) -> None:
        """The step is not made: what a call has left for ``_made`` is forgotten."""

    def _relearn(self, losses: Tensor, there: Tensor | None) -> None:
        """The gradients of ``parameters()`` at the losses of the whole step, its micro-batches added up."""

    def _made(self, ok: Tensor | None) -> None:
        """The optimizer has made the step (``ok``, bool 0-dim: unless that is false on the device)."""

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        """gram [T, T] or [B, T, T], unchecked -> weights float64 [T] or [B, T], status."""
        raise NotImplementedError

    def _scaled(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The weights by ``scaling`` and ``max_norm``."""
        if self.scaling == "raw" and self.max_norm is None:
            return weights
        scaling = _SCALINGS.index(self.scaling)
        return ops.scale_weights(gram, weights, scaling, self.max_norm or 0.0)

    def _masked(self, gram: Tensor, weights: Tensor) -> Tensor:
        """``weights`` [T] or [B, T], 0 for the tasks of ``gram`` that have no gradient."""
        if weights.dim() == 1:
            return ops.solve_constant(gram, weights)[0]
        return weights * ops.solve_constant(gram)[0]

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

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        """What the state consists of, as kept (not copies); begun for ``gram`` if it has not been yet."""
        return []

    def twin(self: W) -> W:
        """A copy with a state and a random stream of its own, for a second family of gradients."""
        other = copy.deepcopy(self)
        other.reset()
        return other

    def state_dict(self) -> dict[str, Any]:
        """What must be saved for a resumed run to go on bit for bit; copies, not the state itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: ``state`` is not one of this weighting; nothing is then taken up.
        """
        self._check_state(state, set(self.state_dict()))
        self._check_entries(state)
        self._take_entries(state)

    def _check_state(self, state: dict[str, Any], keys: set[str]) -> None:
        """Raises ValueError unless ``state`` has exactly these entries."""
        if not isinstance(state, dict) or set(state) != keys:
            given = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"state must have the entries {sorted(keys)} of {type(self).__name__}, got {given}"
            )

    def _check_entries(self, state: dict[str, Any]) -> None:
        """Raises ValueError where an entry does not fit. Classes with a state extend it."""

    def _take_entries(self, state: dict[str, Any]) -> None:
        """Takes up what ``_check_entries`` found to fit. Classes with a state extend it."""

    def __getstate__(self) -> dict[str, Any]:
        # the last status is a reading, not a state: copies and pickles go without
        return {**self.__dict__, "_last": None}


class Stateful(Weighting):
    """A weighting that keeps one float64 tensor from call to call, made at the first.

    A method says what it is by ``_entry`` (its name in the saved state), ``_rank`` (its dimensions for
    one Gram matrix) and ``_start``.
    """

    _entry: str
    _rank = 1
    _input = "gram"

    def __init__(self, *, scaling: Scaling = "raw", max_norm: float | None = None) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self._held: Tensor | None = None

    def _start(self, gram: Tensor) -> Tensor:
        """The tensor before the first call, for Gram matrices like this one."""
        raise NotImplementedError

    def _size(self, gram: Tensor) -> tuple[int, ...]:
        """The tensor's shape for Gram matrices like this one."""
        return gram.shape[:-1]

    def _state_for(self, gram: Tensor) -> Tensor:
        """The tensor, made or moved to the Gram matrix's device where needed."""
        held = self._held
        if held is None or held.device != gram.device:
            # a replay would begin it again, or copy it again, every time
            cuda_graphs.refuse(
                f"{type(self).__name__} must have been called before, on this device,"
            )
        if held is None:
            self._held = held = self._start(gram)
        elif held.shape != self._size(gram):
            raise ValueError(
                f"{self._input} must be like those before (their {self._entry} has shape "
                f"{list(held.shape)}), got {list(gram.shape)}: reset() starts anew"
            )
        elif held.device != gram.device:
            self._held = held = held.to(gram.device)
        return held

    def reset(self) -> None:
        """Back to the state before the first call."""
        super().reset()
        self._held = None

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        return [*super()._tensors(gram), self._state_for(gram)]

    def state_dict(self) -> dict[str, Any]:
        """The kept tensor; None before the first call."""
        held = self._held
        return {**super().state_dict(), self._entry: None if held is None else held.clone()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        held = state[self._entry]
        if held is not None and not (
            isinstance(held, Tensor)
            and held.dtype == torch.float64
            and held.dim() in (self._rank, self._rank + 1)
        ):
            raise ValueError(
                f"state[{self._entry!r}] must be None or float64 with {self._rank} dimensions (one "
                f"more for a batch), got {held!r}"
            )

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        held = state[self._entry]
        # contiguous: it is written in place
        self._held = None if held is None else held.detach().clone().contiguous()
