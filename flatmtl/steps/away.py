"""Passes away from the parameters: perturb, run, and put everything back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl.block import Block
from flatmtl.buffers import watch_for_running_statistics
from flatmtl.distributed.fsdp_step import FSDPStep
from flatmtl.distributed.sharded_step import ShardedStep
from flatmtl.families import Found
from flatmtl.jacobian import pack_perturbed, perturbed_gradients
from flatmtl.losses import added_loss
from flatmtl.passes import Passes
from flatmtl.roles import Roles
from flatmtl.sharpness import SAM, Radii

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def perturb(
    engine: Engine,
    roles: Roles,
    shared: Tensor | None,
    shared_sq: Tensor,
    own: Sequence[tuple[int, Tensor, Tensor]],
    radii: Radii,
) -> None:
    """Moves the shared parameters along a row [P], and own ones along their gradients.

    Args:
        engine: the engine.
        roles: the roles.
        shared: the row; None if nothing is shared.
        shared_sq: its squared norm.
        own: tasks, their own gradients as rows, and the squared norms of these.
        radii: the radii.
    """
    sharpness = engine.options.sharpness
    assert sharpness is not None
    eta = sharpness.eta if isinstance(sharpness, SAM) else 0.0
    moved = []
    if roles.shared is not None and shared is not None:
        rho = [radii.shared[id(p)] for p in roles.shared.params]
        moved.append((roles.shared, shared, shared_sq, rho))
    for task, row, sq in own:
        block = roles.own[task]
        moved.append((block, row, sq, [radii.own[id(p)] for p in block.params]))
    if sharpness.adaptive:
        link = engine.row_step
        norm = link.adaptive_sq_norm if isinstance(link, FSDPStep) else Block.adaptive_sq_norm
        moved = [(b, r, norm(b, r, eta), rho) for b, r, _, rho in moved]
    if isinstance(sharpness, SAM) and sharpness.joint_norm:
        first = moved[0][0].device
        total = torch.stack([sq.to(first) for _, _, sq, _ in moved]).sum()
        moved = [(b, r, total.to(b.device), rho) for b, r, _, rho in moved]
    for block, along, sq, rho in moved:
        block.perturb(along, sq, rho, adaptive=sharpness.adaptive, eta=eta)


def away(engine: Engine, passes: Passes, roles: Roles, run: Callable[[], None]) -> None:
    """Runs what moves the parameters; they, buffers and generators are put back, should it fail."""
    # Only the plain gradients are known yet, so that a failure up to here has changed nothing.
    engine.clean_buffers.save()
    for block in roles.blocks:
        block.save()
    watching = engine.options.model is None and not engine.watched
    try:
        with watch_for_running_statistics(watching):
            run()
    finally:
        _restore(
            *(block.restore for block in roles.blocks), engine.clean_buffers.restore, passes.end
        )
    engine.watched = True


def perturbed_passes(
    engine: Engine,
    passes: Passes,
    roles: Roles,
    present: set[int],
    move: Callable[[int], None],
    scale: Tensor | None,
    *,
    query: bool = False,
    correct: Callable[[int], list[Tensor]] | None = None,
    stay: Callable[[int], None] | None = None,
) -> tuple[list[Tensor | None], dict[int, list[Tensor]]]:
    """Task by task: perturbed, forward, backward into the ``sam`` rows.

    Args:
        engine: the engine.
        passes: the forward passes.
        roles: the roles.
        present: the tasks that have a loss on this rank (with FSDP2: on some rank).
        move: perturbs the parameters for a task.
        scale: loss scale.
        query: the passes are of query data, where the closures have them.
        correct: changes a task's rows, the parameters being where they were, and gives their squared norms.
        stay: called in place of ``move`` for a task that has no loss on this rank.

    Returns:
        The losses there, and the squared norms of the rows of each task.
    """
    after: list[Tensor | None] = [None] * len(roles.tasks)
    norms: dict[int, list[Tensor]] = {}

    link = engine.row_step or engine.samo_step

    def take(task: int) -> None:
        if isinstance(link, FSDPStep):
            after[task] = link.take(passes, task, scale, query=query)
        else:
            take_rows(task)
        if task in roles.own:
            roles.own[task].restore()
        if correct is not None:
            if roles.shared is not None:
                roles.shared.restore()
            norms[task] = correct(task)

    def take_rows(task: int) -> None:
        for losses, position in passes.again(roles.tasks, task, query=query):
            shared, own = perturbed_gradients(losses, task, position, roles, scale)
            if isinstance(link, ShardedStep):
                link.hold(task, shared, own)
            else:
                norms[task] = pack_perturbed(roles, task, shared, own, accumulate=task in norms)
            after[task] = added_loss(after[task], losses.detached[position])
            losses.outputs.clear()

    def run() -> None:
        for task in range(len(roles.tasks)):
            if link is not None:
                link.moving(task)
            if task in present:
                move(task)
            else:
                if stay is not None:
                    stay(task)
                if link is None and roles.shared is not None:
                    roles.shared.sam[task].zero_()
            if link is not None:
                link.moved(task)
            if task in present:
                take(task)
            if link is not None:
                link.taken(task)

    away(engine, passes, roles, run)
    return after, norms


def take_perturbed(
    engine: Engine,
    roles: Roles,
    finite: Tensor,
    reached: set[int],
    own: Collection[int],
    scale: Tensor | None,
) -> Found | None:
    """Writes ``.grad`` from the gradients at the perturbed parameters alone.

    Args:
        engine: the engine.
        roles: the roles.
        finite: bool [T], of all gradients of the step.
        reached: positions of the parameters that get a gradient.
        own: the tasks with parameters of their own.
        scale: loss scale.

    Returns:
        The aggregation; None if nothing is shared.
    """
    engine.check_finite(roles, finite, scale)
    found = weights = None
    if roles.shared is not None:
        found = engine.families(scale).direct(roles.shared, finite)
        weights = engine.own_weights(found)
    for task in own:
        engine.own_update(task, roles.own[task].sam[0], weights)
    engine.write_grads(roles, reached, set(own), finite)
    return found


def keep_flat(block: Block, scale: Tensor | None) -> None:
    """``block.kept`` is the flat part from now on: without the scale, which the next step may change."""
    if scale is not None:
        block.kept.div_(scale.to(block.kept))
    block.has_flat = True


def keep_own_flat(
    block: Block, sharp: Tensor, finite: Tensor, scale: Tensor | None, weight: Tensor | None
) -> None:
    """``block.kept`` <- ``sharp`` [P] - its plain gradient, for the steps until the next sharp one.

    ``weight``: 0-dim, what ``sharp`` was multiplied by; None: 1.
    """
    plain = block.jac[0]
    if weight is not None:
        plain.mul_(weight.to(plain))
    torch.sub(sharp, plain, out=block.kept)
    block.kept.masked_fill_(~finite.to(block.device), 0)
    keep_flat(block, scale)


def with_perturbed(roles: Roles, finite: Tensor, norms: dict[int, list[Tensor]]) -> Tensor:
    """bool [T]: ``finite``, and so are the squared norms of the task's perturbed rows."""
    total = {
        task: torch.stack([sq.to(finite.device) for sq in sqs]).sum() for task, sqs in norms.items()
    }
    return finite & roles.per_task(total).isfinite()


def _restore(*restore: Callable[[], None]) -> None:
    """Calls every one, should one fail; then raises the first failure."""
    failures: list[BaseException] = []
    for one in restore:
        try:
            one()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
