"""The weightings of an optimizer: their answers for one step, and their states before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmtl.weighting import SolveStatus, Weighting


class Solves:
    """Solves for weights, and can take the weightings' states back to before the step.

    Attributes:
        weightings: name -> weighting: "loss" for the gradients, "flat" for the flat parts, "outer" for the
            pair of the two.
        statuses: name -> status of the last step's solve.
    """

    def __init__(self, weightings: dict[str, Weighting]) -> None:
        self.weightings = weightings
        self.statuses: dict[str, SolveStatus] = {}
        self._before: dict[str, tuple[list[Tensor], list[Tensor]]] = {}  # the states, and copies

    def begin(self) -> None:
        """A new step: the states as they are now are those before it."""
        self._before = {}
        self.statuses = {}

    def undo(self) -> None:
        """The states are as they were before the step, which is not made or begins anew."""
        for states, copies in self._before.values():
            for state, copy in zip(states, copies, strict=True):
                state.copy_(copy)
        self._before = {}

    def made(self) -> None:
        """The step was made: the states are what they are."""
        self._before = {}

    def undo_unless(self, ok: Tensor) -> None:
        """Takes the states back where ``ok`` (bool, 0-dim) is false; nothing is read."""
        for states, copies in self._before.values():
            for state, copy in zip(states, copies, strict=True):
                state.copy_(torch.where(ok.to(state.device), state, copy))

    def __call__(self, name: str, gram: Tensor, sound: Tensor | None = None) -> Tensor:
        """Weights by the weighting of that name.

        Args:
            name: of the weighting.
            gram: float64 [T, T] or [B, T, T].
            sound: bool, the shape of the weights: rows that are not count as without gradient.

        Returns:
            float64 [T] or [B, T].
        """
        weighting = self.weightings[name]
        if sound is not None:
            both = sound.unsqueeze(-1) & sound.unsqueeze(-2)
            gram = torch.where(both, gram, torch.zeros_like(gram))
        states = weighting._tensors(gram)
        self._before[name] = (states, [state.clone() for state in states])
        weights = weighting(gram)
        self.statuses[name] = weighting.last_status()
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The weightings' states."""
        return {name: weighting.state_dict() for name, weighting in self.weightings.items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Takes up saved states, all or none; a weighting without one starts anew.

        Raises:
            ValueError: one does not fit its weighting.
        """
        before = self.state_dict()
        try:
            self._load(states)
        except BaseException:
            self._load(before)
            raise

    def _load(self, states: dict[str, Any]) -> None:
        for name, weighting in self.weightings.items():
            if name in states:
                weighting.load_state_dict(states[name])
            else:
                weighting.reset()
