"""Regularisers of the tasks' weights on shared features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmtl.ops import _check
from flatmtl.weighting import _options


@dataclass(frozen=True)
class Blocks:
    """The connected blocks of tasks and features.

    Attributes:
        tasks: int64 [T], the block of each task, numbered from 0 in the order of the tasks.
        features: int64 [d], the block of each feature; one that no task uses is a block of its own.
        count: number of blocks, those without a task included: the Laplacian's zero eigenvalues.
    """

    tasks: Tensor
    features: Tensor
    count: int


class TaskFeatureLaplacian:
    """Makes a weight matrix fall apart into blocks of tasks with features of their own.

    After TFCL (task-feature collaborative learning, arXiv 2004.13930). A reconstruction: of the paper the
    abstract was read; the objective is from memory and agrees with the code of the authors' sibling method
    (GBDSP). Not checked against the paper's formulas or numbers.

    The tasks and features are the nodes of a bipartite graph whose links are |W|; its Laplacian Lp has
    as many zero eigenvalues as there are connected blocks. The term is

        strength <Lp, U> + ridge/2 ||W||^2,   <Lp, U> = sum_ij |W_ij| D_ij,   D_ij = U_ii + U_jj - 2 U_ij

    with U the projector on the ``groups`` smallest eigenvectors, for which <Lp, U> is their eigenvalues'
    sum: an l1 penalty that spares the links within a block. ``update`` makes D from the weights of the
    moment; then either ``penalty`` joins the loss, or ``prox_`` follows the optimizer's step, which sets
    links to exactly zero (with ``step`` the learning rate of a plain gradient step)::

        term = TaskFeatureLaplacian(groups=2, strength=1e-2, update_every=10)
        for batch in batches:
            optimizer.step(...)
            term.update(head.weight)
            term.prox_(head.weight, step=1e-2)

    The weights are [T, d], a row a task, as ``nn.Linear(d, T).weight`` has them; of a matrix [d, T] give
    ``W.T``, a view. Where eigenvalues at the place ``groups`` are equal, U takes an even share of all of
    them: otherwise it would hang on the eigensolver's whim.

    Args:
        groups: k, the number of blocks wanted, from 0 (no term but the ridge) to T + d. A feature that
            no task uses counts as a block.
        strength: a1, of the Laplacian term.
        ridge: a2, of the squared norm.
        smoothing: a3 of the convergent form, which adds a3/2 ||U||^2: U has the eigenvalues c, the
            projection of -(a1/a3) lambda on {0 <= c <= 1, sum c = k}. 0: the k smallest.
        update_every: ``update`` looks for D at its first call and at every so many.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        groups: int,
        *,
        strength: float,
        ridge: float = 0.0,
        smoothing: float = 0.0,
        update_every: int = 1,
    ) -> None:
        self.groups = _options.whole("groups", groups, at_least=0)
        self.strength = _options.real("strength", strength, at_least=0)
        self.ridge = _options.real("ridge", ridge, at_least=0)
        self.smoothing = _options.real("smoothing", smoothing, at_least=0)
        self.update_every = _options.whole("update_every", update_every, at_least=1)
        self._calls = 0
        self._distance: Tensor | None = None

    @property
    def distance(self) -> Tensor:
        """D, float64 [T, d], at least 0.

        Raises:
            RuntimeError: ``update`` was not called yet.
        """
        if self._distance is None:
            raise RuntimeError("update must be called before D is used, and was not")
        return self._distance

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Makes D from the weights: a dense float64 eigensolve of size T + d, on their device.

        It waits for the device. Between two of every ``update_every`` calls nothing happens.

        Args:
            weight: [T, d].

        Raises:
            TypeError, ValueError: ``weight`` is no matrix, not finite, of another shape than before, or
                smaller than ``groups`` asks for. The state is as it was.
        """
        matrix = self._matrix(weight)
        if self._calls % self.update_every == 0:
            if self.groups > sum(weight.shape):
                raise ValueError(
                    f"groups must be at most T + d = {sum(weight.shape)} for weights of shape "
                    f"{list(weight.shape)}, got {self.groups}"
                )
            values, vectors = torch.linalg.eigh(_laplacian(matrix))
            spread = vectors * self._shares(values).sqrt()  # [T + d, T + d], U = spread spread^T
            tasks, features = spread.split(list(weight.shape))
            # ||spread_i - spread_j||^2: never negative, and no difference of large numbers
            apart = torch.cdist(tasks, features, compute_mode="donot_use_mm_for_euclid_dist")
            self._distance = apart.square()
        self._calls += 1

    def _shares(self, values: Tensor) -> Tensor:
        """The eigenvalues of U [T + d], for the Laplacian's in ascending order."""
        k, n = self.groups, len(values)
        if k in (0, n):
            return torch.full_like(values, k / n)
        if self.smoothing:
            return _onto_capped_simplex(values * -(self.strength / self.smoothing), k)
        last = values[k - 1]
        rounding = 4 * n * torch.finfo(values.dtype).eps * values[-1]
        below, above = values < last - rounding, values > last + rounding
        equal = ~(below | above)
        return below + equal * ((k - below.sum()) / equal.sum())

    def penalty(self, weight: Tensor) -> Tensor:
        """The term as a loss: strength sum |W_ij| D_ij + ridge/2 ||W||^2, D held constant.

        Args:
            weight: [T, d].

        Returns:
            0-dim, of weight's dtype, float32 for half precision; differentiable.

        Raises:
            RuntimeError: ``update`` was not called yet.
            TypeError, ValueError: ``weight`` is no matrix of the shape that ``update`` saw.
        """
        self._fits(weight)
        w = weight.float() if weight.dtype in _check.HALF_TYPES else weight
        distance = self.distance.to(w)
        return self.strength * (w.abs() * distance).sum() + self.ridge / 2 * w.square().sum()

    @torch.no_grad()
    def prox_(self, weight: Tensor, step: float) -> Tensor:
        """The term's proximal step, in place: W <- sign(W) max(|W| - step strength D, 0)/(1 + step ridge).

        Args:
            weight: [T, d], written; usually a parameter.
            step: the step size of the gradient step before it.

        Returns:
            ``weight``.

        Raises:
            RuntimeError: ``update`` was not called yet.
            TypeError, ValueError: ``weight`` is no matrix of the shape that ``update`` saw, ``step`` is no
                number of at least 0.
        """
        self._fits(weight)
        size = _options.real("step", step, at_least=0)
        # in float64: a threshold below half the weight's last digit is lost only when it is stored
        w = weight.double()
        shrunk = (w.abs() - size * self.strength * self.distance.to(w)).clamp_(min=0.0)
        return weight.copy_(w.sign().mul_(shrunk).div_(1.0 + size * self.ridge))

    @staticmethod
    @torch.no_grad()
    def spectrum(weight: Tensor) -> Tensor:
        """The eigenvalues of the Laplacian of |W|, ascending: one about zero for each connected block.

        Args:
            weight: [T, d].

        Returns:
            float64 [T + d], on weight's device.

        Raises:
            TypeError, ValueError: ``weight`` is no finite matrix.
        """
        return torch.linalg.eigvalsh(_laplacian(_read(weight)))

    @staticmethod
    @torch.no_grad()
    def blocks(weight: Tensor, *, tolerance: float = 0.0) -> Blocks:
        """Which tasks and features hang together, by the links themselves; read on the host.

        Args:
            weight: [T, d].
            tolerance: a link |W_ij| at most this is none. ``prox_`` makes exact zeros, ``penalty`` only
                small numbers.

        Returns:
            The blocks, on the CPU.

        Raises:
            TypeError, ValueError: ``weight`` is no finite matrix, ``tolerance`` no number of at least 0.
        """
        least = _options.real("tolerance", tolerance, at_least=0)
        linked = (_read(weight) > least).cpu()  # [T, d]
        of_tasks = torch.full((linked.shape[0],), -1)
        of_features = torch.full((linked.shape[1],), -1)
        count = 0
        for task in range(linked.shape[0]):
            if of_tasks[task] >= 0:
                continue
            features = linked[task]
            tasks = linked[:, features].any(1)
            while not torch.equal(wider := linked[tasks].any(0), features):
                features, tasks = wider, linked[:, wider].any(1)
            tasks[task] = True  # one without a feature too
            of_tasks[tasks], of_features[features] = count, count
            count += 1
        unused = of_features < 0
        alone = int(unused.sum())
        of_features[unused] = torch.arange(count, count + alone)
        return Blocks(of_tasks, of_features, count + alone)

    def state_dict(self) -> dict[str, Any]:
        """D (a copy; None before the first update) and how often ``update`` was called."""
        distance = self._distance
        return {
            "distance": None if distance is None else distance.clone(),
            "calls": self._calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``, bit for bit; options are not part of it.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: an entry is none of a ``state_dict``.
        """
        distance, calls = state["distance"], _options.whole("calls", state["calls"], at_least=0)
        if distance is not None:
            if _check.tensor("distance", distance, (torch.float64,)).dim() != 2:
                raise ValueError(f"distance must have shape [T, d], got {list(distance.shape)}")
            distance = distance.detach().clone()
        self._distance, self._calls = distance, calls

    def _matrix(self, weight: Tensor) -> Tensor:
        """|W| in float64, of the shape seen before."""
        matrix = _read(weight)
        if self._distance is not None:
            _check.shape("weight", weight, *self._distance.shape)
        return matrix

    def _fits(self, weight: Tensor) -> None:
        _check.shape("weight", _check.tensor("weight", weight), *self.distance.shape)

    def __repr__(self) -> str:
        return (
            f"TaskFeatureLaplacian({self.groups}, strength={self.strength}, ridge={self.ridge}, "
            f"smoothing={self.smoothing}, update_every={self.update_every})"
        )


def _read(weight: object) -> Tensor:
    """``weight`` [T, d] as |W| in float64."""
    given = _check.tensor("weight", weight).detach()
    if given.dim() != 2 or given.numel() == 0:
        raise ValueError(f"weight must have shape [T, d], got {list(given.shape)}")
    if not bool(given.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinity")
    return given.double().abs()


def _laplacian(links: Tensor) -> Tensor:
    """diag(A 1) - A for A = [[0, links], [links^T, 0]]: tasks first, then features."""
    tasks, features = links.shape
    laplacian = links.new_zeros(tasks + features, tasks + features)
    laplacian[:tasks, tasks:] = -links
    laplacian[tasks:, :tasks] = -links.T
    laplacian.diagonal().copy_(torch.cat([links.sum(1), links.sum(0)]))
    return laplacian


def _onto_capped_simplex(y: Tensor, total: int) -> Tensor:
    """The point of {0 <= c <= 1, sum c = total} nearest to y [n]: clip(y - t, 0, 1), t by bisection."""
    y = y - y.max()  # the largest decide, and keep their digits
    low, high = y.min() - 1.0, y.max()
    for _ in range(128):  # down to the last digit of t, also of one near 0
        middle = (low + high) / 2
        enough = (y - middle).clamp(0.0, 1.0).sum() >= total
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (y - low).clamp(0.0, 1.0)
