"""SAMO's directions: the mean gradient bent towards where each task's loss was found to rise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatmtl.block import Block
from flatmtl.losses import added_loss
from flatmtl.passes import Passes
from flatmtl.sharpness import SAMO


class Directions:
    """Draws and bends the directions of one optimizer; keeps the random stream."""

    def __init__(self, options: SAMO, model: nn.Module | None) -> None:
        self._options = options
        self._model = model
        self._generator: torch.Generator | None = None
        self._loaded: Tensor | None = None  # a state that waits for its device
        self._before: Tensor | None = None

    def _stream(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._options.seed)
            if self._loaded is not None:
                self._generator.set_state(self._loaded)
                self._loaded = None
        return self._generator

    def begin(self) -> None:
        """Remembers the stream's position, for ``rewind``."""
        self._before = self.state_dict()["generator"]

    def rewind(self) -> None:
        """Back to ``begin``: the step is not made."""
        if self._generator is not None:
            if self._before is None:
                self._generator.manual_seed(self._options.seed)
            else:
                self._generator.set_state(self._before)

    def state_dict(self) -> dict[str, Any]:
        """The random stream's position."""
        state = self._loaded if self._generator is None else self._generator.get_state()
        return {"generator": None if state is None else state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved position."""
        self._generator, self._loaded = None, state["generator"]

    def bend(self, block: Block, task: int, passes: Passes, tasks: list[Any]) -> Tensor:
        """``block.sam[task]`` <- (1 - beta) gm + beta ||gm|| sign z/||z||, tensor by tensor.

        gm is ``block.mean``; sign that of task's loss at saved + spsa_eps z minus that at saved -
        spsa_eps z: SPSA's estimate is a multiple of z, and only its sign is left when it is normalised.
        The parameters are left at the last of the two points.

        Returns:
            The direction's squared norm, float64 0-dim.
        """
        beta, eps = self._options.beta, self._options.spsa_eps
        z = block.update  # free until the step ends
        z.normal_(generator=self._stream(block.device))
        with _evaluating(self._model):
            block.move(z, eps)
            above = _loss(passes, tasks, task)
            block.move(z, -eps)
            below = _loss(passes, tasks, task)
        sign = (above - below).sign().to(block.device)
        mean, bent = block.views(block.mean), block.views(z)
        lengths = torch._foreach_norm(mean)
        own = torch._foreach_norm(bent)
        factors = [beta * sign * m / o for m, o in zip(lengths, own, strict=True)]
        torch._foreach_mul_(bent, factors)
        torch._foreach_add_(bent, mean, alpha=1 - beta)
        return block.pack(block.sam[task], [b.to(block.row_dtype) for b in bent])


def _loss(passes: Passes, tasks: list[Any], task: int) -> Tensor:
    total: Tensor | None = None
    for losses, position in passes.again(tasks, task, graph=False):
        total = added_loss(total, losses.detached[position])
    assert total is not None  # the task had a loss in some micro-batch
    return total


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode afterwards."""
    if model is None:
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
