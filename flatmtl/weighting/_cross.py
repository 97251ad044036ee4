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
        # <g1_i, g2_i> may be negative
        return torch.where(gram.diagonal(dim1=-2, dim2=-1).isfinite(), weights, 0.0)
