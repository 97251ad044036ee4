"""Roles from the graph, for backward passes that do not tell the tasks apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flatmtl import graph
from flatmtl.distributed.agree import agree_on_reach
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.losses import TaskLosses
from flatmtl.roles import Roles
from flatmtl.weighted import WeightedBackward

Row = Callable[[Roles], Tensor | None]  # where a backward's shared gradient lies


def follow(
    roles: Roles,
    losses: TaskLosses,
    gathered: Sequence[tuple[WeightedBackward, Row]],
    link: OneRowStep | None = None,
) -> None:
    """Notes which parameters each task reaches, and lays the blocks out anew where that is news.

    Args:
        roles: the roles.
        losses: of one micro-batch.
        gathered: what earlier micro-batches left in the blocks, and where: it is carried over.
        link: to the other processes, whose tasks count too as long as not all is known; None: there are
            none.

    Raises:
        ValueError: the roles do not hold (``Roles``).
        RankFailedError: another process failed.
    """
    outputs = [losses.output(task) for task in losses.present]
    reach = graph.reached(outputs, roles.params)
    reached = [(t, k) for t, hits in zip(losses.present, reach, strict=True) for k in sorted(hits)]
    here = set(losses.present)
    if link is not None and link.asks is not None:
        here, reached = agree_on_reach(link.asks, roles.tasks, here, reached)
        link.agreed(roles)
    if roles.note_all(here, reached):
        earlier = [backward.unpack(row(roles)) for backward, row in gathered]
        roles.settle()
        for (backward, row), grads in zip(gathered, earlier, strict=True):
            backward.repack(grads, row(roles))
