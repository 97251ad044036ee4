"""PCD."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful


class PCD(Stateful):
    """Priority-constrained descent (TMLR 2026, arXiv 2606.29521): task 0 is the primary one.

    The nearest direction to the primary gradient on which every other task makes at least a share of its
    own normalised progress, with the primary gradient's length. Gradients are normalised by running
    averages of their norms. Where the shares contradict each other it is the primary gradient, and the
    status says so (``SolveStatus.fallback``).

    Args:
        tau: the guaranteed share, between 0 and 1; 0.02 is the paper's.
        beta: decay of the averages, at least 0 and below 1; 0.999 is the paper's.
        eps: added to the averages; 1e-8 is the paper's.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    paper = "Priority-constrained descent (TMLR)"
    arxiv = "2606.29521"
    year = 2026
    state = "averages of the squared norms [T], step count"

    _entry = "averages"

    def __init__(
        self,
        *,
        tau: float = 0.02,
        beta: float = 0.999,
        eps: float = 1e-8,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.tau = _options.real("tau", tau, at_least=0, at_most=1)
        self.beta = _options.real("beta", beta, at_least=0, below=1)
        self.eps = _options.real("eps", eps, at_least=0)

    def _size(self, gram: Tensor) -> tuple[int, ...]:
        return (*gram.shape[:-2], gram.shape[-1] + 1)

    def _start(self, gram: Tensor) -> Tensor:
        return torch.zeros(self._size(gram), dtype=torch.float64, device=gram.device)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        state = self._state_for(_check.gram("gram", gram))
        weights, bits, residual = ops.solve_pcd_(gram, state, self.tau, self.beta, self.eps)
        return weights, SolveStatus(bits, residual)
