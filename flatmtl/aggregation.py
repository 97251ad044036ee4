"""From a matrix of task gradients to one update."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import Weighting


def weights_of(jac: Tensor, weighting: Weighting) -> Tensor:
    """jac [T, P] -> the weighting's float64 [T]."""
    if weighting.diagonal_only:
        return weighting(ops.row_norms(jac).square().diag())
    return weighting(ops.gram(jac))


def aggregate(jac: Tensor, weighting: Weighting, out: Tensor | None = None) -> Tensor:
    """Aggregates task gradients: d = sum_i w_i g_i, w = weighting(J J^T). Two passes over ``jac``.

    Args:
        jac: [T, P], a row a task; float32, float64, bfloat16 or float16.
        weighting: for example ``flatmtl.weighting.PCGrad()``.
        out: [P], of jac's dtype and device; allocated if None (writing into the same buffer at every
            step is faster: fresh memory costs more than the arithmetic).

    Returns:
        ``out``.

    Raises:
        TypeError: ``weighting`` is none.
        ValueError, TypeError: ``jac`` or ``out`` does not fit.
    """
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a flatmtl Weighting, got {type(weighting).__name__}")
    return ops.combine(jac, weights_of(jac, weighting), out)
