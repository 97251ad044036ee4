"""One backward pass of the weighted loss, for the steps between two solves."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from flatmtl.losses import TaskLosses
from flatmtl.roles import Roles


class WeightedBackward:
    """Backward passes of sum_i weights_i L_i, added up over the micro-batches.

    The shared parameters' gradient goes to a row of the shared block. A task's own one, unweighted, goes
    to its block's first row, from a pass of its own, which ends where the shared parameters begin: so
    that a task of weight zero learns on. With ``together`` it is weighted too, and one pass does.

    Args:
        roles: settled.
        weights: float64 [T]; can be changed between micro-batches.
        scale: loss scale, 0-dim; None: 1.
        together: own gradients are those of the weighted loss.
    """

    def __init__(
        self, roles: Roles, weights: Tensor, scale: Tensor | None, *, together: bool = False
    ) -> None:
        self.roles = roles
        self.weights = weights
        #: float64 [T], the part that each loss has in a mean over several processes; None: there is one
        self.shares: Tensor | None = None
        self._scale = scale
        self._together = together
        self._begun = False
        self.shared_sq: Tensor | None = None
        self.own_sq: dict[int, Tensor] = {}
        self.reached: set[int] = set()
        self.present: set[int] = set()

    def add(
        self,
        losses: TaskLosses,
        row: Tensor | None,
        *,
        perturbed: bool,
        retain_graph: bool,
        own: bool,
        without: Collection[int] = (),
        surprised: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """One micro-batch.

        Args:
            losses: of all tasks, in the roles' order.
            row: [P], where the shared parameters' gradient goes; None if nothing is shared.
            perturbed: own gradients go to the blocks' ``sam`` rows in place of ``jac``.
            retain_graph: for another backward pass.
            own: whether the tasks' own parameters are wanted.
            without: tasks that are left out, though they have a loss.
            surprised: lays the blocks out anew and gives the row; called, with ``together``, where a
                gradient arrives that no present task is known to have.
        """
        roles = self.roles
        tasks = [task for task in losses.present if task not in without]
        if not tasks:
            return
        ones = [losses.seed(task, self._scale) for task in tasks]
        if self.shares is not None:
            ones = [one * self.shares[task].to(one) for one, task in zip(ones, tasks, strict=True)]
        of: dict[int, Tensor | None] = {}
        index = [k for task in tasks for k in roles.own_index.get(task, [])] if own else []
        if index and not self._together:  # first: the other pass may free the graph
            keep = retain_graph or bool(roles.shared_index)
            of.update(zip(index, self._pass(losses, tasks, ones, index, keep), strict=True))
        if self._together:
            of = self._all(losses, tasks, ones, retain_graph)
            if surprised is not None and any(
                grad is not None and k not in roles.shared_set and roles.owner.get(k) not in tasks
                for k, grad in of.items()
            ):
                row = surprised()
        elif index := roles.shared_index:
            seeds = [
                one * self.weights[task].to(one) for one, task in zip(ones, tasks, strict=True)
            ]
            of.update(
                zip(index, self._pass(losses, tasks, seeds, index, retain_graph), strict=True)
            )
        for k, grad in of.items():
            if grad is not None:
                roles.check_dense(k, grad)
                self.reached.add(k)
        if roles.shared is not None and row is not None:
            chosen = [of.get(k) for k in roles.shared_index]
            self.shared_sq = roles.shared.pack(row, chosen, accumulate=self._begun)
        for task in tasks if own else ():
            if task in roles.own:
                block = roles.own[task]
                target = (block.sam if perturbed else block.jac)[0]
                chosen = [of[k] for k in roles.own_index[task]]
                self.own_sq[task] = block.pack(target, chosen, accumulate=task in self.own_sq)
        self.present.update(tasks)
        self._begun = True

    def _all(
        self, losses: TaskLosses, tasks: list[int], ones: list[Tensor], retain_graph: bool
    ) -> dict[int, Tensor | None]:
        """The weighted loss's gradient for every parameter."""
        weights = self.weights.to(ones[0].dtype).unbind()
        seeds = [one * weights[task].to(one) for one, task in zip(ones, tasks, strict=True)]
        every = list(range(len(self.roles.params)))
        return dict(zip(every, self._pass(losses, tasks, seeds, every, retain_graph), strict=True))

    def _pass(
        self,
        losses: TaskLosses,
        tasks: list[int],
        seeds: list[Tensor],
        index: list[int],
        retain_graph: bool,
    ) -> tuple[Tensor | None, ...]:
        params = [self.roles.params[k] for k in index]
        return losses.backward(tasks, params, seeds, retain_graph=retain_graph)

    def shared_norm(self) -> Tensor:
        """The squared norm of the shared row, float64 0-dim; 0 if nothing is shared."""
        if self.shared_sq is None:
            return torch.zeros((), dtype=torch.float64, device=self.roles.params[0].device)
        return self.shared_sq

    def unpack(self, row: Tensor | None) -> dict[int, Tensor]:
        """Position of a parameter -> its gradient so far, before the blocks are laid out anew."""
        roles = self.roles
        grads: dict[int, Tensor] = {}
        if roles.shared is not None and row is not None:
            grads.update(zip(roles.shared_index, roles.shared.views(row), strict=True))
        for task in self.own_sq:
            block = roles.own[task]
            grads.update(zip(roles.own_index[task], block.views(block.jac[0]), strict=True))
        return grads

    def repack(self, grads: dict[int, Tensor], row: Tensor | None) -> None:
        """Puts the gradients of ``unpack`` into the new blocks."""
        roles = self.roles
        if roles.shared is not None and row is not None:
            self.shared_sq = roles.shared.pack(row, [grads.get(k) for k in roles.shared_index])
        self.own_sq = {
            task: roles.own[task].pack(
                roles.own[task].jac[0],
                [None if k not in grads else grads[k].to(roles.params[k].dtype) for k in index],
            )
            for task, index in roles.own_index.items()
            if any(k in grads for k in index)
        }
