"""One measured step: from task gradients and losses to the affinity matrices.

Every matrix is [T, T], row = recipient (whose loss is measured), column = source (whose gradient made the
step); NaN where it has no meaning: a task that this batch lacks, a source whose gradient is not finite, a
recipient whose loss is not above zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.affinity.look_ahead import LookAhead
from flatmtl.block import Block

Again = Callable[
    [], Tensor
]  # the losses of the same batch, float64 [T], at the parameters as they are


@dataclass
class Rows:
    """The task gradients of a measured step.

    Attributes:
        block: the shared parameters, with a row of ``jac`` for each task.
        finite: bool [T], whether the task has a loss and a finite gradient.
        present: the tasks that have a loss.
        inverse: float64 0-dim; the gradients are the rows times this (a loss scale).
        reached: for each task, which of the block's parameters it reaches.
    """

    block: Block
    finite: Tensor
    present: set[int]
    inverse: Tensor
    reached: list[list[bool]]


@dataclass
class Sample:
    """What a measured step found.

    Attributes:
        matrices: quantity -> float64 [T, T].
        groups: float64 [T, K], the affinity of the joint steps; None without groups.
    """

    matrices: dict[str, Tensor]
    groups: Tensor | None = None


def first_order(
    gram: Tensor, losses: Tensor, finite: Tensor, lr: float | Tensor, push: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Z_ji = lr * (G_ji + <g_j, push>) / L_j, the look-ahead expanded to first order.

    Args:
        gram: float64 [T, T], of the task gradients.
        losses: [T].
        finite: bool [T], of the sources.
        lr: the step size; a 0-dim tensor is not read on the host.
        push: [T], the inner products with the momentum's part of the step (ETAP, arXiv 2602.18591);
            None: none.

    Returns:
        The matrix, and what momentum alone does to each task, [T]; None without it.
    """
    if push is not None:
        gram = gram + push.unsqueeze(1)
    z = scaled(ops.affinity(gram, losses, 1.0), lr)
    moved = None if push is None else scaled(push / losses, lr)
    return z.masked_fill_(~finite, torch.nan), moved


def scaled(matrix: Tensor, lr: float | Tensor) -> Tensor:
    """``matrix`` times the step size."""
    return matrix * (lr.to(matrix) if isinstance(lr, Tensor) else lr)


def losses_ahead(
    rows: Rows,
    again: Again,
    way: LookAhead,
    lr: float | Tensor,
    groups: Sequence[tuple[Sequence[int], Tensor]],
    *,
    momentum: bool,
) -> Tensor:
    """L_j(after a step on task i), by taking the steps.

    Args:
        rows: the gradients.
        again: runs the batch again, without a graph.
        way: how to step.
        lr: the step size.
        groups: sets of tasks whose joint step (on the sum of their losses) is measured too, each also as
            a float64 [T] of ones and zeros.
        momentum: whether a step without any gradient is too.

    Returns:
        float64 [T, T + K + 1]: after each task's step, the joint steps, the step without a gradient
        (neither of the last two where none was asked for). Parameters are as they were, also after an
        exception.
    """
    block = rows.block
    unknown = torch.full_like(rows.finite, torch.nan, dtype=torch.float64)
    nothing = torch.full_like(rows.inverse, torch.nan)

    def after(row: Tensor, reached: Sequence[bool], sound: Tensor) -> Tensor:
        way.move(row, reached, torch.where(sound, rows.inverse, nothing))
        return torch.where(sound, again(), unknown)

    columns = []
    way.begin(lr)
    try:
        for task, reached in enumerate(rows.reached):
            there = task in rows.present
            columns.append(after(block.jac[task], reached, rows.finite[task]) if there else unknown)
        for group, members in groups:
            if not rows.present.issuperset(group):
                columns.append(unknown)
                continue
            row = ops.combine(block.jac, members, block.empty())
            reached = [any(hits) for hits in zip(*(rows.reached[t] for t in group), strict=True)]
            columns.append(after(row, reached, (rows.finite | (members == 0)).all()))
        if momentum:
            everything = [any(hits) for hits in zip(*rows.reached, strict=True)]
            columns.append(after(block.empty().zero_(), everything, rows.finite.new_ones(())))
    finally:
        way.restore()
    return torch.stack(columns, 1)


def falls(
    before: Tensor, after: Tensor, groups: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Z_ji = 1 - L_j(after a step on task i) / L_j(before); NaN where that was not above zero.

    Args:
        before: float64 [T].
        after: [T, n], what ``losses_ahead`` gave.
        groups: how many joint steps are in it.

    Returns:
        float64 [T, T]; [T, K], the joint steps; [T], the step without a gradient. The last two None
        where there are none.
    """
    start = torch.where(before > 0, before, torch.nan).unsqueeze(1)
    fall, tasks = (start - after) / start, len(before)
    joint, alone = fall[:, tasks : tasks + groups], fall[:, tasks + groups :]
    return (
        fall[:, :tasks],
        joint if groups else None,
        alone.squeeze(1) if alone.numel() else None,
    )
