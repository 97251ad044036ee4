"""What SDMGrad and MoDo share: weights from the gradients of two batches."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting._base import Stateful


class TwoBatches(Stateful):
    """Keeps a point of the simplex. Takes A = J1 J2'; one batch's Gram matrix will do, with a bias."""

    needs = "cross-gram of two batches"
    state = "weights on the simplex [T]"

    _entry = "weights"

    def _start(self, gram: Tensor) -> Tensor:
        shape = self._size(gram)
        return torch.full(shape, 1 / shape[-1], dtype=torch.float64, device=gram.device)

    def _masked(self, gram: Tensor, weights: Tensor) -> Tensor:
        # As the solvers look at it (csrc/solvers/two_batch.h): <g1_i, g2_i> may be negative.
        own = gram.diagonal(dim1=-2, dim2=-1).isfinite()
        sound = gram.isfinite()
        apart = ~own.unsqueeze(-2)  # the products with a spoiled task count against that one alone
        finite = own & ((sound & sound.mT) | apart).all(-1)
        some = sound & (gram != 0)
        return torch.where(finite & some.any(-1) & some.any(-2), weights, 0.0)
