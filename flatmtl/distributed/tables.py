"""Many losses of each task as one small message: a table, averaged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatmtl.distributed.ranks import Ranks


def average_table(
    ranks: Ranks, table: Tensor, counts: Sequence[float], *, failed: bool = False
) -> Tensor:
    """One message of 8 (T n + T + 1) bytes.

    Args:
        ranks: the ranks.
        table: float64 [T, n], this rank's losses.
        counts: what each task's row counts for; 0: the task is missing here, whatever its row holds.
        failed: this rank cannot go on.

    Returns:
        float64 [T, n], the means over the ranks that have the task; NaN where none has.

    Raises:
        RankFailedError: a rank has failed (where the device can be read without a wait).
    """
    tasks, columns = table.shape
    nothing = table.new_zeros(columns)
    parts = [nothing if not n else row * n for row, n in zip(table, counts, strict=True)]
    # full: a kernel's argument, where a tensor made of a list would be copied to the device
    parts += [table.new_full((1,), n) for n in (*counts, float(failed))]
    message = ranks.total(torch.cat(parts))
    if message.device.type == "cpu" and not failed and message[-1] > 0:
        raise ranks.told()
    sums, total, _ = message.split([tasks * columns, tasks, 1])
    found: Tensor = sums.view(tasks, columns) / torch.where(total > 0, total, torch.nan).unsqueeze(
        1
    )
    return found
