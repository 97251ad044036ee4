"""The step of the loss-space weightings: one backward pass of the weighted loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl.families import Found
from flatmtl.jacobian import Capture
from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.roles import Roles
from flatmtl.steps.reach import follow
from flatmtl.weighted import WeightedBackward

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def one_pass(engine: Engine, passes: Passes, scale: Tensor | None) -> None:
    """Weights from every micro-batch's losses, and its one backward pass."""
    gram = None
    link = engine.one_row_step
    for roles, losses in engine.clean_passes(passes):
        if not isinstance(engine.capture, WeightedBackward):
            none = torch.empty(0, dtype=torch.float64)  # they come with the losses
            engine.capture = WeightedBackward(roles, none, scale, together=True)
        backward = engine.capture

        def settle(
            roles: Roles = roles, losses: TaskLosses = losses, so_far: WeightedBackward = backward
        ) -> Tensor | None:
            follow(roles, losses, [(so_far, _update)], link)
            if link is not None and link.measuring is not None:
                link.measuring.know(roles)
            return _update(roles)

        if link is not None and link.asks is not None:
            settle()
        seen = engine.seen_by_all(losses, roles, backward)
        backward.weights = engine.solves.of_losses("loss", seen)
        engine.watch_losses()
        # What the tasks reach is asked of the graph once; later only a gradient that arrives where none
        # was known tells of more: one pass weighs them right whatever the roles.
        if not roles.knows(losses.present):
            settle()
        engine.roles = roles
        if engine.measures:
            gram = _measured(engine, passes, roles, losses, scale)
        lost = seen.lost
        backward.add(
            losses,
            _update(roles),
            perturbed=False,
            retain_graph=False,
            own=True,
            without=lost if link is None else lost | link.idle,
            surprised=settle,
        )
        engine.lost.update(lost)
    known = engine.roles
    assert known is not None
    if link is not None:
        assert isinstance(engine.capture, WeightedBackward)
        link.reduce(engine.capture, [_update(known)], without=engine.lost)
    engine.learn_from_all(known)
    assert isinstance(engine.capture, WeightedBackward)
    roles, backward = known, engine.capture
    finite = engine.finite_tasks(roles, backward.shared_norm(), backward.own_sq)
    for task in engine.lost:
        finite[task] = False
    engine.check_finite(roles, finite, scale)
    if roles.shared is not None:
        if backward.shared_sq is None:  # every task was left out
            roles.shared.update.zero_()
        engine.mask_shared(roles, _but(finite, engine.lost))
        engine.add_flat(roles.shared, scale)
    for task in backward.own_sq:
        block = roles.own[task]
        block.update.copy_(block.jac[0])
        engine.add_flat(block, scale)
    engine.write_grads(roles, backward.reached, set(backward.own_sq), finite)
    engine.record(roles, Found(backward.weights, gram=gram), None, scale)


def _measured(
    engine: Engine, passes: Passes, roles: Roles, losses: TaskLosses, scale: Tensor | None
) -> Tensor | None:
    """The Gram matrix of the task gradients, taken for the probes; the graph stays."""
    link = None if engine.one_row_step is None else engine.one_row_step.measuring
    if len(passes) > 1 or (isinstance(engine.capture, WeightedBackward) and engine.capture.present):
        raise ValueError(
            "losses must be of one micro-batch a step where an AffinityProbe measures with a loss-space "
            "weighting, got several"
        )
    capture = Capture(roles) if link is None else link.begin(roles, 1)
    capture.add(losses, None, scale, retain_graph=True)
    found = capture.finish() if link is None else link.rows()
    engine.measure(passes, roles, found, scale)
    return None if roles.shared is None else engine.families(scale).gram(roles.shared.jac)


def _but(finite: Tensor, lost: set[int]) -> Tensor:
    """``finite`` without the tasks that were left out of the backward pass."""
    if not lost:
        return finite
    kept = finite.clone()
    for task in lost:
        kept[task] = True
    return kept


def _update(roles: Roles) -> Tensor | None:
    return None if roles.shared is None else roles.shared.update
