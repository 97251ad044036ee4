"""One backward pass of the weighted loss, for the steps between two solves."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.losses import TaskLosses
from flatmtl.roles import Roles

# A task whose weight is next to zero still goes through the backward pass, with this share of the
# largest weight, or its own parameters would get no gradient; and where all weights are zero, so much.
# Under a loss scale the pass runs in float16, whose range is short.
SHARE, LEAST = 2.0**-60, 2.0**-80
SHARE_SHORT, LEAST_SHORT = 2.0**-20, 2.0**-30


def _seeds(weights: Tensor, *, short: bool) -> Tensor:
    """float64 [T]: the weights, those next to zero raised, for a range of float16 if ``short``."""
    share, floor = (SHARE_SHORT, LEAST_SHORT) if short else (SHARE, LEAST)
    least = (weights.abs().max() * share).clamp(min=floor)
    sign = torch.where(weights < 0, -1.0, 1.0)
    return torch.where(weights.abs() < least, sign * least, weights)


class WeightedBackward:
    """Backward passes of sum_i weights_i L_i, added up over the micro-batches.

    The shared parameters' gradient goes to a row of the shared block, a task's own one to its block's
    first row, still multiplied with its seed until ``own_gradient`` takes that out.

    Args:
        roles: settled.
        weights: float64 [T].
        scale: loss scale, 0-dim; None: 1.
    """

    def __init__(self, roles: Roles, weights: Tensor, scale: Tensor | None) -> None:
        self._roles = roles
        self._seeds = _seeds(weights, short=scale is not None)
        self._scale = scale
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
    ) -> None:
        """One micro-batch.

        Args:
            losses: of all tasks, in the roles' order.
            row: [P], where the shared parameters' gradient goes; None if nothing is shared.
            perturbed: own gradients go to the blocks' ``sam`` rows in place of ``jac``.
            retain_graph: for another backward pass.
            own: whether the tasks' own parameters are wanted.
        """
        roles = self._roles
        tasks = losses.present
        index = list(roles.shared_index)
        if own:
            index += [k for task in tasks for k in roles.own_index.get(task, [])]
        grads = torch.autograd.grad(
            [losses.output(task) for task in tasks],  # type: ignore[arg-type]
            [roles.params[k] for k in index],
            grad_outputs=[
                losses.seed(task, self._scale) * self._seeds[task].to(losses.seed(task, None))
                for task in tasks
            ],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        of = dict(zip(index, grads, strict=True))
        for k, grad in of.items():
            if grad is not None:
                roles.check_dense(k, grad)
                self.reached.add(k)
        if roles.shared is not None and row is not None:
            chosen = [of[k] for k in roles.shared_index]
            self.shared_sq = roles.shared.pack(row, chosen, accumulate=self._begun)
        for task in tasks if own else ():
            if task in roles.own:
                block = roles.own[task]
                target = (block.sam if perturbed else block.jac)[0]
                chosen = [of[k] for k in roles.own_index[task]]
                self.own_sq[task] = block.pack(target, chosen, accumulate=task in self.own_sq)
        self.present.update(tasks)
        self._begun = True

    def shared_norm(self) -> Tensor:
        """The squared norm of the shared row, float64 0-dim; 0 if nothing is shared."""
        if self.shared_sq is None:
            return torch.zeros((), dtype=torch.float64, device=self._roles.params[0].device)
        return self.shared_sq

    def unpack(self, row: Tensor | None) -> dict[int, Tensor]:
        """Position of a parameter -> its gradient so far, before the blocks are laid out anew."""
        roles = self._roles
        grads: dict[int, Tensor] = {}
        if roles.shared is not None and row is not None:
            grads.update(zip(roles.shared_index, roles.shared.views(row), strict=True))
        for task in self.own_sq:
            block = roles.own[task]
            grads.update(zip(roles.own_index[task], block.views(block.jac[0]), strict=True))
        return grads

    def repack(self, grads: dict[int, Tensor], row: Tensor | None) -> None:
        """Puts the gradients of ``unpack`` into the new blocks."""
        roles = self._roles
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

    def own_gradient(self, task: int, row: Tensor, out: Tensor) -> Tensor:
        """``out`` [P] <- the gradient of the task's own parameters, from its row; its squared norm."""
        seed = self._seeds[task].to(row.device)
        torch.div(row, seed, out=out)
        return self.own_sq[task] / seed.square()
