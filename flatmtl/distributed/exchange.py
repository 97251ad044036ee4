"""A step's rows on their way between the ranks: sent task by task, averaged when all have come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flatmtl.distributed.messages import Messages
from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.tables import average_table

LOSSES = "losses"  # a table of losses in a step's messages, in place of a family's name
FAILED = -1  # the last of a tail's elements; those before hold what each rank's row counts for


@dataclass
class Arrived:
    """What came with a family of rows.

    Attributes:
        counts: float64 [T], what each task's row counts for on all ranks together; 0: none has it.
        failed: 0-dim, above 0 where some rank has failed.
    """

    counts: Tensor
    failed: Tensor


class Exchange:
    """The messages of one step, in an order that is the same on every rank.

    A rank that cannot go on sends its messages all the same, marked: the others do not wait for it in
    vain, and know.

    Args:
        ranks: the ranks.
        messages: the buffers.
        stages: what is going to be sent, the name of a family of rows and a task each, or ``LOSSES`` and
            the columns of a table; between two stages, ranks that can read the device without a wait look
            for marks.
    """

    def __init__(
        self, ranks: Ranks, messages: Messages, stages: Sequence[Sequence[tuple[str, int]]]
    ) -> None:
        self._ranks, self._messages = ranks, messages
        self._stages = [list(stage) for stage in stages]
        self._works: dict[str, list[dist.Work]] = {}

    def send(self, name: str, task: int, counts: float, *, failed: bool = False) -> None:
        """One message; its row counts so many times (0: there is none, and zeros are sent)."""
        self._take(name, task)
        messages, ranks = self._messages, self._ranks
        message, tail = messages.message(name, task), messages.tails(name)[task]
        if counts:
            if counts != 1:
                message.mul_(counts)
            tail.zero_()
            # a place for few ranks each: in half precision a sum of many would be rounded
            tail[ranks.rank % (messages.tail - 1)].fill_(counts)
        else:
            message.zero_()
        if failed:
            tail[FAILED].fill_(1)
        self._works.setdefault(name, []).append(ranks.add_up(message))

    def _take(self, name: str, number: int) -> None:
        due = self._stages[0].pop(0)
        if due != (name, number):
            raise RuntimeError(
                f"messages must go in one order on all ranks: {due} is due, not {name}"
            )

    @property
    def done(self) -> bool:
        """Whether all has been sent."""
        return not any(self._stages)

    def average(self, table: Tensor, counts: Sequence[float], *, failed: bool = False) -> Tensor:
        """A table [T, n] of losses, averaged (``average_table``)."""
        self._take(LOSSES, table.shape[1])
        if not self._stages[0]:
            self._stages.pop(0)
        return average_table(self._ranks, table, counts, failed=failed)

    def abandon(self) -> None:
        """This rank has failed, and has told so: it sends, marked, what the others wait for."""
        device, tasks = self._messages.device, self._messages.tasks
        reading = device.type == "cpu"
        for stage in [s for s in self._stages if s][: 1 if reading else None]:
            self._stages = [stage]
            for name, task in list(stage):
                if name == LOSSES:
                    none = torch.zeros(tasks, task, dtype=torch.float64, device=device)
                    self.average(none, [0.0] * tasks, failed=True)
                else:
                    self.send(name, task, 0, failed=True)
        for works in self._works.values():
            self._ranks.wait(works)

    def arrive(self, name: str) -> Arrived:
        """Waits for a family of rows, and makes means of the sums."""
        self._ranks.wait(self._works.pop(name))
        if self._stages and not self._stages[0]:
            self._stages.pop(0)
        tails = self._messages.tails(name).double()  # [T, tail]
        counts = tails[:, :FAILED].sum(1)
        by = torch.where(counts > 0, counts, 1.0)
        for task, divisor in enumerate(by.unbind()):
            self._messages.message(name, task).div_(divisor)
        return Arrived(counts, tails[:, FAILED].sum())
