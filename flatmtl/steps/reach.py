"""Roles from the graph, for backward passes that do not tell the tasks apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flatmtl import graph
from flatmtl.losses import TaskLosses
from flatmtl.roles import Roles
from flatmtl.weighted import WeightedBackward

Row = Callable[[Roles], Tensor | None]  # where a backward's shared gradient lies


def follow(
    roles: Roles, losses: TaskLosses, gathered: Sequence[tuple[WeightedBackward, Row]]
) -> None:
    """Notes which parameters each task reaches, and lays the blocks out anew where that is news.

    Args:
        roles: the roles.
        losses: of one micro-batch.
        gathered: what earlier micro-batches left in the blocks, and where: it is carried over.

    Raises:
        ValueError: the roles do not hold (``Roles``).
    """
    outputs = [losses.output(task) for task in losses.present]
    fresh = not roles.settled
    try:
        for task, hits in zip(losses.present, graph.reached(outputs, roles.params), strict=True):
            for k in sorted(hits):
                fresh = roles.note_reach(task, k) or fresh
    except BaseException:
        roles.end_pass(losses.present, keep=False)
        raise
    roles.end_pass(losses.present, keep=True)
    if fresh:
        earlier = [backward.unpack(row(roles)) for backward, row in gathered]
        roles.settle()
        for (backward, row), grads in zip(gathered, earlier, strict=True):
            backward.repack(grads, row(roles))
