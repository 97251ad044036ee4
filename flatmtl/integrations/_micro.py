"""Closures of micro-batches, each with its share of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor

from flatmtl.losses import Losses


def check_alone(processes: int) -> None:
    """Several processes would each take a step of their own, without a word.

    Raises:
        NotImplementedError: there are.
    """
    if processes > 1:
        raise NotImplementedError(
            "MultiTaskOptimizer works in one process so far: it does not average gradients over several, "
            f"got {processes}"
        )


def divided(closure: Callable[..., Losses], by: int) -> Callable[..., Losses]:
    """The closure, with its losses divided; it takes the arguments that the closure does."""
    if by == 1:
        return closure

    @functools.wraps(closure)
    def run(**asked: object) -> Losses:
        return divide(closure(**asked), by)

    return run


def divide(losses: Losses, by: float) -> Losses:
    """The losses divided, in the form in which they came; a missing one stays None.

    Raises:
        TypeError: they are one tensor with a graph. Its quotient is one graph that all tasks reach, and
            every head with it.
    """
    if by == 1:
        return losses
    if isinstance(losses, Tensor):
        if losses.requires_grad:
            raise TypeError(
                "losses must be a list or a dict of scalars where batches are accumulated, got a tensor"
            )
        return losses / by
    if isinstance(losses, Mapping):
        return {name: None if loss is None else loss / by for name, loss in losses.items()}
    quotients = [None if loss is None else loss / by for loss in losses]
    return tuple(quotients) if isinstance(losses, tuple) else quotients
