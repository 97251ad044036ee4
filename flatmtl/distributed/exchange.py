"""A step's rows on their way between the ranks: sent task by task, averaged when all have come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flatmtl.distributed.messages import Messages
from flatmtl.distributed.ranks import Ranks

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
        stages: what is going to be sent, the name of a family of rows and a task each; between two
            stages, ranks that can read the device without a wait look for marks.
    """

    def __init__(
        self, ranks: Ranks, messages: Messages, stages: Sequence[Sequence[tuple[str, int]]]
    ) -> None:
        self._ranks, self._messages = ranks, messages
        self._stages = [list(stage) for stage in stages]
        self._works: dict[str, list[dist.Work]] = {}

    def send(self, name: str, task: int, counts: float, *, failed: bool = False) -> None:
        """One message; its row counts so many times (0: there is none, and zeros are sent)."""
        due = self._stages[0].pop(0)
        if due != (name, task):
            raise RuntimeError(
                f"messages must go in one order on all ranks: {due} is due, not {name}"
            )
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

    def abandon(self, failure: Exception) -> None:
        """This rank has failed: it sends, marked, what the others wait for."""
        self._ranks.tell(failure)
        reading = self._messages.device.type == "cpu"
        for stage in [s for s in self._stages if s][: 1 if reading else None]:
            self._stages = [stage]
            for name, task in list(stage):
                self.send(name, task, 0, failed=True)
        self.wait()

    def wait(self) -> None:
        """Until all that was sent has arrived, for a rank that makes nothing of it."""
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
