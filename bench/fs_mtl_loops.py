"""FS-MTL the way research code does it: Python loops over parameters, lists of clones, host reads.

Written from a description of that style, not from anybody's code; the same mathematics and passes as
``bench.fs_mtl_torch`` (Phan et al., arXiv 2211.13723, Alg. 1, with PCGrad's sum). Its marks: ``backward()``
and a clone of every ``.grad``; norms of tensor after tensor, read with ``.item()``; weights swapped through
``.data``; flat gradients as lists; PCGrad on deep copies with a dot product a tensor and a host read a
pair; results flattened, added and cut up again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Closure = Callable[..., list[Tensor]]
Order = Sequence[Sequence[int]] | None


def pcgrad(grads: list[list[Tensor]], order: Order) -> list[list[Tensor]]:
    """The projected gradients of every task, tensor by tensor."""
    tasks = len(grads)
    projected = copy.deepcopy(grads)
    for i, own in enumerate(projected):
        for j in random.sample(range(tasks), tasks) if order is None else order[i]:
            if j == i:
                continue
            dot = sum(
                torch.dot(a.flatten(), b.flatten()) for a, b in zip(own, grads[j], strict=True)
            )
            if dot < 0:
                square = sum(b.norm() ** 2 for b in grads[j])
                for k, b in enumerate(grads[j]):
                    own[k] = own[k] - dot / square * b
    return projected


def total(grads: list[list[Tensor]]) -> Tensor:
    """The sum over the tasks, as one vector."""
    return torch.stack([torch.cat([g.flatten() for g in own]) for own in grads]).sum(0)


def _norm(grads: list[Tensor]) -> float:
    return torch.norm(torch.stack([g.norm(p=2) for g in grads])).item()


class LoopsFsMtl:
    """One training step at a time; the arguments are those of ``ForeachFsMtl``."""

    def __init__(
        self,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        base: torch.optim.Optimizer,
        *,
        rho: float | None,
        model: nn.Module,
        orders: Sequence[Order] = (None, None),
    ) -> None:
        self.shared, self.own = list(shared), [list(o) for o in own]
        self.base, self.rho, self.model, self.orders = base, rho, model, orders

    def _gradients(
        self, loss: Tensor, task: int, retain: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Clones of the shared and of the task's own gradients."""
        self.base.zero_grad()
        loss.backward(retain_graph=retain)
        shared = [p.grad.detach().clone() for p in self.shared]
        return shared, [p.grad.detach().clone() for p in self.own[task]]

    def step(self, closure: Closure) -> list[Tensor]:
        """One step; the closure computes the losses of the tasks it is asked for (all)."""
        tasks = len(self.own)
        losses = closure()
        clean, own = [], []
        for task, loss in enumerate(losses):
            shared_grads, own_grads = self._gradients(loss, task, retain=task + 1 < tasks)
            clean.append(shared_grads)
            own.append(own_grads)
        update = total(pcgrad(clean, self.orders[0]))
        if self.rho is not None:
            flat, own = self._perturbed(closure, clean, own)
            update = update + total(pcgrad(flat, self.orders[1]))
        begin = 0
        for param in self.shared:
            param.grad = update[begin : begin + param.numel()].view(param.shape).clone()
            begin += param.numel()
        for params, grads in zip(self.own, own, strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        self.base.step()
        return [loss.detach() for loss in losses]

    def _perturbed(
        self, closure: Closure, clean: list[list[Tensor]], own: list[list[Tensor]]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The flat gradients (perturbed minus clean) and the perturbed own ones of every task."""
        assert self.rho is not None
        momenta = self._stop_statistics()
        flat, perturbed_own = [], []
        for task in range(len(self.own)):
            kept = []
            for params, grads in ((self.shared, clean[task]), (self.own[task], own[task])):
                scale = self.rho / (_norm(grads) + 1e-12)
                for param, grad in zip(params, grads, strict=True):
                    kept.append((param, param.data.clone()))
                    param.data = param.data + scale * grad
            shared_grads, own_grads = self._gradients(closure(tasks=[task])[0], task, False)
            for param, data in kept:
                param.data = data
            flat.append([s - g for s, g in zip(shared_grads, clean[task], strict=True)])
            perturbed_own.append(own_grads)
        for module, momentum in momenta:
            module.momentum = momentum
        return flat, perturbed_own

    def _stop_statistics(self) -> list[tuple[nn.Module, float]]:
        """Momentum 0 keeps the running statistics as they are; returns what it was."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [(m, m.momentum) for m in norms]
        for module in norms:
            module.momentum = 0.0
        return momenta
