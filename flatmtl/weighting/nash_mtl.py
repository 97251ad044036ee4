"""Nash-MTL."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful


class NashMTL(Stateful):
    """Multi-task learning as a bargaining game (Navon et al., arXiv 2202.01017): G w = 1/w, exact.

    The update's norm is sqrt(T) whatever the gradients are, so that with ``max_norm=1`` it is always a
    unit vector. A solve that fails gives the last weights (``SolveStatus.fallback``).

    Args:
        max_norm: a bound on the update's norm; 1 is the official code's. None: no bound.
        update_every: the weights are solved for at every so many calls and kept in between.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: ``update_every`` is below 1.
    """

    paper = "Navon et al., Multi-task learning as a bargaining game"
    arxiv = "2202.01017"
    year = 2022
    state = "last weights [T], call count"

    _entry = "last"

    def __init__(
        self,
        *,
        max_norm: float | None = 1.0,
        update_every: int = 1,
        scaling: Scaling = "raw",
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.update_every = _options.whole("update_every", update_every, at_least=1)

    def _size(self, gram: Tensor) -> tuple[int, ...]:
        return (*gram.shape[:-2], gram.shape[-1] + 1)

    def _start(self, gram: Tensor) -> Tensor:
        return torch.zeros(self._size(gram), dtype=torch.float64, device=gram.device)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        last = self._state_for(_check.gram("gram", gram))
        max_norm = self.max_norm if self.scaling == "raw" else None
        weights, bits, residual = ops.solve_nash_(gram, last, self.update_every, max_norm or 0.0)
        return weights, SolveStatus(bits, residual)

    def _scaled(self, gram: Tensor, weights: Tensor) -> Tensor:
        # without a sum to scale to, the solve has seen to max_norm
        return weights if self.scaling == "raw" else super()._scaled(gram, weights)
