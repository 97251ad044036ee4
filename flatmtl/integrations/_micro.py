"""Closures of micro-batches, each with its share of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from flatmtl.losses import Losses
from flatmtl.optimizer import MultiTaskOptimizer


def check_processes(optimizer: MultiTaskOptimizer, processes: int, model: nn.Module | None) -> None:
    """Has the optimizer know the replicas of its model, which may have been made after it.

    Args:
        optimizer: the optimizer.
        processes: how many train.
        model: as it was wrapped for them.

    Raises:
        ValueError: the optimizer does not train over all of them, or no model is a DistributedDataParallel.
    """
    ranks = optimizer._options.ranks
    size = 1 if ranks is None else ranks.size
    if size != processes:
        raise ValueError(
            "process_group of MultiTaskOptimizer must be that of all processes, "
            f"torch.distributed.group.WORLD, where {processes} train, got one of {size}"
        )
    if ranks is None:
        return
    if model is not None:
        ranks.watch(model)
    if not ranks.replicas:
        raise ValueError(
            "model must be given as it was wrapped in a DistributedDataParallel where several processes "
            f"train, got {'none' if model is None else type(model).__name__}"
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
