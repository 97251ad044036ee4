"""FS-MTL: every task's gradient again at its own perturbed parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flatmtl.distributed.fsdp_step import FSDPStep
from flatmtl.distributed.sharded_step import ShardedStep
from flatmtl.passes import Passes
from flatmtl.sharpness import SAM, Radii
from flatmtl.steps.away import keep_flat, keep_own_flat, perturb, perturbed_passes, with_perturbed

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def sharp(engine: Engine, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
    """Every task perturbed by itself; both families of gradients aggregated."""
    sharpness = engine.options.sharpness
    assert isinstance(sharpness, SAM)
    roles, captured = engine.captured(passes, scale)
    link = engine.row_step
    finite = engine.finite_tasks(roles, captured.shared_sq, captured.own_sq)
    if link is None or not link.local:
        engine.check_finite(roles, finite, scale)

    def move(task: int) -> None:
        if isinstance(link, ShardedStep):
            shared, row = link.whole
        else:
            shared = None if roles.shared is None else roles.shared.jac[task]
            row = roles.own[task].jac[0] if task in roles.own else None
        own = [] if row is None else [(task, row, captured.own_sq[task])]
        perturb(engine, roles, shared, captured.shared_sq[task], own, radii)

    # FSDP2 has every rank take part in every task's passes
    moving = captured.present if isinstance(link, FSDPStep) else captured.here
    after, norms = perturbed_passes(engine, passes, roles, moving, move, scale)
    if link is not None:
        captured, norms = link.perturbed_rows(captured)
        finite = engine.finite_tasks(roles, captured.shared_sq, captured.own_sq)
    finite = with_perturbed(roles, finite, norms)
    engine.check_finite(roles, finite, scale)
    found = own = None
    if roles.shared is not None:
        families, block = engine.families(scale), roles.rows
        assert block is not None
        if sharpness.aggregate == "decomposed":
            keep = sharpness.every > 1
            found = families.decomposed(block, captured.shared_sq, finite, keep=keep)
            if keep:
                keep_flat(roles.shared, scale)
        elif sharpness.aggregate == "direct":
            found = families.direct(block, finite)
        elif sharpness.aggregate == "second":
            found = families.second(roles.shared, captured.shared_sq, finite)
        else:
            found = families.each(roles.shared, finite)
        engine.keep_weights(found)
        own = engine.own_weights(found)
    for task in captured.own_sq:
        engine.own_update(task, roles.own_rows(task).sam[0], own, part=True)
        if sharpness.every > 1:
            weight = None if own is None else own[task]
            block = roles.own[task]
            keep_own_flat(block, block.update, finite[task], scale, weight)
    if isinstance(link, ShardedStep):
        link.join_updates()
    engine.write_grads(roles, captured.reached, set(captured.own_sq), finite)
    engine.record(roles, found, captured.shared_sq, scale, after)
