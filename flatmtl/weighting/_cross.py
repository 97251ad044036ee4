"""What SDMGrad and MoDo share: weights from the gradients of two batches."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers.cross import find_active_cross
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
        return torch.where(find_active_cross(gram), weights, 0.0)
