"""A step's rows on their way between the ranks: sent task by task, averaged when all have come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.tables import average_table
from flatmtl.messages import Messages
from flatmtl.sharded import ShardedRows

Stages = Sequence[Sequence[tuple[str, int]]]
WHOLE = "whole"  # in place of a family: a row's parts are put together
LOSSES = "losses"  # in place of a family: a table of losses
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
        messages: the buffers, of whole rows or of parts.
        stages: what is going to be sent, the name of a family of rows and a task each, or ``LOSSES`` and
            the columns of a table; between two stages, ranks that can read the device without a wait look
            for marks.
    """

    def __init__(self, ranks: Ranks, messages: Messages | ShardedRows, stages: Stages) -> None:
        self._ranks, self._messages = ranks, messages
        self._stages = [list(stage) for stage in stages]
        self._works: dict[str, list[dist.Work]] = {}

    def send(self, name: str, task: int, counts: float, *, failed: bool = False) -> None:
        """One message; its row counts so many times (0: there is none, and zeros are sent)."""
        self._check_due(name, task)
        self._works.setdefault(name, []).append(self._launch(name, task, counts, failed))

    def _check_due(self, name: str, task: int) -> None:
        due = self._stages[0].pop(0)
        if due != (name, task):
            raise RuntimeError(
                f"messages must go in one order on all ranks: {due} is due, not {name}"
            )

    def _launch(self, name: str, task: int, counts: float, failed: bool) -> dist.Work:
        messages = self._messages
        message, tail = messages.message(name, task), messages.tails(name)[task]
        self._fill(message, tail.unsqueeze(0), counts, failed)
        return self._ranks.add_up(message)

    def _fill(self, message: Tensor, tails: Tensor, counts: float, failed: bool) -> None:
        """The row in ``message`` as many times as it counts; ``tails`` [k, tail] in it say so."""
        if counts:
            if counts != 1:
                message.mul_(counts)
            tails.zero_()
            # a place for few ranks each: in half precision a sum of many would be rounded
            tails[:, self._ranks.rank % (tails.shape[1] - 1)].fill_(counts)
        else:
            message.zero_()
        if failed:
            tails[:, FAILED].fill_(1)

    @property
    def done(self) -> bool:
        """Whether all has been sent."""
        return not any(self._stages)

    def average(self, table: Tensor, counts: Sequence[float], *, failed: bool = False) -> Tensor:
        """A table [T, n] of losses, averaged (``average_table``)."""
        self._check_due(LOSSES, table.shape[1])
        if not self._stages[0]:
            self._stages.pop(0)
        return average_table(self._ranks, table, counts, failed=failed)

    def abandon(self) -> None:
        """This rank has failed, and has told so: it sends, marked, what the others wait for."""
        reading = self._messages.device.type == "cpu"
        for stage in [s for s in self._stages if s][: 1 if reading else None]:
            self._stages = [stage]
            for name, task in list(stage):
                self._send_marked(name, task)
        self.wait()

    def wait(self) -> None:
        """Until all that was sent has arrived, for a rank that makes nothing of it."""
        for works in self._works.values():
            self._ranks.wait(works)

    def _send_marked(self, name: str, task: int) -> None:
        if name == LOSSES:
            tasks, device = self._messages.tasks, self._messages.device
            none = torch.zeros(tasks, task, dtype=torch.float64, device=device)
            self.average(none, [0.0] * tasks, failed=True)
        else:
            self.send(name, task, 0, failed=True)

    def arrive(self, name: str) -> Arrived:
        """Waits for a family of rows, and makes means of the sums."""
        self._ranks.wait(self._works.pop(name, []))
        if self._stages and not self._stages[0]:
            self._stages.pop(0)
        tails = self._messages.tails(name).double()  # [T, tail]
        counts, failed = tails[:, :FAILED].sum(1), tails[:, FAILED].sum()
        by = torch.where(counts > 0, counts, 1.0)
        # where no host looks at the mark in time, a step that is not finite is not made
        by = torch.where(failed > 0, torch.nan, by)
        for task, divisor in enumerate(by.unbind()):
            self._messages.message(name, task).div_(divisor)
        return Arrived(counts, failed)


class ShardedExchange(Exchange):
    """The same with rows of which every rank gets its part; a row is packed just before it goes."""

    def __init__(self, ranks: Ranks, sharded: ShardedRows, stages: Stages) -> None:
        super().__init__(ranks, sharded, stages)
        self._sharded = sharded
        self._sent = 0
        self._flying: list[tuple[str, dist.Work]] = []  # the last messages, the older one first

    def space(self, task: int) -> Tensor:
        """Where the next message, a task's, is packed; it waits for the last one that used the place."""
        if len(self._flying) == 2:
            name, work = self._flying.pop(0)
            if work in self._works.get(name, ()):
                self._works[name].remove(work)  # gloo writes its result at every wait, and again
                self._ranks.wait([work])
        return self._sharded.outgoing(task, self._sent)

    def _launch(self, name: str, task: int, counts: float, failed: bool) -> dist.Work:
        message = self.space(task)
        self._fill(message, self._sharded.tails_of(message, task), counts, failed)
        work = self._ranks.scatter(self._sharded.message(name, task), message)
        self._flying.append((name, work))
        self._sent += 1
        return work

    def _send_marked(self, name: str, task: int) -> None:
        if name == WHOLE:
            self.whole(task)
        else:
            super()._send_marked(name, task)

    def whole(self, task: int) -> tuple[Tensor | None, Tensor | None]:
        """A task's row at the parameters, shared [P] and own, of all ranks' parts."""
        self._check_due(WHOLE, task)
        gathered = self._ranks.join(self._sharded.message("jac", task))
        return self._sharded.whole(gathered, task)
