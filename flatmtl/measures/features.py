"""Which features which task uses, from the gradients of the losses at a shared representation."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.losses import Losses, read_losses
from flatmtl.ops import _check


def feature_saliency(losses: Losses, features: Tensor, *, feature_dim: int = 1) -> Tensor:
    """How strongly each loss answers to each feature: the mean of |dL_i/dz_j| over batch and space.

    One backward pass a task from its loss to ``features``, none through what stands before. The graph
    is kept, so that the training step can follow.

    Args:
        losses: the task losses, with their graphs, as a closure for ``MultiTaskOptimizer`` returns them.
        features: z, the output of the shared part that the losses were computed from: [batch, F],
            [batch, F, height, width], ... Under autograd it is that very tensor, not a copy.
        feature_dim: the dimension of ``features`` whose entries are the features j.

    Returns:
        float64 [T, F], detached, on the features' device. Zero for a task that does not look at them, NaN
        for one that has no loss in this batch (None).

    Raises:
        TypeError, ValueError: an argument is not as above, or no loss depends on ``features``.
    """
    tasks = read_losses(losses)
    _check.tensor("features", features)
    if not features.requires_grad:
        raise ValueError("features must have a graph (requires_grad), got a tensor without one")
    if isinstance(feature_dim, bool) or not isinstance(feature_dim, int):
        raise TypeError(f"feature_dim must be an int, got {type(feature_dim).__name__}")
    if not -features.dim() <= feature_dim < features.dim():
        raise ValueError(
            f"feature_dim must be a dimension of features {list(features.shape)}, got {feature_dim}"
        )
    width = features.shape[feature_dim]
    saliency = torch.full(
        (len(tasks.names), width), torch.nan, dtype=torch.float64, device=features.device
    )
    reached = False
    for task in tasks.present:
        (gradient,) = tasks.gradients(task, [features], retain_graph=True, scale=None)
        if gradient is None:
            saliency[task] = 0.0
            continue
        reached = True
        saliency[task] = gradient.movedim(feature_dim, 0).reshape(width, -1).abs().double().mean(1)
    if not reached:
        raise ValueError("features must be what the losses were computed from, got none that is")
    return saliency


def feature_overlap(saliency: Tensor) -> Tensor:
    """How far the tasks use different features: 0 all features equally, 1 disjoint ones.

    A reconstruction, made from the abstract of arXiv 2402.03557 (a feature disentanglement measure from
    saliencies), whose text was not read: not that paper's formula, and not comparable to its numbers.
    With s_i scaled to sum to 1 for every task, p_ij = s_ij / sum_k s_kj the task's share in feature j and
    m_j = sum_i s_ij / T that feature's weight, it is sum_j m_j (1 - H(p_.j) / log T), H the entropy.

    A loss times a positive number changes nothing. A feature that no task uses has weight 0.

    Args:
        saliency: [T, F], float32 or float64, of ``feature_saliency``; absolute values are taken. A task
            whose row is zero or not finite is left out, and does not count in T.

    Returns:
        float64, 0-dim, on saliency's device, within [0, 1]. 1 for one task, NaN for none.

    Raises:
        TypeError, ValueError: ``saliency`` is no such matrix.
    """
    s = _check.tensor("saliency", saliency, _check.SMALL_TYPES).detach().double().abs()
    if s.dim() != 2 or s.numel() == 0:
        raise ValueError(f"saliency must have shape [T, F], got {list(saliency.shape)}")
    largest = s.amax(1, keepdim=True)  # NaN where one is
    active = largest.isfinite() & (largest > 0)
    s = torch.where(active, s / largest, 0.0)  # the sum of a row stays within float64
    s = s / torch.where(active, s.sum(1, keepdim=True), 1.0)
    tasks = active.sum().double()
    used = s.sum(0)
    shares = s / torch.where(used > 0, used, 1.0)
    entropy = torch.special.entr(shares).sum(0)
    # log 1 = 0: with one task every feature is its own
    spread = torch.where(tasks > 1, entropy / tasks.log(), 0.0)
    return (used / tasks * (1.0 - spread)).sum().clamp(0.0, 1.0)
