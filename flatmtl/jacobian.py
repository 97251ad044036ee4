"""Captures the gradients of every task: shared ones into the rows of J, the others into their own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl.losses import TaskLosses
from flatmtl.roles import Gradients, Roles


@dataclass
class Captured:
    """What one clean pass left in the blocks' buffers.

    Attributes:
        shared_sq: float64 [T], squared norms of J's rows (zeros if nothing is shared).
        own_sq: task -> float64 0-dim, squared norm of its own parameters' gradient.
        reached: positions in ``roles.params`` of the parameters that got a gradient.
    """

    shared_sq: Tensor
    own_sq: dict[int, Tensor]
    reached: set[int]


def capture(losses: TaskLosses, roles: Roles, device: torch.device) -> Captured:
    """T backward passes; each task's gradients are packed as soon as they are there.

    Raises:
        ValueError: the roles do not hold (``Roles``).
    """
    try:
        captured = _capture(losses, roles, device)
    except BaseException:
        roles.end_pass(keep=False)
        raise
    roles.end_pass(keep=True)
    return captured


def _capture(losses: TaskLosses, roles: Roles, device: torch.device) -> Captured:
    tasks = len(losses.outputs)
    waiting: list[Gradients] = []  # tasks whose roles are not settled yet
    packed: list[tuple[Tensor | None, Tensor | None]] = []
    reached: set[int] = set()
    settled = roles.settled
    for task in range(tasks):
        grads = losses.gradients(task, roles.params, retain_graph=task + 1 < tasks)
        hit = [k for k, g in enumerate(grads) if g is not None]
        if not hit:
            raise ValueError(
                f"losses[{losses.names[task]!r}] must depend on a trainable parameter of the optimizer, "
                "got one that reaches none"
            )
        reached.update(hit)
        if roles.note(task, grads) and settled:
            # A parameter turned up that no task had reached before: lay everything out again.
            waiting = [_unpack(t, roles) for t in range(task)]
            settled, packed = False, []
        if settled:
            packed.append(_pack(task, grads, roles))
        else:
            waiting.append(grads)
    if not settled:
        roles.settle()
        packed = [_pack(task, grads, roles) for task, grads in enumerate(waiting)]

    zero = torch.zeros((), dtype=torch.float64, device=device)
    shared_sq = torch.stack([zero if shared is None else shared for shared, _ in packed])
    own_sq = {task: own for task, (_, own) in enumerate(packed) if own is not None}
    return Captured(shared_sq, own_sq, reached)


def _pack(task: int, grads: Gradients, roles: Roles) -> tuple[Tensor | None, Tensor | None]:
    shared = own = None
    if roles.shared is not None:
        shared = roles.shared.pack(roles.shared.jac[task], [grads[k] for k in roles.shared_index])
    if task in roles.own:
        block = roles.own[task]
        own = block.pack(block.jac[0], [grads[k] for k in roles.own_index[task]])
    return shared, own


def _unpack(task: int, roles: Roles) -> Gradients:
    """The gradients that ``_pack`` put away, as views."""
    grads: list[Tensor | None] = [None] * len(roles.params)
    if roles.shared is not None:
        for k, view in zip(
            roles.shared_index, roles.shared.views(roles.shared.jac[task]), strict=True
        ):
            grads[k] = view
    if task in roles.own:
        block = roles.own[task]
        for k, view in zip(roles.own_index[task], block.views(block.jac[0]), strict=True):
            grads[k] = view
    return grads


def capture_perturbed(losses: TaskLosses, task: int, position: int, roles: Roles) -> list[Tensor]:
    """One backward pass at task ``task``'s perturbed parameters, into the blocks' ``sam`` rows.

    Args:
        losses: of the perturbed pass.
        task: the task.
        position: where its loss stands in ``losses``.
        roles: the settled roles.

    Returns:
        The squared norms of the shared and own rows that were written (float64, 0-dim each).
    """
    own_index: Sequence[int] = roles.own_index.get(task, [])
    index = [*roles.shared_index, *own_index]
    grads = losses.gradients(position, [roles.params[k] for k in index], retain_graph=False)
    split = len(roles.shared_index)
    norms = []
    if roles.shared is not None:
        norms.append(roles.shared.pack(roles.shared.sam[task], grads[:split]))
    if own_index:
        block = roles.own[task]
        norms.append(block.pack(block.sam[0], grads[split:]))
    return norms
