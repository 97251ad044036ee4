"""FS-MTL in plain torch, as somebody writes it who knows torch well: the rival to be measured against.

Phan et al., arXiv 2211.13723, Alg. 1, with PCGrad's sum, in (1+T) forward and 2T backward passes. All
buffers are made once; the T x P matrices are preallocated and gradients are copied straight into their
rows; parameters are handled by ``_foreach`` operators; PCGrad works on the T x T Gram matrix on the
host; ``.grad`` are views of the update. No custom kernels, no compilation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Closure = Callable[..., list[Tensor]]


def pcgrad_weights(gram: list[list[float]], order: Sequence[Sequence[int]] | None) -> list[float]:
    """PCGrad (sum) on coefficients (Yu et al., arXiv 2001.06782, Alg. 1).

    Args:
        gram: [T][T], dot products of the tasks' gradients.
        order: row i lists the tasks in the order in which task i is projected; None: drawn.
    """
    tasks = len(gram)
    total = [0.0] * tasks
    for i in range(tasks):
        own = [0.0] * tasks  # task i's projected gradient, as a combination of all
        own[i] = 1.0
        for j in random.sample(range(tasks), tasks) if order is None else order[i]:
            if j == i:
                continue
            dot = sum(c * g for c, g in zip(own, gram[j], strict=True))
            if dot < 0:
                own[j] -= dot / gram[j][j]
        total = [a + b for a, b in zip(total, own, strict=True)]
    return total


def _views(row: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    pieces = row.split([p.numel() for p in params])
    return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]


class ForeachFsMtl:
    """One training step at a time.

    Args:
        shared: the shared parameters.
        own: task -> its own parameters.
        base: the optimizer that makes the update.
        rho: radius; None: no sharpness, plain PCGrad.
        model: whose BatchNorm statistics the perturbed passes must leave alone.
        orders: PCGrad's fixed orders, for the losses' and for the flat gradients; None: drawn.
    """

    def __init__(
        self,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        base: torch.optim.Optimizer,
        *,
        rho: float | None,
        model: nn.Module,
        orders: Sequence[Sequence[Sequence[int]] | None] = (None, None),
    ) -> None:
        self.shared, self.own = list(shared), [list(o) for o in own]
        self.base, self.rho, self.orders = base, rho, orders
        tasks, size = len(self.own), sum(p.numel() for p in self.shared)
        make = self.shared[0].new_empty
        self.jac = make(tasks, size, requires_grad=False)
        self.jac_views = [_views(row, self.shared) for row in self.jac]
        self.update = make(size, requires_grad=False)
        for param, view in zip(self.shared, _views(self.update, self.shared), strict=True):
            param.grad = view
        if rho is None:
            return
        self.sam = torch.empty_like(self.jac)
        self.sam_views = [_views(row, self.shared) for row in self.sam]
        # of the shared parameters, and of the own ones of every task
        self.saved = _views(make(size, requires_grad=False), self.shared)
        self.saved_own = [[torch.empty_like(p) for p in params] for params in self.own]
        self.buffers = list(model.buffers())
        self.saved_buffers = [torch.empty_like(b) for b in self.buffers]

    def _gradients(self, loss: Tensor, task: int, to: list[Tensor], retain: bool) -> list[Tensor]:
        """The shared gradients -> ``to``; returns the task's own."""
        grads = torch.autograd.grad(loss, self.shared + self.own[task], retain_graph=retain)
        torch._foreach_copy_(to, grads[: len(self.shared)])
        return list(grads[len(self.shared) :])

    @torch.no_grad()
    def step(self, closure: Closure) -> list[Tensor]:
        """One step; the closure computes the losses of the tasks it is asked for (all)."""
        tasks = len(self.own)
        with torch.enable_grad():
            losses = closure()
        own_grads = [
            self._gradients(loss, task, self.jac_views[task], task + 1 < tasks)
            for task, loss in enumerate(losses)
        ]
        gram = (self.jac @ self.jac.T).tolist()
        weights = self.jac.new_tensor(pcgrad_weights(gram, self.orders[0]))
        if self.rho is None:
            torch.mv(self.jac.T, weights, out=self.update)
        else:
            norms = [gram[i][i] ** 0.5 for i in range(tasks)]
            own_grads = self._perturbed(closure, norms, own_grads)
            flat = self.sam.sub_(self.jac)
            flat_gram = (flat @ flat.T).tolist()
            flat_weights = pcgrad_weights(flat_gram, self.orders[1])
            torch.mv(self.jac.T, weights, out=self.update)
            self.update.addmv_(flat.T, self.jac.new_tensor(flat_weights))
        for params, grads in zip(self.own, own_grads, strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        self.base.step()
        return [loss.detach() for loss in losses]

    def _perturbed(
        self, closure: Closure, norms: list[float], own_grads: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Fills ``sam``; returns every task's own gradients. Parameters are as before afterwards."""
        assert self.rho is not None
        torch._foreach_copy_(self.saved, self.shared)
        if self.buffers:
            torch._foreach_copy_(self.saved_buffers, self.buffers)
        found = []
        for task, own in enumerate(self.own):
            torch._foreach_copy_(self.saved_own[task], own)
            if norms[task] > 0:
                scale = self.rho / norms[task]
                torch._foreach_add_(self.shared, self.jac_views[task], alpha=scale)
            own_norm = float(torch.stack(torch._foreach_norm(own_grads[task])).norm())
            if own_norm > 0:
                torch._foreach_add_(own, own_grads[task], alpha=self.rho / own_norm)
            with torch.enable_grad():
                loss = closure(tasks=[task])[0]
            found.append(self._gradients(loss, task, self.sam_views[task], retain=False))
            torch._foreach_copy_(self.shared, self.saved)
            torch._foreach_copy_(own, self.saved_own[task])
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.saved_buffers)
        return found
