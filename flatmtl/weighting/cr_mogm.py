"""CR-MOGM: smoothed weights of any other method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful, Weighting
from flatmtl.weighting._rows import check_takes_gram


class CRMOGM(Stateful):
    """Correlation-reduced multi-objective gradient manipulation (Zhou et al., NeurIPS 2022).

    An exponential average of another method's weights: lambda_k = alpha lambda_(k-1) + (1 - alpha) w_k.
    A task whose gradient is zero or not finite gets 0 in that call, and its average stays as it is.

    Args:
        weighting: the method whose weights are smoothed.
        alpha: how much of the average stays, between 0 and 1; 0.9.
        initial: lambda_0, [T]; None: the first call's weights.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, ``initial`` has not one
            entry for each task.
    """

    paper = "Zhou et al., Stochastic multi-objective gradient manipulation (NeurIPS)"
    year = 2022
    needs = "what the other method needs"
    state = "average weights [T], the other method's"

    _entry = "average"

    def __init__(
        self,
        weighting: Weighting,
        *,
        alpha: float = 0.9,
        initial: _options.Vector | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        if not isinstance(weighting, Weighting):
            raise TypeError(f"weighting must be a flatmtl Weighting, got {weighting!r}")
        check_takes_gram(weighting)
        self.weighting = weighting
        self.alpha = _options.real("alpha", alpha, at_least=0, at_most=1)
        self.initial = (
            None if initial is None else _options.vector("initial", initial, negative=True)
        )
        self.diagonal_only = weighting.diagonal_only and max_norm is None

    def _start(self, gram: Tensor) -> Tensor:
        # NaN: a task that has had no weight yet begins with its first one
        shape = self._size(gram)
        initial = _options.placed("initial", self.initial, gram)
        if initial is not None:
            return initial.expand(shape).clone()
        return torch.full(shape, torch.nan, dtype=torch.float64, device=gram.device)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights = self.weighting(gram)
        held = self._state_for(gram)
        here = self._masked(gram, torch.ones_like(weights)) != 0
        moved = torch.where(held.isnan(), weights, held.lerp(weights, 1 - self.alpha))
        # in place, so that a captured CUDA graph moves it at every replay
        held.copy_(torch.where(here, moved, held))
        return torch.where(here, held, 0.0), self.weighting.last_status()

    def _masked(self, gram: Tensor, weights: Tensor) -> Tensor:
        return self.weighting._masked(gram, weights)

    def reset(self) -> None:
        """Back to the state before the first call, the other method too."""
        super().reset()
        self.weighting.reset()

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        return [*super()._tensors(gram), *self.weighting._tensors(gram)]

    def twin(self) -> CRMOGM:
        """A copy with a state of its own, around a twin of the other method."""
        other = super().twin()
        other.weighting = self.weighting.twin()
        return other

    def state_dict(self) -> dict[str, Any]:
        """The average and the other method's state."""
        return {**super().state_dict(), "weighting": self.weighting.state_dict()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        # the last check: it takes the other method's state up if that fits
        self.weighting.load_state_dict(state["weighting"])
