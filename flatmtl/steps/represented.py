"""Task gradients at a module's output, then one backward pass of what stands before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl import graph, ops
from flatmtl.distributed.agree import agree_on_reach
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.families import Found
from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.representation import Features, Representation
from flatmtl.roles import Roles
from flatmtl.weighted import WeightedBackward

if TYPE_CHECKING:
    from flatmtl.engine import Engine

_TRUNK = -1  # stands for a task where the ranks tell each other what lies before the features


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
        tensors = jacobian.take(outputs) if present else []
        stop = [t.grad_fn for t in tensors if t.grad_fn is not None]
        heads = graph.reached(outputs, roles.params, stop)
        trunk = set().union(*graph.reached(tensors, roles.params))
        reached = []
        for task, hits in zip(present, heads, strict=True):
            for k in sorted(hits | trunk):
                if k in hits and (k in trunk or any(k in h for h in heads if h is not hits)):
                    raise ValueError(
                        f"{engine.label(roles.params[k])} must lie before jacobian's module, or belong "
                        "to one task behind it; it is reached on another way too"
                    )
                reached.append((task, k))
        here, link = set(present), engine.one_row_step
        if link is not None and link.asks is not None:
            pairs = [*reached, *((_TRUNK, k) for k in trunk)]
            here, pairs = agree_on_reach(link.asks, roles.tasks, here, pairs)
            link.agreed(roles)
            trunk = {k for task, k in pairs if task == _TRUNK}
            reached = [pair for pair in pairs if pair[0] != _TRUNK]
        roles.name_shared(trunk)
        fresh = False
        for task, k in reached:
            fresh = roles.note_reach(task, k) or fresh
        roles.end_pass(here, keep=True)
        if fresh or not roles.settled:
            roles.settle()
        features = Features(tensors, len(roles.tasks))
        if link is None:
            _at_features(engine, roles, losses, features, scale)
        else:
            _over_ranks(engine, link, roles, losses, features, scale)
        engine.roles = roles


def message(tasks: int) -> int:
    """How many numbers the ranks add up with the losses: Gram matrix and own gradients' squared norms."""
    return tasks * tasks + tasks


def _at_features(
    engine: Engine, roles: Roles, losses: TaskLosses, features: Features, scale: Tensor | None
) -> None:
    """One micro-batch's gradients, from the features' and back through the trunk."""
    at = features.block
    squares, own_sq = _rows(roles, losses, features, scale)
    shared_sq = roles.per_task(squares)
    finite = engine.finite_tasks(roles, shared_sq, own_sq)
    engine.check_finite(roles, finite, scale)
    engine.roles = roles
    found = engine.families(scale).plain(at, shared_sq, finite)
    engine.keep_weights(found)
    reached = {k for task in own_sq for k in roles.own_index[task]}
    if roles.shared is not None:
        behind = features.backward(at.update, [roles.params[k] for k in roles.shared_index])
        reached.update(k for k, g in zip(roles.shared_index, behind, strict=True) if g is not None)
        sq = roles.shared.pack(roles.shared.update, behind)
        # one that shows only now, in the trunk, is nobody's alone
        finite = finite & sq.isfinite().to(finite.device)
        engine.check_finite(roles, finite, scale)
        engine.mask_shared(roles, finite)
    _write(engine, roles, found, reached, own_sq, finite)
    engine.record(roles, found, shared_sq, scale)


def _over_ranks(
    engine: Engine,
    link: OneRowStep,
    roles: Roles,
    losses: TaskLosses,
    features: Features,
    scale: Tensor | None,
) -> None:
    """The same over several processes, whose features are columns of one Jacobian.

    The mean over all ranks has the part ``shares`` of a rank's loss: with the rows g_r of rank r,
    G_ij = sum_r c_ri c_rj <g_ri, g_rj>, and c_ri = n_ri / sum_r n_ri.
    """
    tasks = len(roles.tasks)
    _, own_sq = _rows(roles, losses, features, scale)
    device = roles.params[0].device
    counts = torch.stack(
        [torch.full((), n, dtype=torch.float64, device=device) for n in link.counts_here(losses)]
    )
    gram = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
    if features.tensors:
        gram = ops.gram(features.block.jac).to(device) * counts.outer(counts)
    averaged = link.average_and_add(
        roles, losses, [gram.reshape(-1), roles.per_task(own_sq) * counts]
    )
    sums = averaged.extra
    assert sums is not None
    total = torch.where(averaged.counts > 0, averaged.counts, 1.0)
    gram = sums[: tasks * tasks].view(tasks, tasks) / total.outer(total)
    shared_sq = gram.diag()
    finite = (shared_sq + sums[tasks * tasks :]).isfinite()
    engine.check_finite(roles, finite, scale)
    engine.roles = roles
    found = engine.families(scale).solved(gram, finite)
    assert found.weights is not None
    engine.keep_weights(found)
    backward = WeightedBackward(roles, found.weights, scale)
    if roles.shared is not None and features.tensors:
        at = features.block
        ops.combine(at.jac, found.weights * averaged.shares, at.update)
        behind = features.backward(at.update, [roles.params[k] for k in roles.shared_index])
        roles.shared.pack(roles.shared.update, behind)
    for task in own_sq:
        row = roles.own[task].jac[0]
        row.mul_(averaged.shares[task].to(row))
    backward.own_sq, backward.present = own_sq, set(losses.present)
    link.reduce(backward, [None if roles.shared is None else roles.shared.update])
    if roles.shared is not None:
        finite = finite & backward.shared_norm().isfinite().to(finite.device)
        engine.check_finite(roles, finite, scale)
        engine.mask_shared(roles, finite)
    _write(engine, roles, found, backward.reached, backward.own_sq, finite)
    engine.record(roles, found, shared_sq, scale)


def _write(
    engine: Engine,
    roles: Roles,
    found: Found,
    reached: set[int],
    tasks: Iterable[int],
    finite: Tensor,
) -> None:
    """``.grad`` of the trunk and of these tasks' own parameters."""
    own = engine.own_weights(found)
    for task in tasks:
        engine.own_update(task, roles.own[task].jac[0], own)
    engine.write_grads(roles, reached, set(tasks), finite)


def _rows(
    roles: Roles, losses: TaskLosses, features: Features, scale: Tensor | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Every task's gradient at the features and at its own parameters, in their rows.

    Returns:
        Their squared norms, task by task.
    """
    present = losses.present
    squares: dict[int, Tensor] = {}
    own_sq: dict[int, Tensor] = {}
    if not present:
        return squares, own_sq
    at, count = features.block, len(features.tensors)
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
        squares[task] = at.pack(at.jac[task], grads[:count])
        if index:
            own_sq[task] = roles.own[task].pack(roles.own[task].jac[0], grads[count:])
    return squares, own_sq
