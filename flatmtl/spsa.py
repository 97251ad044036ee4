"""SAMO's directions: the mean gradient bent towards where each task's loss was found to rise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatmtl.block import Block
from flatmtl.losses import added_loss
from flatmtl.passes import Passes
from flatmtl.sharpness import SAMO
from flatmtl.stream import Stream


class Directions(Stream):
    """Draws and bends the directions of one optimizer."""

    def __init__(self, options: SAMO, model: nn.Module | None) -> None:
        super().__init__(options.seed)
        self._options = options
        self._model = model

    def skip(self, block: Block) -> None:
        """Draws as ``bend`` does, for nothing: another process bends."""
        block.update.normal_(generator=self.on(block.device))

    def bend(
        self,
        block: Block,
        task: int,
        passes: Passes,
        tasks: list[Any],
        rise: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """``block.sam[task]`` <- (1 - beta) gm + beta ||gm|| sign z/||z||, tensor by tensor.

        gm is ``block.mean``; sign that of task's loss at saved + spsa_eps z minus that at saved -
        spsa_eps z: SPSA's estimate is a multiple of z, and only its sign is left when it is normalised.
        The parameters are left at the last of the two points. ``rise`` makes of this process's difference
        that of the whole batch.

        Returns:
            The direction's squared norm, float64 0-dim.
        """
        beta, eps = self._options.beta, self._options.spsa_eps
        z = block.update  # free until the step ends
        z.normal_(generator=self.on(block.device))
        with _evaluating(self._model):
            block.move(z, eps)
            above = _loss(passes, tasks, task)
            block.move(z, -eps)
            below = _loss(passes, tasks, task)
        sign = rise(task, above - below).sign().to(block.device)
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
