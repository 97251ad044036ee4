"""Means and spreads of matrices over the measured steps, kept where they are computed."""

from __future__ import annotations

import torch
from torch import Tensor


class Tally:
    """Count, mean and sum of squared deviations of every entry (Welford), on the device.

    An entry that is NaN or infinite in one sample is left out of that sample. Nothing is read on the host.

    Args:
        shape: of a sample.
        device: where samples are.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        # count, mean, sum of squared deviations: one buffer, so that reading is one copy
        self._kept = torch.zeros(3, *shape, dtype=torch.float64, device=device)

    def add(self, sample: Tensor) -> None:
        """Takes in one sample (float64, of the tally's shape)."""
        count, mean, m2 = self._kept.unbind()
        known = sample.isfinite()
        count.add_(known)
        off = torch.where(known, sample - mean, 0.0)
        step = off / count.clamp_min(1.0)
        mean.add_(step)
        m2.addcmul_(off, off - step)

    def read(self) -> Tensor:
        """float64 [3, *shape] on the host: counts, means (0 without any), squared deviations."""
        return self._kept.cpu().clone()

    def load(self, kept: Tensor) -> None:
        """Takes up what ``read`` gave."""
        self._kept.copy_(kept)
