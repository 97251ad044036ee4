"""Task gradients at a module's output, then one backward pass of what stands before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flatmtl import graph
from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.representation import Features, Representation
from flatmtl.roles import Roles

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def represented(
    engine: Engine, passes: Passes, jacobian: Representation, scale: Tensor | None
) -> None:
    """Task gradients at the features, then one backward pass of the trunk."""
    if len(passes) > 1 or engine.capture is not None:
        raise ValueError(
            "jacobian must not be Representation with several micro-batches a step: its weights "
            "belong to one batch's features"
        )
    if passes.repeatable:
        jacobian.forget()  # what ran since the last step is none of this one's
    for roles, losses in engine.clean_passes(passes):
        present = losses.present
        outputs = [losses.output(task) for task in present]
        tensors = jacobian.take(outputs)
        stop = [t.grad_fn for t in tensors if t.grad_fn is not None]
        heads = graph.reached(outputs, roles.params, stop)
        trunk = set().union(*graph.reached(tensors, roles.params))
        roles.name_shared(trunk)
        fresh = False
        for task, hits in zip(present, heads, strict=True):
            for k in sorted(hits | trunk):
                if k in hits and (k in trunk or any(k in h for h in heads if h is not hits)):
                    raise ValueError(
                        f"{engine.label(roles.params[k])} must lie before jacobian's module, or belong "
                        "to one task behind it; it is reached on another way too"
                    )
                fresh = roles.note_reach(task, k) or fresh
        roles.end_pass(present, keep=True)
        if fresh or not roles.settled:
            roles.settle()
        features = Features(tensors, len(roles.tasks))
        _at_features(engine, roles, losses, features, scale)
        engine.roles = roles


def _at_features(
    engine: Engine, roles: Roles, losses: TaskLosses, features: Features, scale: Tensor | None
) -> None:
    """One micro-batch's gradients, from the features' and back through the trunk."""
    at, present = features.block, losses.present
    squares: dict[int, Tensor] = {}
    own_sq: dict[int, Tensor] = {}
    reached: set[int] = set()
    for task in range(len(roles.tasks)):
        if task not in present:
            at.jac[task].zero_()
            continue
        index = roles.own_index.get(task, [])
        grads = losses.gradients(
            task,
            [*features.tensors, *(roles.params[k] for k in index)],
            retain_graph=task != present[-1],
            scale=scale,
        )
        count = len(features.tensors)
        squares[task] = at.pack(at.jac[task], grads[:count])
        if index:
            own_sq[task] = roles.own[task].pack(roles.own[task].jac[0], grads[count:])
            reached.update(index)
    shared_sq = roles.per_task(squares)
    finite = engine.finite_tasks(roles, shared_sq, own_sq)
    engine.check_finite(roles, finite, scale)
    engine.roles = roles
    found = engine.families(scale).plain(at, shared_sq, finite)
    engine.keep_weights(found)
    if roles.shared is not None:
        behind = features.backward(at.update, [roles.params[k] for k in roles.shared_index])
        reached.update(k for k, g in zip(roles.shared_index, behind, strict=True) if g is not None)
        sq = roles.shared.pack(roles.shared.update, behind)
        # one that shows only now, in the trunk, is nobody's alone
        finite = finite & sq.isfinite().to(finite.device)
        engine.check_finite(roles, finite, scale)
        engine.mask_shared(roles, finite)
    own = engine.own_weights(found)
    for task in own_sq:
        engine.own_update(task, roles.own[task].jac[0], own)
    engine.write_grads(roles, reached, set(own_sq), finite)
    engine.record(roles, found, shared_sq, scale)
