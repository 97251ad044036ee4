"""Trimmed mean."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting import _options, _row_passes
from flatmtl.weighting._rows import RowMethod


class TrimmedMean(RowMethod):
    """Of every element the mean without the largest and the smallest values (Yin et al., ICML 2018).

    Made for gradients of which some cannot be trusted. Read: TorchJD's code (C2). Sorted a block of
    columns at a time, so that little is held beside the rows.

    Args:
        trim: how many of the largest and how many of the smallest values of every element are left
            out; at least 0. Of a batch with so few tasks that none would be left, only so many that
            one or two are.

    Raises:
        ValueError, TypeError: ``trim`` is not a whole number from 0 on.
    """

    paper = "Yin et al., Byzantine-robust distributed learning"
    arxiv = "1803.01498"
    year = 2018

    def __init__(self, *, trim: int) -> None:
        super().__init__()
        self.trim = _options.whole("trim", trim, at_least=0)

    def aggregate(
        self,
        jac: Tensor,
        out: Tensor,
        *,
        losses: Tensor | None = None,
        sound: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Writes the update into ``out``; see ``RowMethod.aggregate``.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit, or ``jac`` has 2 ``trim`` rows
                or fewer.
        """
        counted, _ = _row_passes.checked(jac, out, sound, scale)
        tasks = jac.shape[0]
        if 2 * self.trim >= tasks:
            raise ValueError(f"trim must be less than half of the {tasks} tasks, got {self.trim}")
        there = counted.sum()
        trim = ((there - 1) // 2).clamp(0, self.trim)
        place = torch.arange(tasks, device=jac.device)
        kept = ((place >= trim) & (place < there - trim)).unsqueeze(1)
        wide = _row_passes.accumulate_in(jac)
        divisor = (there - 2 * trim).clamp(min=1).to(wide)
        for block in _row_passes.columns(jac):
            rows = jac[:, block]
            if sound is not None:  # what does not count goes to the end
                rows = rows.masked_fill(~counted.unsqueeze(1), torch.inf)
            ordered = rows.sort(0).values.to(wide)
            out[block] = ordered.masked_fill_(~kept, 0.0).sum(0).div_(divisor)
        self._last = _row_passes.status(counted)
