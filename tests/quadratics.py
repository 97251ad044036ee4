"""Quadratic multi-task problems, in torch and in numpy side by side.

L_i = 0.5 || A_i (shared, head_i) - b_i ||^2. All gradients are known, and those at perturbed
parameters too: g_SAM = g + A'A eps.
"""

from __future__ import annotations

import numpy as np
import oracles
import torch
from torch import Tensor
from torch.nn import Parameter


class Problem:
    """Shared parameters in two tensors, one head a task (or none)."""

    def __init__(
        self, rng: np.random.Generator, tasks: int = 3, shared: int = 7, head: int = 4,
        dtype: torch.dtype = torch.float64, device: str = "cpu", scale: np.ndarray | float = 1.0,
    ) -> None:  # fmt: skip
        scale = np.broadcast_to(scale, (tasks,))
        size = shared + head
        # Far targets: the gradients point in all directions, so that tasks do conflict. Near ones
        # would leave A'A x, of which all tasks have much in common.
        self.tasks = [
            oracles.Quadratic(scale[i] * rng.standard_normal((size + 2, size)),
                              scale[i] * 20 * rng.standard_normal(size + 2))
            for i in range(tasks)
        ]  # fmt: skip
        self.count, self.dtype, self.device = tasks, dtype, device
        start = torch.from_numpy(rng.standard_normal(shared)).to(dtype).to(device)
        self.shared = [Parameter(start[: shared // 2].clone()),
                       Parameter(start[shared // 2 :].clone().view(-1, 1))]  # fmt: skip
        self.heads = [
            Parameter(torch.from_numpy(rng.standard_normal(head)).to(dtype).to(device))
            for _ in range(tasks if head else 0)
        ]
        self.a = [torch.from_numpy(q.a).to(dtype).to(device) for q in self.tasks]
        self.b = [torch.from_numpy(q.b).to(dtype).to(device) for q in self.tasks]

    def parameters(self) -> list[Parameter]:
        return self.shared + self.heads

    def loss(self, i: int) -> Tensor:
        x = [p.reshape(-1) for p in self.shared] + self.heads[i : i + 1]
        return 0.5 * (self.a[i] @ torch.cat(x) - self.b[i]).square().sum()

    def losses(self, tasks: list[int] | None = None) -> list[Tensor]:
        return [self.loss(i) for i in (range(self.count) if tasks is None else tasks)]

    # numpy twins

    def shared_values(self) -> np.ndarray:
        return values(self.shared)

    def head_values(self) -> list[np.ndarray]:
        return [values([h]) for h in self.heads] or [np.zeros(0)] * self.count

    def shared_grad(self) -> np.ndarray:
        return np.concatenate([p.grad.detach().cpu().numpy().reshape(-1) for p in self.shared])

    def head_grads(self) -> list[np.ndarray]:
        return [h.grad.detach().cpu().numpy() for h in self.heads]


def values(params: list[Parameter]) -> np.ndarray:
    return np.concatenate([p.detach().cpu().double().numpy().reshape(-1) for p in params])


def snapshot(params: list[Tensor]) -> list[tuple[int, Tensor]]:
    return [(p.data_ptr(), p.detach().clone()) for p in params]


def untouched(params: list[Tensor], before: list[tuple[int, Tensor]]) -> bool:
    """The same bits in the same storage."""
    return all(
        p.data_ptr() == pointer and torch.equal(p.detach(), old)
        for p, (pointer, old) in zip(params, before, strict=True)
    )
