"""Captures the gradients of every task: shared ones into the rows of J, the others into their own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flatmtl import graph
from flatmtl.losses import TaskLosses
from flatmtl.representation import Representation
from flatmtl.roles import Gradients, Roles
from flatmtl.sharpness import check_whole


@dataclass(frozen=True)
class Batched:
    """All tasks' gradients in one vectorised backward pass (``is_grads_batched``, torch.vmap).

    Faster than one pass a task where the network is made of many small operations; it keeps the
    intermediate gradients of all tasks at once. Every operation of the network needs a batching rule:
    BatchNorm in training and cuDNN's RNNs have none on some devices. A NaN or infinity inside one task's
    graph may reach the others (0 * inf), which the sequential way rules out.

    Args:
        chunk: so many tasks a pass; None: all.

    Raises:
        TypeError, ValueError: ``chunk`` is no positive whole number.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_whole("chunk", self.chunk, 1)


Jacobian: TypeAlias = Literal["sequential"] | Batched | Representation


def read_jacobian(jacobian: object) -> Jacobian:
    """The way to take gradients that an argument names.

    Raises:
        TypeError, ValueError: it names none.
    """
    if jacobian == "sequential":
        return "sequential"
    if jacobian == "batched":
        return Batched()
    if isinstance(jacobian, (Batched, Representation)):
        return jacobian
    message = (
        "jacobian must be 'sequential', 'batched', flatmtl.Batched(chunk) or "
        f"flatmtl.Representation(module), got {jacobian!r}"
    )
    raise (ValueError if isinstance(jacobian, str) else TypeError)(message)


# So many pairs of a task and a parameter, and walking the graph once takes less time than asking autograd
# for every pair.
_MANY = 10_000


@dataclass
class Captured:
    """What the clean passes of a step left in the blocks' buffers.

    Attributes:
        shared_sq: float64 [T], squared norms of J's rows (zeros if nothing is shared).
        own_sq: task -> float64 0-dim, squared norm of its own parameters' gradient.
        reached: positions in ``roles.params`` of the parameters that got a gradient.
        present: the tasks that had a loss, on whatever rank.
        here: those that had one on this rank.
    """

    shared_sq: Tensor
    own_sq: dict[int, Tensor]
    reached: set[int]
    present: set[int]
    here: set[int]


class Capture:
    """Every task's gradient, added up over the micro-batches of a step.

    Args:
        roles: of the parameters.
        partial: those are not all that is trained: a task may reach none of them.
    """

    def __init__(self, roles: Roles, *, partial: bool = False) -> None:
        self.roles = roles
        self.partial = partial
        self._reached: set[int] = set()
        self._shared_sq: dict[int, Tensor] = {}
        self._own_sq: dict[int, Tensor] = {}
        self._packed: set[int] = set()  # tasks whose rows hold this step's gradients

    def add(
        self,
        losses: TaskLosses,
        batched: Batched | None,
        scale: Tensor | None,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Backward passes of one micro-batch; each gradient is packed as soon as it is there.

        Args:
            losses: of the micro-batch.
            batched: how many tasks a pass; None: one.
            scale: 0-dim, what every backward starts with (a loss scale); None: 1.
            retain_graph: for another backward pass after these.

        Raises:
            ValueError: the roles do not hold (``Roles``).
        """
        try:
            self._add(losses, batched, scale, retain_graph)
        except BaseException:
            self._end_pass(losses.present, keep=False)
            raise
        self._end_pass(losses.present, keep=True)

    def _end_pass(self, tasks: list[int], *, keep: bool) -> None:
        self.roles.end_pass(tasks, keep=keep)

    def _add(
        self, losses: TaskLosses, batched: Batched | None, scale: Tensor | None, retain_graph: bool
    ) -> None:
        roles = self.roles
        waiting: list[tuple[int, Gradients]] = []  # gradients whose roles are not settled yet
        settled = roles.settled
        for task, grads in task_gradients(losses, roles, batched, scale, retain_graph):
            hit = hits(grads)
            self._check_reaches(losses, task, hit)
            self._reached.update(hit)
            if roles.note(task, grads) and settled:
                # A parameter turned up in a new role: lay everything out again.
                waiting = [(t, self._unpack(t)) for t in sorted(self._packed)]
                self._packed = set()
                settled = False
            if settled:
                self._pack(task, grads)
            else:
                waiting.append((task, grads))
            del grads  # not kept alive during the next backward pass
        if not settled:
            roles.settle()
            for task, grads in waiting:
                self._pack(task, grads)

    def _check_reaches(self, losses: TaskLosses, task: int, hit: Sequence[int]) -> None:
        """Raises ValueError if a task reaches none of the parameters, ``hit`` being those it does."""
        if not self.partial and not hit:
            raise ValueError(
                f"losses[{losses.names[task]!r}] must depend on a trainable parameter of the "
                "optimizer, got one that reaches none"
            )

    def _pack(self, task: int, grads: Gradients) -> None:
        roles, more = self.roles, task in self._packed
        if roles.shared is not None:
            block, row = roles.shared, roles.shared.jac[task]
            chosen = [grads[k] for k in roles.shared_index]
            self._shared_sq[task] = block.pack(row, chosen, accumulate=more)
        if task in roles.own:
            block = roles.own[task]
            chosen = [grads[k] for k in roles.own_index[task]]
            self._own_sq[task] = block.pack(block.jac[0], chosen, accumulate=more)
        self._packed.add(task)

    def _unpack(self, task: int) -> Gradients:
        """The gradients that ``_pack`` put away, as views."""
        roles = self.roles
        grads: list[Tensor | None] = [None] * len(roles.params)
        if roles.shared is not None:
            views = roles.shared.views(roles.shared.jac[task])
            for k, view in zip(roles.shared_index, views, strict=True):
                grads[k] = view.to(roles.params[k].dtype)
        if task in roles.own:
            block = roles.own[task]
            for k, view in zip(roles.own_index[task], block.views(block.jac[0]), strict=True):
                grads[k] = view.to(roles.params[k].dtype)
        return grads

    def finish(self) -> Captured:
        """What the rows hold now. The row of a task that had no loss is zero."""
        roles = self.roles
        if roles.shared is not None:
            for task in range(len(roles.tasks)):
                if task not in self._packed:
                    roles.shared.jac[task].zero_()
        shared_sq = roles.per_task(self._shared_sq if roles.shared is not None else {})
        own_sq = {t: sq for t, sq in self._own_sq.items() if t in roles.own and t in self._packed}
        packed = set(self._packed)
        return Captured(shared_sq, own_sq, set(self._reached), packed, packed)


def hits(grads: Gradients) -> list[int]:
    """The positions of those that are there."""
    return [k for k, grad in enumerate(grads) if grad is not None]


def task_gradients(
    losses: TaskLosses,
    roles: Roles,
    batched: Batched | None,
    scale: Tensor | None,
    retain_graph: bool,
) -> Iterator[tuple[int, Gradients]]:
    """Task after task, its gradient for every parameter of ``roles`` (None: not reached)."""
    tasks = losses.present
    if batched is None:
        yield from _one_by_one(losses, roles.params, scale, retain_graph)
        return
    if not tasks:
        return
    reach = graph.reached([losses.output(task) for task in tasks], roles.params)
    size = batched.chunk or len(tasks)
    for start in range(0, len(tasks), size):
        stop = min(start + size, len(tasks))
        keep = retain_graph or stop < len(tasks)
        grads = _vectorised(losses, tasks[start:stop], roles.params, keep, scale)
        for lane, task in enumerate(tasks[start:stop]):
            hit = reach[start + lane]
            yield (
                task,
                [None if g is None or k not in hit else g[lane] for k, g in enumerate(grads)],
            )


def _one_by_one(
    losses: TaskLosses, params: Sequence[Tensor], scale: Tensor | None, retain_graph: bool
) -> Iterator[tuple[int, Gradients]]:
    """A backward pass a task."""
    tasks = losses.present
    if len(tasks) * len(params) <= _MANY:
        for task in tasks:
            keep = retain_graph or task != tasks[-1]
            yield task, losses.gradients(task, params, retain_graph=keep, scale=scale)
        return
    reach = graph.reached([losses.output(task) for task in tasks], params)
    for task, hits in zip(tasks, reach, strict=True):
        keep = retain_graph or task != tasks[-1]
        grads: list[Tensor | None] = [None] * len(params)
        index = sorted(hits)
        if index:
            chosen = [params[k] for k in index]
            found = losses.gradients(task, chosen, retain_graph=keep, scale=scale)
            for k, grad in zip(index, found, strict=True):
                grads[k] = grad
        yield task, grads


def _vectorised(
    losses: TaskLosses,
    tasks: Sequence[int],
    params: Sequence[Tensor],
    retain_graph: bool,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """One backward pass with a lane for each of ``tasks``: gradients [lanes, *shape]."""
    seeds = [losses.seed(task, scale) for task in tasks]
    lanes = [
        torch.eye(len(tasks), dtype=seed.dtype, device=seed.device)[lane] * seed
        for lane, seed in enumerate(seeds)
    ]
    return losses.backward(tasks, params, lanes, retain_graph=retain_graph, lanes=True)


def perturbed_gradients(
    losses: TaskLosses, task: int, position: int, roles: Roles, scale: Tensor | None
) -> tuple[Gradients, Gradients]:
    """One backward pass at task ``task``'s perturbed parameters.

    Args:
        losses: of the perturbed pass.
        task: the task.
        position: where its loss stands in ``losses``.
        roles: the settled roles.
        scale: as in ``Capture.add``.

    Returns:
        The gradients of the shared block's parameters, and of the task's own.
    """
    index = [*roles.shared_index, *roles.own_index.get(task, [])]
    params = [roles.params[k] for k in index]
    grads = losses.gradients(position, params, retain_graph=False, scale=scale)
    split = len(roles.shared_index)
    return grads[:split], grads[split:]


def pack_perturbed(
    roles: Roles, task: int, shared: Gradients, own: Gradients, *, accumulate: bool
) -> list[Tensor]:
    """The blocks' ``sam`` rows <- a task's gradients at its perturbed parameters.

    Args:
        roles: the settled roles.
        task: the task.
        shared: of the shared block's parameters.
        own: of the task's own.
        accumulate: add to the rows (a further micro-batch).

    Returns:
        The squared norms of the shared and own rows that were written (float64, 0-dim each).
    """
    norms = []
    if roles.shared is not None:
        block = roles.shared
        norms.append(block.pack(block.sam[task], shared, accumulate=accumulate))
    if own:
        block = roles.own[task]
        norms.append(block.pack(block.sam[0], own, accumulate=accumulate))
    return norms
