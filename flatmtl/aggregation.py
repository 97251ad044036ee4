"""From a matrix of task gradients to one update."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import Weighting
from flatmtl.weighting._loss import LossWeighting, WithLosses
from flatmtl.weighting._rows import RowMethod


def weights_of(jac: Tensor, weighting: Weighting, losses: Tensor | None) -> Tensor:
    """jac [T, P], losses [T] -> the weighting's float64 [T]."""
    if isinstance(weighting, LossWeighting):
        return weighting(_given(losses, weighting, jac))
    norms_do = weighting.diagonal_only
    gram = ops.row_norms(jac).square().diag() if norms_do else ops.gram(jac)
    if isinstance(weighting, WithLosses):
        return weighting(gram, _given(losses, weighting, jac))
    return weighting(gram)


def aggregate(
    jac: Tensor,
    weighting: Weighting,
    out: Tensor | None = None,
    *,
    losses: Tensor | None = None,
) -> Tensor:
    """Aggregates task gradients: d = sum_i w_i g_i, w = weighting(J J^T). Two passes over ``jac``.

    What the weighting keeps from step to step moves at every call.

    Args:
        jac: [T, P], a row a task; float32, float64, bfloat16 or float16.
        weighting: for example ``flatmtl.weighting.PCGrad()``.
        out: [P], of jac's dtype and device; allocated if None (writing into the same buffer at every
            step is faster: fresh memory costs more than the arithmetic).
        losses: floating-point [T], the task losses, for the methods that look at them.

    Returns:
        ``out``.

    Raises:
        TypeError: ``weighting`` is none.
        ValueError, TypeError: ``jac``, ``out`` or ``losses`` does not fit, or is needed and not given.
    """
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a flatmtl Weighting, got {type(weighting).__name__}")
    if not isinstance(weighting, RowMethod):
        return ops.combine(jac, weights_of(jac, weighting, losses), out)
    jac = _check.rows("jac", jac)
    out = ops._out_row(out, jac)
    seen = None
    if "losses" in weighting.needs:
        seen = _given(losses, weighting, jac).detach().to(torch.float64)
        _check.shape("losses", seen, jac.shape[0])
    weighting.aggregate(jac, out, losses=seen)
    weighting._made(None)
    return out


def _given(losses: Tensor | None, weighting: Weighting, jac: Tensor) -> Tensor:
    if losses is None:
        raise ValueError(f"losses must be given with {type(weighting).__name__}, got None")
    _check.like("losses", _check.tensor("losses", losses), "jac", jac, dtype=False)
    return losses
