"""Steps between two solves: one backward pass of the loss weighted as at the last of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl.families import Found
from flatmtl.losses import added_entries
from flatmtl.passes import Passes
from flatmtl.representation import Representation
from flatmtl.roles import Roles
from flatmtl.sharpness import SAM, Radii
from flatmtl.steps.away import away, keep_flat, keep_own_flat, perturb
from flatmtl.steps.reach import follow
from flatmtl.weighted import WeightedBackward

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def weighted(engine: Engine, passes: Passes, scale: Tensor | None) -> None:
    """One backward pass with the last weights."""
    link = engine.one_row_step
    for roles, losses in engine.clean_passes(passes):
        if not isinstance(engine.capture, WeightedBackward):
            engine.capture = WeightedBackward(roles, engine.weights["loss"], scale)
        follow(roles, losses, [(engine.capture, _update)], link)
        idle: Collection[int] = ()
        if link is not None:
            engine.capture.shares = link.average(roles, losses).shares
            idle = link.idle
        engine.roles = roles
        engine.capture.add(
            losses, _update(roles), perturbed=False, retain_graph=False, own=True, without=idle
        )
    if isinstance(engine.options.jacobian, Representation):
        engine.options.jacobian.forget()
    backward, known = engine.capture, engine.roles
    assert isinstance(backward, WeightedBackward)
    assert known is not None
    roles = known
    if link is not None:
        link.reduce(backward, [_update(roles)])
    finite = engine.finite_tasks(roles, backward.shared_norm(), backward.own_sq)
    engine.check_finite(roles, finite, scale)
    if roles.shared is not None:
        engine.mask_shared(roles, finite)
        engine.add_flat(roles.shared, scale)
    own = engine.weights.get("own")
    for task in backward.own_sq:
        block = roles.own[task]
        engine.own_update(task, block.jac[0], own)
        engine.add_flat(block, scale)
    engine.write_grads(roles, backward.reached, set(backward.own_sq), finite)
    found = Found(engine.weights["loss"], engine.weights.get("flat"))
    engine.record(roles, found, None, scale)


def weighted_sharp(engine: Engine, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
    """Between two solves: one perturbation for all tasks (the paper's Eq. 9), the last weights."""
    sharpness, roles = engine.options.sharpness, engine.roles
    assert isinstance(sharpness, SAM)
    assert roles is not None
    keep = sharpness.every > 1
    decomposed = sharpness.aggregate == "decomposed"
    a = engine.weights["loss"]
    b = engine.weights["flat"] if decomposed else a
    first, minus = WeightedBackward(roles, a, scale), WeightedBackward(roles, b, scale)
    link = engine.one_row_step
    idle: Collection[int] = ()  # tasks without a sample on this rank
    for _, losses in engine.clean_passes(passes):
        follow(roles, losses, [(first, _first), (minus, _update)], link)
        if link is not None:
            first.shares = minus.shares = link.average(roles, losses).shares
            idle = link.idle
        first.add(
            losses,
            _first(roles),
            perturbed=False,
            retain_graph=decomposed,
            own=True,
            without=idle,
        )
        if decomposed and roles.shared is not None:
            minus.add(
                losses,
                _update(roles),
                perturbed=False,
                retain_graph=False,
                own=False,
                without=idle,
            )
    engine.capture = first
    shared = roles.shared
    if link is not None:
        link.reduce(first, [_first(roles), *([_update(roles)] if decomposed else [])])
    finite = engine.finite_tasks(roles, first.shared_norm(), first.own_sq)
    engine.check_finite(roles, finite, scale)
    own = [(task, roles.own[task].jac[0], sq) for task, sq in first.own_sq.items()]
    last = WeightedBackward(roles, b, scale)
    after: list[Tensor | None] = []

    def perturbed() -> None:
        nonlocal after
        row = None if shared is None else shared.jac[0]
        perturb(engine, roles, row, first.shared_norm(), own, radii)
        for number, (losses, _) in enumerate(passes.again(roles.tasks, None)):
            if link is not None:
                last.shares = link.shares[number]
            target = None if shared is None else shared.sam[0]
            last.add(losses, target, perturbed=True, retain_graph=False, own=True, without=idle)
            after = added_entries(after, losses.detached)
            losses.outputs.clear()

    away(engine, passes, roles, perturbed)
    if link is not None:
        link.reduce(last, [None if shared is None else shared.sam[0]], perturbed=True)
    finite = finite & engine.finite_tasks(roles, last.shared_norm(), last.own_sq)
    engine.check_finite(roles, finite, scale)
    if shared is not None:
        if decomposed:  # (a - b) g + b s
            torch.sub(shared.sam[0], shared.update, out=shared.update)
            if keep:
                shared.kept.copy_(shared.update)
                keep_flat(shared, scale)
            shared.update.add_(shared.jac[0])
        else:
            shared.update.copy_(shared.sam[0])
        engine.mask_shared(roles, finite)
    own_weights = engine.weights.get("own")
    for task in last.own_sq:
        block = roles.own[task]
        engine.own_update(task, block.sam[0], own_weights)
        if keep:
            weight = None if own_weights is None else own_weights[task]
            keep_own_flat(block, block.update, finite[task], scale, weight)
    engine.write_grads(roles, first.reached, set(last.own_sq), finite)
    engine.record(roles, Found(a, b if decomposed else None), None, scale, after)


def _update(roles: Roles) -> Tensor | None:
    return None if roles.shared is None else roles.shared.update


def _first(roles: Roles) -> Tensor | None:
    return None if roles.shared is None else roles.shared.jac[0]
