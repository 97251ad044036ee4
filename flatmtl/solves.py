"""The weightings of an optimizer: their answers for one step, and their states before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmtl.weighting import SolveStatus, Weighting
from flatmtl.weighting._rows import RowMethod


@dataclass(frozen=True)
class Observed:
    """The losses of a step or of a micro-batch, as the weightings see them.

    Attributes:
        losses: float64 [T], NaN where a task is missing.
        there: bool [T], the tasks whose loss is there and finite; None: all of them.
        lost: the tasks whose loss is there and not finite, as far as the host knows (on the CPU).
    """

    losses: Tensor
    there: Tensor | None
    lost: frozenset[int] = frozenset()


class Solves:
    """Solves for weights, and can take the weightings' states back to before the step.

    Attributes:
        weightings: name -> weighting: "loss" for the gradients, "flat" for the flat parts, "outer" for the
            pair of the two.
        statuses: name -> status of the last step's solve.
        learned: name -> gradients of the weighting's own parameters at this step.
    """

    def __init__(self, weightings: dict[str, Weighting]) -> None:
        self.weightings = weightings
        self.statuses: dict[str, SolveStatus] = {}
        self.learned: dict[str, list[Tensor]] = {}
        self._before: dict[str, tuple[list[Tensor], list[Tensor]]] = {}  # the states, and copies

    def begin(self) -> None:
        """A new step: the states as they are now are those before it."""
        self._before = {}
        self.statuses = {}
        self.learned = {}

    def undo(self) -> None:
        """The states are as they were before the step, which is not made or begins anew."""
        for states, copies in self._before.values():
            for state, copy in zip(states, copies, strict=True):
                state.copy_(copy)
        self._before = {}
        self.learned = {}

    def made(self, ok: Tensor | None) -> None:
        """The step was made (unless ``ok``, bool 0-dim, is false on the device): states stay."""
        self._before = {}
        self.learned = {}
        for weighting in self.weightings.values():
            weighting._made(ok)

    def undo_unless(self, ok: Tensor) -> None:
        """Takes the states back where ``ok`` (bool, 0-dim) is false; nothing is read."""
        for states, copies in self._before.values():
            for state, copy in zip(states, copies, strict=True):
                state.copy_(torch.where(ok.to(state.device), state, copy))

    def __call__(
        self, name: str, gram: Tensor, sound: Tensor | None = None, seen: Observed | None = None
    ) -> Tensor:
        """Weights by the weighting of that name.

        Args:
            name: of the weighting.
            gram: float64 [T, T] or [B, T, T].
            sound: bool, the shape of the weights: rows that are not count as without gradient.
            seen: the losses, for a weighting that looks at them.

        Returns:
            float64 [T] or [B, T].
        """
        if sound is not None:
            both = sound.unsqueeze(-1) & sound.unsqueeze(-2)
            gram = torch.where(both, gram, torch.zeros_like(gram))
        losses, there = (None, None) if seen is None else (seen.losses, seen.there)
        self._keep(name, gram)
        weights = self.weightings[name]._at_step(gram, losses, there)
        self._note(name)
        return weights

    def of_losses(self, name: str, seen: Observed) -> Tensor:
        """float64 [T], the weights by a weighting of one backward pass; its gradients add up in a step."""
        self._keep(name, seen.losses)
        weights = self.weightings[name]._at_step(None, seen.losses, seen.there)
        before = self.learned.get(name)
        self._note(name)
        if before:
            added = zip(before, self.learned[name], strict=True)
            self.learned[name] = [a + b for a, b in added]
        return weights

    def of_rows(
        self,
        name: str,
        rows: Tensor,
        out: Tensor,
        *,
        seen: Observed | None,
        sound: Tensor,
        scale: Tensor | None,
    ) -> Tensor | None:
        """``out`` [P] <- the update by a method of the rows [T, P]; its weights where it has some."""
        method = self.weightings[name]
        assert isinstance(method, RowMethod)
        self._keep(name, rows)
        losses = None
        if seen is not None:
            losses = seen.losses
            if seen.there is not None:  # a task that is missing has a row of zeros, and no gradient
                sound = sound & seen.there
        weights = method.aggregate(rows, out, losses=losses, sound=sound, scale=scale)
        self._note(name)
        return weights

    def _keep(self, name: str, like: Tensor) -> None:
        """Copies the state, unless this step has done so before."""
        if name not in self._before:
            states = self.weightings[name]._tensors(like)
            self._before[name] = (states, [state.clone() for state in states])

    def _note(self, name: str) -> None:
        """The status and the gradients of the call that was just made."""
        weighting = self.weightings[name]
        if weighting._last is not None:
            self.statuses[name] = weighting._last
        self.learned[name] = weighting._gradients()

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
