"""GradVac."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Stateful
from flatmtl.weighting._stream import Ordered


class GradVac(Ordered, Stateful):
    """Gradient vaccine (Wang et al., arXiv 2010.05874, Alg. 1), on coefficients.

    As PCGrad, but each task's gradient is turned until its cosine with another's reaches that pair's
    target, which follows the cosines seen so far. The first call is PCGrad's: all targets are 0.

    Args:
        beta: how fast the targets follow. 0.01 is remembered as the paper's, not re-checked; TorchJD and
            LibMTL use 0.5.
        eps: added to a divisor. It is relative to the gradients, so that their scale does not matter
            (other libraries add an absolute 1e-8).
        seed: of the random orders, drawn on the device (Philox); one draw a call.
        order: int64 [T, T], fixed orders in place of random ones, as for ``PCGrad``.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Wang et al., Gradient vaccine"
    arxiv = "2010.05874"
    year = 2021
    state = "target cosines [T, T], random stream"

    _entry = "target"
    _rank = 2

    def __init__(
        self,
        *,
        beta: float = 0.01,
        eps: float = 1e-8,
        seed: int = 0,
        order: Tensor | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(order=order, seed=seed, scaling=scaling, max_norm=max_norm)
        self.beta = _options.real("beta", beta, at_least=0, at_most=1)
        self.eps = _options.real("eps", eps, at_least=0)

    def _start(self, gram: Tensor) -> Tensor:
        return torch.zeros(gram.shape, dtype=torch.float64, device=gram.device)

    def _size(self, gram: Tensor) -> tuple[int, ...]:
        return gram.shape

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        target = self._state_for(_check.gram("gram", gram))
        if self.order is None:
            rng = self._rng_on(gram.device)
            weights, bits = ops.solve_gradvac_drawn_(gram, rng, target, self.beta, self.eps)
        else:
            order = self._order_for(gram)
            weights, bits = ops.solve_gradvac(gram, order, target, self.beta, self.eps)
        return weights, SolveStatus(bits)
