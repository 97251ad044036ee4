"""The plain step: T backward passes, one aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flatmtl.distributed.sharded_step import ShardedStep
from flatmtl.passes import Passes

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def plain(engine: Engine, passes: Passes, scale: Tensor | None) -> None:
    """Every task's gradient, and their aggregate."""
    roles, captured = engine.captured(passes, scale)
    finite = engine.finite_tasks(roles, captured.shared_sq, captured.own_sq)
    engine.check_finite(roles, finite, scale)
    found = own = None
    if roles.shared is not None:
        assert roles.rows is not None
        found = engine.families(scale).plain(roles.rows, captured.shared_sq, finite)
        engine.keep_weights(found)
        engine.add_flat(roles.shared, scale)
        own = engine.own_weights(found)
    for task in captured.own_sq:
        block = roles.own[task]
        engine.own_update(task, roles.own_rows(task).jac[0], own, part=True)
        engine.add_flat(block, scale)
    if isinstance(engine.row_step, ShardedStep):
        engine.row_step.join_updates()
    engine.write_grads(roles, captured.reached, set(captured.own_sq), finite)
    engine.record(roles, found, captured.shared_sq, scale)
