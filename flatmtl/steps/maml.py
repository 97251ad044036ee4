"""MAML: every task's gradient behind a step of its own, aggregated as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.roles import Roles
from flatmtl.steps.away import away, perturbed_passes, take_perturbed, with_perturbed
from flatmtl.strategies import MAML

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def maml(engine: Engine, strategy: MAML, passes: Passes, scale: Tensor | None) -> None:
    """Every task stepped by itself, and taken again there."""
    roles, captured = engine.captured(passes, scale)
    finite = engine.finite_tasks(roles, captured.shared_sq, captured.own_sq)
    engine.check_finite(roles, finite, scale)
    one = torch.ones((), dtype=torch.float64, device=finite.device)
    divisor = one if scale is None else scale.to(one).square()
    # A perturbation along row / sqrt(divisor); NaN: the task stays where it is.
    divisors = torch.where(finite, divisor, torch.nan)

    def move(task: int) -> None:
        blocks = [(roles.own[task], 0)] if task in captured.own_sq else []
        if roles.shared is not None:
            blocks.append((roles.shared, task))
        for block, row in blocks:
            by = divisors[task].to(block.device)
            steps = [-strategy.lr] * len(block.params)
            block.perturb(block.jac[row], by, steps, adaptive=False, eta=0.0)

    def through(task: int) -> list[Tensor]:
        return _through_the_step(strategy.lr, passes, roles, task, scale)

    link = engine.row_step
    # over several processes H s needs the whole batch's s, unless each takes steps of its own
    later = link is not None and not link.local
    after, norms = perturbed_passes(
        engine, passes, roles, captured.here, move, scale,
        query=True, correct=None if strategy.first_order or later else through,
    )  # fmt: skip
    if link is not None:
        if later and not strategy.first_order:

            def bend() -> None:
                for task in range(len(roles.tasks)):
                    if task in captured.here:
                        through(task)
                    link.taken(task)

            link.first_rows()
            away(engine, passes, roles, bend)
        captured, norms = link.perturbed_rows(captured)
        if link.local:
            engine.measure(passes, roles, captured, scale)
    found = take_perturbed(
        engine,
        roles,
        with_perturbed(roles, finite, norms),
        captured.reached,
        captured.own_sq,
        scale,
    )
    engine.record(roles, found, captured.shared_sq, scale, after)


def _through_the_step(
    lr: float, passes: Passes, roles: Roles, task: int, scale: Tensor | None
) -> list[Tensor]:
    """s <- s - lr H s in the task's ``sam`` rows, H being the Hessian of its loss at the parameters.

    Returns:
        The squared norms of the rows.
    """
    index = [*roles.shared_index, *roles.own_index.get(task, [])]
    params = [roles.params[k] for k in index]
    split = len(roles.shared_index)
    rows = [] if roles.shared is None else [(roles.shared, task, slice(split))]
    rows += [(roles.own[task], 0, slice(split, None))] if task in roles.own else []
    along = [
        view.to(param.dtype, copy=True)
        for block, row, _ in rows
        for view, param in zip(block.views(block.sam[row]), block.params, strict=True)
    ]
    if scale is not None:  # the loss brings it in again
        along = [v / scale.to(v) for v in along]
    norms: list[Tensor] = []
    for losses, position in passes.again(roles.tasks, task):
        bent = _hessian_product(losses, position, params, along, scale)
        losses.outputs.clear()
        steps = [None if h is None else h.mul(-lr) for h in bent]
        norms = [
            block.pack(block.sam[row], steps[part], accumulate=True) for block, row, part in rows
        ]
    return norms


def _hessian_product(
    losses: TaskLosses,
    position: int,
    params: list[Tensor],
    along: list[Tensor],
    scale: Tensor | None,
) -> list[Tensor | None]:
    """H v for the Hessian of one loss; None where it is zero by the graph."""
    grads = torch.autograd.grad(
        [losses.output(position)],  # type: ignore[arg-type]
        params,
        grad_outputs=[losses.seed(position, scale)],
        create_graph=True,
        allow_unused=True,
    )
    pairs = [(g, v) for g, v in zip(grads, along, strict=True) if g is not None and g.requires_grad]
    if not pairs:  # the loss is linear
        return [None] * len(params)
    curved, directions = zip(*pairs, strict=True)
    return list(torch.autograd.grad(curved, params, grad_outputs=directions, allow_unused=True))
