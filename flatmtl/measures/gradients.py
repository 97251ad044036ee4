"""How the tasks' gradients stand to each other, from their Gram matrix; nothing is read on the host.

All take ``gram``, float32 or float64, [T, T] or [B, T, T], as ``flatmtl.ops.gram`` makes it from rows, and
answer in float64 on its device. A gradient that is zero or not finite has no direction and no ratio: NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.ops import _check


def _read(gram: object) -> tuple[Tensor, Tensor]:
    """The Gram matrix in float64 and the norms [..., T], NaN for a task without a gradient."""
    matrix = _check.double(_check.gram("gram", gram))
    square = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix, torch.where(square.isfinite() & (square > 0), square, torch.nan).sqrt()


def gradient_cosines(gram: Tensor) -> Tensor:
    """The cosines of the angles between the tasks' gradients.

    Args:
        gram: [T, T] or [B, T, T].

    Returns:
        Of gram's shape, within [-1, 1], 1 on the diagonal; NaN beside a gradient that is zero or not
        finite.

    Raises:
        TypeError, ValueError: ``gram`` is none.
    """
    matrix, norms = _read(gram)
    # one after the other: the product of two norms may leave the range of float64
    cosines = (matrix / norms.unsqueeze(-1) / norms.unsqueeze(-2)).clamp_(-1.0, 1.0)
    cosines.diagonal(dim1=-2, dim2=-1).copy_(norms / norms)
    return cosines


def norm_ratios(gram: Tensor) -> Tensor:
    """The ratios of the gradients' lengths, ||g_i|| / ||g_j|| in row i and column j.

    Args:
        gram: [T, T] or [B, T, T].

    Returns:
        Of gram's shape, 1 on the diagonal; NaN beside a gradient that is zero or not finite.

    Raises:
        TypeError, ValueError: ``gram`` is none.
    """
    _, norms = _read(gram)
    return norms.unsqueeze(-1) / norms.unsqueeze(-2)


def conflict_share(gram: Tensor) -> Tensor:
    """The share of negative cosines among the pairs of tasks that have one.

    Args:
        gram: [T, T] or [B, T, T].

    Returns:
        0-dim or [B]; NaN without a pair.

    Raises:
        TypeError, ValueError: ``gram`` is none.
    """
    pairs = _pairs(gram)
    return (pairs < 0).sum(-1) / pairs.isnan().logical_not_().sum(-1).double()


def mean_cosine(gram: Tensor) -> Tensor:
    """The mean of the cosines over the pairs of tasks that have one.

    Args:
        gram: [T, T] or [B, T, T].

    Returns:
        0-dim or [B]; NaN without a pair.

    Raises:
        TypeError, ValueError: ``gram`` is none.
    """
    return _pairs(gram).nanmean(-1)


def _pairs(gram: Tensor) -> Tensor:
    """The cosines above the diagonal, [..., T (T - 1)/2]."""
    cosines = gradient_cosines(gram)
    tasks = cosines.shape[-1]
    rows, columns = torch.triu_indices(tasks, tasks, 1, device=cosines.device)
    return cosines[..., rows, columns]
