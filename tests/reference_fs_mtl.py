"""FS-MTL (arXiv 2211.13723, Alg. 1) in plain torch, loops and all. Nothing here imports flatmtl.

`Reference(model, weights, base, sharpness).step(closure)` trains in whatever dtype the model has:
in float64 it is the truth, in float32 it is what anyone would write in plain torch.

    g_i  = grad L_i(theta_sh, theta_i)                            i = 1..T, one batch
    eps  = rho T^2 g / ||T g||,  T = 1 (SAM), |theta| + eta (ASAM); shared and own apart, or jointly
    s_i  = grad L_i(theta_sh + eps_sh^i, theta_i + eps_i)
    f_i  = s_i - g_i
    d_sh = A({g_i}) + A({f_i}),  d_i = s_i on the own parameters

A({v_i}) = sum_i w_i v_i with the weights w of the Gram matrix <v_i, v_j>.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import oracles_weighting as ow
import torch
from torch import Tensor, nn

Weights = Callable[[np.ndarray], np.ndarray]  # Gram matrix [T, T] -> weights [T]

RIDGE = 1e-10  # on the diagonal of the cosines: part of what the documented methods solve


# ---- weights -------------------------------------------------------------------------------------


def among_active(solve: Weights) -> Weights:
    """A row that is zero takes no part and has weight zero."""

    def weights(gram: np.ndarray) -> np.ndarray:
        active = np.flatnonzero(np.diag(gram) > 0)
        out = np.zeros(len(gram))
        if len(active):
            out[active] = solve(gram[np.ix_(active, active)])
        return out

    return weights


def mean(gram: np.ndarray) -> np.ndarray:
    """Of all tasks, those with a zero row too."""
    return np.where(np.diag(gram) > 0, 1 / len(gram), 0.0)


def constant(values: Sequence[float]) -> Weights:
    return lambda gram: np.where(np.diag(gram) > 0, np.asarray(values, float), 0.0)


def pcgrad(order: np.ndarray) -> Weights:
    """v_i = g_i; for j in the order of i: if <v_i, g_j> < 0, v_i -= <v_i, g_j> / ||g_j||^2 g_j."""

    def weights(gram: np.ndarray) -> np.ndarray:
        total = np.zeros(len(gram))
        for i in range(len(gram)):
            v = np.zeros(len(gram))  # v_i = sum_k v[k] g_k
            v[i] = 1.0
            for j in order[i]:
                if j != i and gram[i, i] > 0 and gram[j, j] > 0:
                    dot = v @ gram[:, j]
                    if dot < 0:
                        v[j] -= dot / gram[j, j]
            total += v * (gram[i, i] > 0)
        return total

    return weights


mgda = among_active(lambda gram: ow.mgda(gram, RIDGE))
fairgrad = among_active(lambda gram: ow.fair(gram, 2.0, ridge=RIDGE))


def _nash(gram: np.ndarray) -> np.ndarray:
    """G w = 1 / w, and the update no longer than 1."""
    w = ow.fair(gram, 1.0, ridge=RIDGE)
    return w / max(1.0, math.sqrt(w @ gram.astype(float) @ w))


def _cagrad(gram: np.ndarray) -> np.ndarray:
    """On any vectors with these products: V sqrt(lambda) of gram = V lambda V'."""
    values, vectors = np.linalg.eigh(gram.astype(float))
    return ow.cagrad(vectors * np.sqrt(np.maximum(values, 0)), 0.4)


nash = among_active(_nash)


def cagrad(gram: np.ndarray) -> np.ndarray:
    """The mean that it stays near to is over all tasks: with zero rows, everything is shorter."""
    return among_active(_cagrad)(gram) * (np.diag(gram) > 0).mean()


def cyclic_order(tasks: int) -> np.ndarray:
    """Task i is projected on i+1, i+2, ... in this order."""
    return np.stack([(i + 1 + np.arange(tasks)) % tasks for i in range(tasks)])


# ---- the trainer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharpness:
    rho: float
    rho_task: float | None = None
    adaptive: bool = False
    eta: float = 0.0
    exempt_bias: bool = False
    joint_norm: bool = False
    aggregate: str = "decomposed"
    every: int = 1
    warmup: int = 0


class Reference:
    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        base: torch.optim.Optimizer,
        sharpness: Sharpness | None = None,
        weights_every: int = 1,
    ) -> None:
        self.model, self.weights, self.base = model, weights, base
        self.sharpness, self.weights_every = sharpness, weights_every
        names, params = zip(*model.named_parameters())  # a tied one comes once
        self.names: list[str] = list(names)
        self.params: list[nn.Parameter] = list(params)
        self.shared: list[int] = []
        self.own: list[list[int]] = []
        self.steps = 0
        self.a: np.ndarray | None = None  # weights of the last solve, of the clean rows
        self.b: np.ndarray | None = None  # and of the flat ones
        self.flat: Tensor | None = None  # A({f}) of the last perturbed passes
        self.own_flat: list[list[Tensor]] = []

    # ---- gradients

    def grad(self, loss: Tensor, keep: bool = True) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self.params, retain_graph=keep, allow_unused=True))

    def find_roles(self, rows: list[list[Tensor | None]]) -> None:
        """Shared is what two tasks reach (all of it where there is one task), own what one does."""
        reached = [[g is not None for g in row] for row in rows]
        count = [sum(column) for column in zip(*reached)]
        many = 2 if len(rows) > 1 else 1
        self.shared = [k for k, c in enumerate(count) if c >= many]
        self.own = [
            [k for k, hit in enumerate(row) if hit and k not in self.shared] for row in reached
        ]

    def flatten(self, row: list[Tensor | None], index: list[int]) -> Tensor:
        """The part of a gradient that lies in some parameters, as one vector."""
        parts = [
            (torch.zeros_like(self.params[k]) if row[k] is None else row[k]).reshape(-1)
            for k in index
        ]
        return torch.cat(parts) if parts else self.params[0].new_zeros(0)

    def unflatten(self, vector: Tensor, index: list[int]) -> list[Tensor]:
        sizes = [self.params[k].numel() for k in index]
        return [part.view_as(self.params[k]).clone() for part, k in zip(vector.split(sizes), index)]

    # ---- perturbation

    def radii(self) -> tuple[float, float]:
        """rho of the shared parameters and of the own ones, at this step."""
        s = self.sharpness
        assert s is not None
        factor = min(1.0, (self.steps + 1) / s.warmup) if s.warmup else 1.0
        return factor * s.rho, factor * (s.rho if s.rho_task is None else s.rho_task)

    def metric(self, k: int) -> Tensor:
        """T: 1, or |theta| + eta."""
        s, p = self.sharpness, self.params[k].detach()
        assert s is not None
        exempt = s.exempt_bias and "bias" in self.names[k].split(".")[-1]
        return p.abs() + s.eta if s.adaptive and not exempt else torch.ones_like(p)

    def perturb(self, blocks: list[tuple[list[Tensor], list[int], float]]) -> None:
        """theta += rho T^2 g / ||T g|| in every block (gradients, parameters, rho)."""
        moves, squares = [], []
        for grads, index, rho in blocks:
            metrics = [self.metric(k) for k in index]
            squares.append(
                sum(((t * g) ** 2).sum() for t, g in zip(metrics, grads))
                if index
                else torch.zeros(())
            )
            moves.append([(k, rho * t**2 * g) for k, t, g in zip(index, metrics, grads)])
        if self.sharpness is not None and self.sharpness.joint_norm:
            squares = [sum(squares)] * len(squares)
        with torch.no_grad():
            for steps, square in zip(moves, squares):
                for k, step in steps:
                    if square > 0:
                        self.params[k] += step / square.sqrt()

    def blocks_of(self, i: int, row: list[Tensor | None]) -> list:
        rho, rho_task = self.radii()
        return [
            (self.unflatten(self.flatten(row, self.shared), self.shared), self.shared, rho),
            (self.unflatten(self.flatten(row, self.own[i]), self.own[i]), self.own[i], rho_task),
        ]

    # ---- aggregation

    def solve(self, rows: Tensor) -> np.ndarray:
        return self.weights((rows @ rows.T).numpy())

    def combine(self, weights: np.ndarray, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows[0])
        for w, row in zip(weights, rows):
            out = out + float(w) * row
        return out

    def aggregate(self, rows: Tensor) -> Tensor:
        return self.combine(self.solve(rows), rows)

    # ---- one step

    def step(self, closure: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        losses = list(closure())  # the only pass that moves running statistics
        statistics = [b.clone() for b in self.model.buffers()]
        theta = [p.detach().clone() for p in self.params]

        def put_back() -> None:
            with torch.no_grad():
                for p, old in zip(self.params, theta):
                    p.copy_(old)
                for b, old in zip(self.model.buffers(), statistics):
                    b.copy_(old)

        if not self.shared:
            self.find_roles([self.grad(loss) for loss in losses])
        if self.steps % self.weights_every == 0:
            shared, own = self.solving_step(closure, losses, put_back)
        else:
            shared, own = self.weighted_step(closure, losses, put_back)

        for p in self.params:
            p.grad = None
        for k, g in zip(self.shared, self.unflatten(shared, self.shared)):
            self.params[k].grad = g
        for index, gradient in zip(self.own, own):
            for k, g in zip(index, self.unflatten(gradient, index)):
                self.params[k].grad = g
        self.base.step()
        self.steps += 1
        return [loss.detach() for loss in losses]

    def solving_step(self, closure, losses, put_back) -> tuple[Tensor, list[Tensor]]:
        """Every task's gradient on its own: the shared and the own part of the update."""
        s, tasks = self.sharpness, range(len(losses))
        rows = [self.grad(loss) for loss in losses]
        g = torch.stack([self.flatten(row, self.shared) for row in rows])
        g_own = [self.flatten(rows[i], self.own[i]) for i in tasks]
        if s is None or not any(self.radii()):
            self.a = self.b = self.solve(g)
            return self.combine(self.a, g), g_own
        if self.steps % s.every:  # between: what is flat about the last ones
            return self.aggregate(g) + self.flat, [a + b for a, b in zip(g_own, self.own_flat)]

        perturbed = []
        for i in tasks:
            self.perturb(self.blocks_of(i, rows[i]))
            perturbed.append(self.grad(list(closure())[i], keep=False))
            put_back()
        sam = torch.stack([self.flatten(row, self.shared) for row in perturbed])
        own = [self.flatten(perturbed[i], self.own[i]) for i in tasks]
        f = sam - g
        if s.aggregate == "decomposed":
            self.a, self.b = self.solve(g), self.solve(f)
            self.flat = self.combine(self.b, f)
            self.own_flat = [a - b for a, b in zip(own, g_own)]
            return self.combine(self.a, g) + self.flat, own
        if s.aggregate == "direct":
            self.a = self.b = self.solve(sam)
            return self.combine(self.a, sam), own
        if s.aggregate == "second":
            return self.aggregate(torch.stack([self.aggregate(g), self.aggregate(f)])), own
        assert s.aggregate == "each"
        each = [self.aggregate(torch.stack([g[i], f[i]])) for i in tasks]
        return self.aggregate(torch.stack(each)), own

    def weighted(self, weights: np.ndarray, losses: Sequence[Tensor]) -> Tensor:
        """Gradient of sum_i w_i L_i in the shared parameters."""
        total = sum(float(w) * loss for w, loss in zip(weights, losses))
        return self.flatten(self.grad(total), self.shared)

    def weighted_step(self, closure, losses, put_back) -> tuple[Tensor, list[Tensor]]:
        """Between two solves: the last weights, one perturbation of the shared parameters."""
        s, tasks = self.sharpness, range(len(losses))
        assert self.a is not None
        assert self.b is not None
        rows = [self.grad(loss) for loss in losses]
        own = [self.flatten(rows[i], self.own[i]) for i in tasks]
        g_a = self.weighted(self.a, losses)
        if s is None or not any(self.radii()):
            return g_a, own
        g_b = self.weighted(self.b, losses)
        blocks = [(self.unflatten(g_a, self.shared), self.shared, self.radii()[0])]
        blocks += [self.blocks_of(i, rows[i])[1] for i in tasks]
        self.perturb(blocks)
        again = list(closure())
        s_b = self.weighted(self.b, again)
        own = [self.flatten(self.grad(again[i]), self.own[i]) for i in tasks]
        put_back()
        assert s.aggregate in ("decomposed", "direct")
        return (g_a + s_b - g_b if s.aggregate == "decomposed" else s_b), own

    # ---- its place on a trajectory

    def place_at(self, other: Reference) -> None:
        """Takes up parameters, buffers and moments, in its own dtype."""
        with torch.no_grad():
            for mine, theirs in zip(
                self.model.state_dict().values(), other.model.state_dict().values()
            ):
                mine.copy_(theirs)
        self.base.load_state_dict(copy.deepcopy(other.base.state_dict()))
        self.steps = other.steps

    def copy_from(self, other: Reference) -> None:
        """The same, and all that is kept between steps."""
        self.place_at(other)
        self.shared, self.own = other.shared, other.own
        self.a, self.b = other.a, other.b
        dtype = self.params[0].dtype
        self.flat = None if other.flat is None else other.flat.to(dtype)
        self.own_flat = [v.to(dtype) for v in other.own_flat]
