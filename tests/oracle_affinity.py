"""Quadratic task losses for which affinities are known in closed form, in numpy beside torch.

L_j(s, h_j) = 1/2 ||M_j (x - c_j)||^2 + b_j, x = [s, h_j], s shared, h_j the task's own parameters, and
b_j > 0 keeps the loss positive. A step s -> s - u changes it by exactly -<g_j, u> + 1/2 u' A_j u, where
A_j is the shared block of M_j' M_j. Rows are recipients, columns sources.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

Names = Sequence[int | str]


class Quadratics:
    """T quadratic losses over shared parameters in several tensors and one head a task (or none)."""

    def __init__(
        self, rng: np.random.Generator, tasks: int = 3, shapes: Sequence[tuple[int, ...]] = ((3,), (2, 2)),
        head: int = 2, scale: np.ndarray | float = 1.0, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        size = sum(int(np.prod(shape)) for shape in shapes)
        scale = np.broadcast_to(scale, (tasks,))
        exact = (
            np.float32 if dtype == torch.float32 else np.float64
        )  # both sides see the same numbers

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(exact).astype(np.float64)

        self.count, self.size = tasks, size
        self.m = [
            (scale[j] * draw(size + head + 1, size + head)).astype(exact) for j in range(tasks)
        ]
        self.m = [m.astype(np.float64) for m in self.m]
        self.c = [draw(size + head) for _ in range(tasks)]
        self.b = (scale**2 * rng.uniform(0.5, 20, tasks)).astype(exact).astype(np.float64)
        self.shared = [Parameter(torch.from_numpy(draw(*shape)).to(dtype)) for shape in shapes]
        self.heads = [Parameter(torch.from_numpy(draw(head)).to(dtype)) for _ in range(tasks)]
        self.heads = self.heads if head else []
        self._torch = [(torch.from_numpy(m).to(dtype), torch.from_numpy(c).to(dtype))
                       for m, c in zip(self.m, self.c)]  # fmt: skip

    def parameters(self) -> list[Parameter]:
        return self.shared + self.heads

    # ---------------------------------------------------------------- torch

    def loss(self, j: int) -> Tensor:
        x = torch.cat([p.reshape(-1) for p in self.shared] + self.heads[j : j + 1])
        m, c = self._torch[j]
        return 0.5 * (m @ (x - c)).square().sum() + float(self.b[j])

    def losses(self, missing: Iterable[int] = ()) -> list[Tensor | None]:
        return [None if j in missing else self.loss(j) for j in range(self.count)]

    # ---------------------------------------------------------------- numpy, at the present parameters

    def _x(self, j: int) -> np.ndarray:
        return np.concatenate([flat(self.shared), flat(self.heads[j : j + 1])])

    def values(self) -> np.ndarray:
        """L [T]."""
        r = [m @ (self._x(j) - self.c[j]) for j, m in enumerate(self.m)]
        return np.array([0.5 * x @ x for x in r]) + self.b

    def grads(self) -> np.ndarray:
        """Gradients with respect to the shared parameters [T, S]."""
        return np.stack(
            [m.T[: self.size] @ (m @ (self._x(j) - self.c[j])) for j, m in enumerate(self.m)]
        )

    def safe_lr(self, share: float = 0.3) -> float:
        """So short that no step overshoots by much, so long that Z is not lost in rounding."""
        a = [m[:, : self.size] for m in self.m]
        return share / max(np.linalg.norm(x, 2) ** 2 for x in a)

    def affinity(self, steps: np.ndarray) -> np.ndarray:
        """Z [T, K] of the steps s -> s - u, u = ``steps`` [K, S]."""
        fall = self.grads() @ steps.T
        for j, m in enumerate(self.m):
            fall[j] -= 0.5 * np.square(m[:, : self.size] @ steps.T).sum(axis=0)
        return fall / self.values()[:, None]

    def exact(self, lr: float) -> np.ndarray:
        """Z [T, T] of plain SGD steps."""
        return self.affinity(lr * self.grads())

    def of_groups(self, lr: float, groups: Sequence[Sequence[int]]) -> np.ndarray:
        """Z [T, K] of plain steps on the sum of each group's losses."""
        g = self.grads()
        return self.affinity(lr * np.stack([g[list(group)].sum(axis=0) for group in groups]))

    def first_order(
        self, lr: float, momentum: float = 0.0, buf: np.ndarray | None = None
    ) -> np.ndarray:
        """<g_j, lr (g_i + mu buf)> / L_j [T, T]; buf [S], None before the optimizer's first step."""
        g = self.grads()
        u = lr * (g if buf is None else g + momentum * buf)
        return g @ u.T / self.values()[:, None]

    def cosine(self) -> np.ndarray:
        """[T, T]."""
        g = self.grads()
        g = g / np.linalg.norm(g, axis=1, keepdims=True)
        return g @ g.T

    def rounding(self, steps: np.ndarray, eps: float = 2e-16) -> np.ndarray:
        """What float rounding of the two losses may do to Z [T, K]: some eps of their ratio, and of what
        cancels inside M (x - c)."""
        z = self.affinity(steps)
        inner = np.stack([
            (np.abs(m) @ np.abs(self._x(j) - self.c[j])) @ (np.abs(m) @ np.abs(self._x(j) - self.c[j]))
            for j, m in enumerate(self.m)
        ]) / self.values()  # fmt: skip
        u = np.abs(steps)
        moved = np.stack([np.square(np.abs(m[:, : self.size]) @ u.T).sum(axis=0) for m in self.m])
        size = self.size + len(self.m)
        return size * eps * (1 + np.abs(z) + inner[:, None] + moved / self.values()[:, None])


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    parts = [t.detach().double().reshape(-1).numpy() for t in tensors]
    return np.concatenate(parts) if parts else np.zeros(0)


def as_given(form: str, losses: list[Tensor | None], names: Names = ()) -> object:
    """The losses as a closure may return them."""
    if form == "list":
        return losses
    if form == "tuple":
        return tuple(losses)
    if form == "stack":
        return torch.stack([loss for loss in losses if loss is not None])
    return dict(zip(names or [f"t{j}" for j in range(len(losses))], losses))


def total(losses: object) -> Tensor:
    """Their sum, whatever the form; None is left out."""
    if isinstance(losses, Tensor):
        return losses.sum()
    entries = losses.values() if isinstance(losses, dict) else losses
    return sum(loss for loss in entries if loss is not None)


def momentum_buffer(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> np.ndarray | None:
    """buf [S] of torch's SGD; None before its first step."""
    found = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
    return None if any(b is None for b in found) else flat(found)


def sgd_steps(
    grads: np.ndarray, at: np.ndarray, buf: np.ndarray | None, *, lr: float, momentum: float = 0.0,
    dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
) -> np.ndarray:  # fmt: skip
    """u [K, S] of torch.optim.SGD's next step from each gradient [K, S], s -> s - u."""
    d = grads + weight_decay * at
    if momentum:
        new = d if buf is None else momentum * buf + (1 - dampening) * d
        d = d + momentum * new if nesterov else new
    return lr * d


def real_steps(
    optimizer: torch.optim.Optimizer, shared: Sequence[Tensor], grads: np.ndarray
) -> np.ndarray:
    """u [K, S]: what a copy of the optimizer, in its present state, does with each gradient [K, S]."""
    before, steps = flat(shared), []
    for grad in grads:
        twins = {
            id(p): p.detach().clone().requires_grad_()
            for g in optimizer.param_groups
            for p in g["params"]
        }
        groups = [
            {**g, "params": [twins[id(p)] for p in g["params"]]} for g in optimizer.param_groups
        ]
        copied = type(optimizer)(groups)
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share tensors
        at = 0
        for p in shared:
            part = torch.from_numpy(grad[at : at + p.numel()].copy())
            twins[id(p)].grad = part.view(p.shape).to(p.dtype)
            at += p.numel()
        copied.step()
        steps.append(before - flat([twins[id(p)] for p in shared]))
    return np.stack(steps)


def stepped(
    losses: Callable[[], Sequence[Tensor]], shared: Sequence[Tensor], lr: float
) -> np.ndarray:
    """Z [T, T] of any differentiable losses by walking there: the parameters come back bit for bit."""
    before = [loss.detach().double() for loss in losses()]
    z = np.zeros((len(before), len(before)))
    for i in range(len(before)):
        grads = torch.autograd.grad(losses()[i], shared)
        kept = [p.detach().clone() for p in shared]
        with torch.no_grad():
            for p, g in zip(shared, grads):
                p -= lr * g
            z[:, i] = [1 - float(x) / float(y) for x, y in zip(losses(), before)]
            for p, old in zip(shared, kept):
                p.copy_(old)
    return z


class Samples:
    """Raw samples [N, ...] and their plain statistics, NaN for what was not measured."""

    def __init__(self, samples: Sequence[np.ndarray]) -> None:
        self.raw = np.stack(samples)

    @property
    def count(self) -> np.ndarray:
        return np.isfinite(self.raw).sum(axis=0)

    def _reduced(self, least: int, how: Callable[[np.ndarray], float]) -> np.ndarray:
        out = np.full(self.raw.shape[1:], np.nan)
        for at in np.ndindex(out.shape):
            x = self.raw[(slice(None), *at)]
            x = x[np.isfinite(x)]
            if len(x) >= least:
                out[at] = how(x)
        return out

    @property
    def mean(self) -> np.ndarray:
        return self._reduced(1, lambda x: float(np.mean(x)))

    @property
    def standard_error(self) -> np.ndarray:
        return self._reduced(2, lambda x: float(np.std(x, ddof=1) / np.sqrt(len(x))))


def without(z: np.ndarray, rows: Iterable[int] = (), columns: Iterable[int] = ()) -> np.ndarray:
    """A copy with NaN (not measured) in these rows and columns."""
    z = z.copy()
    z[list(rows)] = np.nan
    z[:, list(columns)] = np.nan
    return z
