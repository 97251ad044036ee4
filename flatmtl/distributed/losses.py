"""The losses of all ranks as one: the mean over the samples that they are means of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl.distributed.ranks import Ranks


@dataclass
class Averaged:
    """Losses over all ranks.

    Attributes:
        values: float64 [T], NaN where no rank has the task.
        shares: float64 [T], the part that this rank's loss has in its mean.
        counts: float64 [T], what all ranks' losses count for together.
        extra: float64 1-D, the sum over the ranks of what else they sent, where they did.
    """

    values: Tensor
    shares: Tensor
    counts: Tensor
    extra: Tensor | None = None

    def entries(self) -> list[Tensor | None]:
        """The losses one by one, None where no rank has the task (known on the CPU only)."""
        values = list(self.values.unbind())
        if self.counts.device.type != "cpu":
            return list(values)
        return [v if n > 0 else None for v, n in zip(values, self.counts.tolist(), strict=True)]


def average(
    ranks: Ranks,
    losses: Sequence[Tensor | None],
    counts: Sequence[float],
    device: torch.device,
    *,
    extra: Sequence[Tensor] = (),
    failed: bool = False,
    made: bool = False,
) -> Averaged:
    """One small message.

    Args:
        ranks: the ranks.
        losses: 0-dim each, None for a task that is missing here.
        counts: what each counts for; of a missing one nothing.
        device: where the result is wanted.
        extra: numbers that are added up with them, float64 1-D each.
        failed: this rank cannot go on.
        made: the step is over.

    Raises:
        RankFailedError: a rank has failed (where the device can be read without a wait).
    """
    tasks = len(losses)
    here = [0.0 if one is None else n for one, n in zip(losses, counts, strict=True)]
    entries = [
        torch.zeros((), dtype=torch.float64, device=device)
        if one is None or n == 0  # the mean of no samples is NaN
        else one.detach().to(device, torch.float64) * n
        for one, n in zip(losses, here, strict=True)
    ]
    # full: a kernel's argument, where a tensor made of a list would be copied to the device
    numbers = [*here, float(failed)]
    entries += [torch.full((), n, dtype=torch.float64, device=device) for n in numbers]
    message = torch.cat([torch.stack(entries), *extra])
    mine = message[tasks : 2 * tasks].clone()
    ranks.total(message)
    if device.type == "cpu" and not failed and message[2 * tasks] > 0:
        raise ranks.told(made=made)
    total = message[tasks : 2 * tasks]
    values = torch.where(total > 0, message[:tasks] / total, torch.nan)
    shares = torch.where(total > 0, mine / total, 0.0)
    return Averaged(values, shares, total, message[2 * tasks + 1 :])
