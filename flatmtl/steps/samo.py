"""SAMO: one mean gradient, zeroth-order directions a task, one aggregation at the perturbed parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl.passes import Passes
from flatmtl.roles import Roles
from flatmtl.sharpness import Radii
from flatmtl.spsa import Directions
from flatmtl.steps.away import perturb, perturbed_passes, take_perturbed, with_perturbed
from flatmtl.steps.reach import follow
from flatmtl.weighted import WeightedBackward

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def samo(engine: Engine, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
    """One clean backward pass of all losses; every task bent, perturbed and taken again."""
    directions = engine.directions
    assert isinstance(directions, Directions)
    link = engine.samo_step
    clean = None if link is None else link.clean
    for roles, losses in engine.clean_passes(passes):
        if not isinstance(engine.capture, WeightedBackward):
            device = roles.params[0].device
            ones = torch.ones(len(roles.tasks), dtype=torch.float64, device=device)
            engine.capture = WeightedBackward(roles, ones, scale)
        follow(roles, losses, [(engine.capture, _mean)], clean)
        if clean is not None:
            engine.seen_by_all(losses, roles, engine.capture)
        engine.capture.add(losses, _mean(roles), perturbed=False, retain_graph=False, own=True)
        engine.roles = roles
    mean = engine.capture
    assert isinstance(mean, WeightedBackward)
    assert engine.roles is not None
    roles = engine.roles
    here = set(mean.present)
    if link is not None:
        link.clean.reduce(mean, [_mean(roles)])
        link.begin(roles, here, mean.present)
    finite = engine.finite_tasks(roles, mean.shared_norm(), mean.own_sq)
    engine.check_finite(roles, finite, scale)

    def rise(task: int, here: Tensor) -> Tensor:
        return here if link is None else link.rise(task, here)

    def stay(task: int) -> None:
        if link is not None and task in mean.present and roles.shared is not None:
            directions.skip(roles.shared)
            link.rise(task, None)

    def move(task: int) -> None:
        row, sq = None, mean.shared_norm()
        if roles.shared is not None:
            row = roles.shared.sam[task]
            sq = directions.bend(roles.shared, task, passes, roles.tasks, rise)
        own = []
        if task in mean.own_sq:
            own = [(task, roles.own[task].jac[0], mean.own_sq[task])]
        perturb(engine, roles, row, sq, own, radii)

    after, norms = perturbed_passes(engine, passes, roles, here, move, scale, stay=stay)
    if link is not None:
        norms = link.rows()
    found = take_perturbed(
        engine, roles, with_perturbed(roles, finite, norms), mean.reached, mean.own_sq, scale
    )
    squares = roles.per_task({task: rows[0] for task, rows in norms.items()})
    engine.record(roles, found, squares, scale, after)


def _mean(roles: Roles) -> Tensor | None:
    """[P], where the mean gradient of the shared parameters goes."""
    return None if roles.shared is None else roles.shared.mean
