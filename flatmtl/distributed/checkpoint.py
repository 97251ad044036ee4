"""Checkpoints through torch.distributed.checkpoint, which know nothing of the number of ranks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flatmtl.optimizer import MultiTaskOptimizer


class Checkpoint:
    """A model and its ``MultiTaskOptimizer`` for ``torch.distributed.checkpoint``.

    ::

        state = {"training": flatmtl.distributed.Checkpoint(model, optimizer)}
        torch.distributed.checkpoint.save(state, checkpoint_id=folder)
        ...
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)  # on any number of ranks

    Sharded and replicated parameters may be mixed. (``torch.distributed.checkpoint`` by itself leaves out
    what is the weighting's, and steps an optimizer whose state it wants to see.) Without sharded parameters
    ``torch.save`` of ``optimizer.state_dict()`` on one rank does as well.

    Args:
        model: the model.
        optimizer: its optimizer.

    Raises:
        TypeError: ``optimizer`` is no ``MultiTaskOptimizer``.
    """

    def __init__(self, model: nn.Module, optimizer: MultiTaskOptimizer) -> None:
        if not hasattr(optimizer, "base_optimizer") or not hasattr(optimizer, "weighting"):
            raise TypeError(
                f"optimizer must be a flatmtl.MultiTaskOptimizer, got {type(optimizer).__name__}"
            )
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """What is saved; each rank gives what it holds."""
        from torch.distributed.checkpoint import state_dict as of

        base = self._optimizer.base_optimizer
        self._gather_nothing()
        with self._without_learned() as learned:
            optim = of.get_optimizer_state_dict(self._model, base)
        own = self._optimizer.state_dict()["flatmtl"]
        own["learned"] = [base.state.get(param, {}) for param in learned]
        kept = io.BytesIO()
        torch.save(own, kept)
        # as bytes: of a nested dict only what a fresh optimizer has too would be loaded
        return {
            "model": of.get_model_state_dict(self._model),
            "optim": optim,
            "flatmtl": kept.getvalue(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what was saved.

        Raises:
            ValueError: it does not fit the weighting.
        """
        from torch.distributed.checkpoint import state_dict as of

        optimizer, base = self._optimizer, self._optimizer.base_optimizer
        own = torch.load(io.BytesIO(state_dict["flatmtl"]), weights_only=True)
        states = own.pop("learned")
        self._gather_nothing()
        of.set_model_state_dict(self._model, state_dict["model"])
        with self._without_learned() as learned:
            of.set_optimizer_state_dict(self._model, base, state_dict["optim"])
        for param, state in zip(learned, states, strict=True):
            base.state[param] = state
        optimizer.load_state_dict({**base.state_dict(), "flatmtl": own})

    def _gather_nothing(self) -> None:
        """FSDP2 may have left parameters gathered, which are then others than the optimizer's."""
        ranks = self._optimizer._options.ranks
        if ranks is not None:
            ranks.forget_gathered()

    @contextmanager
    def _without_learned(self) -> Iterator[list[Tensor]]:
        """The base optimizer without what the weightings learn, which is no parameter of the model."""
        base = self._optimizer.base_optimizer
        learned = self._optimizer.learned
        ids = {id(param) for param in learned}
        groups, states = (
            base.param_groups,
            {p: base.state.pop(p) for p in learned if p in base.state},
        )
        base.param_groups = [g for g in groups if not ids.intersection(map(id, g["params"]))]
        try:
            yield learned
        finally:
            base.param_groups = groups
            base.state.update(states)
