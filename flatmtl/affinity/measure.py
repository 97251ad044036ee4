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
        losses: float64 [T], at the parameters before the step; NaN for a task that is missing.
        finite: bool [T], whether the task has a loss and a finite gradient.
        present: the tasks that have a loss.
        inverse: float64 0-dim; the gradients are the rows times this (a loss scale).
        reached: for each task, which of the block's parameters it reaches.
    """

    block: Block
    losses: Tensor
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


def exact(
    rows: Rows,
    again: Again,
    way: LookAhead,
    lr: float | Tensor,
    groups: Sequence[tuple[Sequence[int], Tensor]],
    *,
    momentum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Z_ji = 1 - L_j(after a step on task i) / L_j(before), by taking the steps.

    Args:
        rows: the gradients.
        again: runs the batch again, without a graph.
        way: how to step.
        lr: the step size.
        groups: sets of tasks whose joint step (on the sum of their losses) is measured too, each also as
            a float64 [T] of ones and zeros.
        momentum: whether a step without any gradient is too.

    Returns:
        float64 [T, T]; [T, K], the joint steps; [T], the step without a gradient. The last two None
        where none was asked for. Parameters are as they were, also after an exception.
    """
    block, before = rows.block, rows.losses
    unknown = torch.full_like(before, torch.nan)
    nothing = torch.full_like(rows.inverse, torch.nan)

    def after(row: Tensor, reached: Sequence[bool], sound: Tensor) -> Tensor:
        way.move(row, reached, torch.where(sound, rows.inverse, nothing))
        return torch.where(sound, again(), unknown)

    columns, joint, alone = [], [], None
    way.begin(lr)
    try:
        for task, reached in enumerate(rows.reached):
            there = task in rows.present
            columns.append(after(block.jac[task], reached, rows.finite[task]) if there else unknown)
        for group, members in groups:
            if not rows.present.issuperset(group):
                joint.append(unknown)
                continue
            row = ops.combine(block.jac, members, block.empty())
            reached = [any(hits) for hits in zip(*(rows.reached[t] for t in group), strict=True)]
            joint.append(after(row, reached, (rows.finite | (members == 0)).all()))
        if momentum:
            everything = [any(hits) for hits in zip(*rows.reached, strict=True)]
            alone = after(block.empty().zero_(), everything, rows.finite.new_ones(()))
    finally:
        way.restore()
    z = _fall(before, torch.stack(columns, 1))
    of_groups = _fall(before, torch.stack(joint, 1)) if joint else None
    return z, of_groups, None if alone is None else _fall(before, alone.unsqueeze(1)).squeeze(1)


def _fall(before: Tensor, after: Tensor) -> Tensor:
    """The relative fall of losses [T] -> [T, n]; NaN where a loss was not above zero."""
    start = torch.where(before > 0, before, torch.nan).unsqueeze(1)
    return (start - after) / start
