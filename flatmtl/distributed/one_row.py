"""A step with one row for all tasks: what the ranks tell each other before and after its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.distributed.agree import gather_failure, present_in
from flatmtl.distributed.counts import Samples, counts_of
from flatmtl.distributed.losses import Averaged, average
from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.row_step import RowStep
from flatmtl.losses import TaskLosses, added_entries
from flatmtl.roles import Roles
from flatmtl.weighted import WeightedBackward


class OneRowStep:
    """A step whose backward pass is of a weighted loss.

    Before it, a small message of losses and counts tells every rank the part that its own losses have in
    the means; after it, one message carries the row.

    Args:
        ranks: the ranks.
        roles: as they are known before the step; None at the first one.
        samples: how many samples this rank's losses are means of; None: each rank counts alike.
        batches: how many micro-batches the step has.
        rows: how many rows of the shared parameters each message holds; two messages with a pass at
            perturbed parameters.
        measuring: takes every task's row for probes, between the last of the losses and the row; None:
            nothing is measured.
        extra: T -> how many numbers are added up with the losses.

    Attributes:
        failed: 0-dim, above 0 where a rank has failed; None: no row has come yet.
        measuring: as given.
        counts: what each task's loss counts for on this rank.
        averaged: the losses over all ranks, added up over the micro-batches so far.
        told: messages carry the news that this rank has failed.
        shares: of each micro-batch, float64 [T]: the part that this rank's losses have in the means.
    """

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        batches: int,
        rows: Sequence[int],
        measuring: RowStep | None = None,
        extra: Callable[[int], int] = lambda tasks: 0,
    ) -> None:
        self._ranks, self._roles, self._samples = ranks, roles, samples
        self._extra = extra
        self._batches = self._left = batches
        self._rows = list(rows)
        self._counts: list[Tensor] = []
        self.measuring = measuring
        self._told = False  # the ranks know each other's tasks of this micro-batch
        self.shares: list[Tensor] = []
        self.failed: Tensor | None = None
        self.counts: list[float] = []
        self.averaged: list[Tensor | None] = []
        self.told = False
        self._over = False

    @property
    def asks(self) -> Ranks | None:
        """The ranks, where they must tell each other what their tasks reach."""
        return None if self._known else self._ranks

    @property
    def _known(self) -> bool:
        return self._ranks.agreed and self._roles is not None and self._roles.complete

    @property
    def idle(self) -> frozenset[int]:
        """Tasks that have no sample on this rank: their losses there are means of nothing."""
        return frozenset(task for task, count in enumerate(self.counts) if count == 0)

    def agreed(self, roles: Roles) -> None:
        """The ranks have told each other what their tasks reach, in this micro-batch."""
        self._roles, self._told = roles, True

    def counts_here(self, losses: TaskLosses) -> list[float]:
        """What each task's loss of a micro-batch counts for; 0 for one that is missing."""
        counts = counts_of(self._samples, losses.names)
        return [
            0.0 if loss is None else counts.get(task, 1.0)
            for task, loss in enumerate(losses.detached)
        ]

    def average(self, roles: Roles, losses: TaskLosses) -> Averaged:
        """The losses of a micro-batch over all ranks.

        Raises:
            RankFailedError: a rank has failed.
            ValueError: the ranks have different numbers of micro-batches.
        """
        return self.average_and_add(roles, losses, [])

    def average_and_add(
        self, roles: Roles, losses: TaskLosses, extra: Sequence[Tensor]
    ) -> Averaged:
        """The same, and the sums of ``extra`` (float64 1-D each) in the same message."""
        counts = counts_of(self._samples, roles.tasks)
        self.counts = [counts.get(task, 1.0) for task in range(len(roles.tasks))]
        self._left -= 1
        device = roles.params[0].device
        batches = [
            torch.full((1,), n, dtype=torch.float64, device=device)
            for n in (self._batches, self._batches**2)
        ]
        found = average(self._ranks, losses.detached, self.counts, device, extra=[*extra, *batches])
        self._check_batches(found)
        self.averaged = added_entries(self.averaged, found.entries())
        self._told = False
        self._counts.append(found.counts)
        self.shares.append(found.shares)
        return found

    def _check_batches(self, found: Averaged) -> None:
        """Takes the numbers of micro-batches out of the sums: each of these has a message of its own."""
        assert found.extra is not None
        both, found.extra = found.extra[-2:], found.extra[:-2]
        if both.device.type == "cpu" and self._ranks.size * both[1] != both[0].square():
            self._over = True  # all ranks know: there is nothing to tell
            raise ValueError(
                "losses must be of as many micro-batches on every rank where a step is one backward pass for "
                f"all tasks, got {self._batches} on rank {self._ranks.rank}"
            )

    def reduce(
        self,
        backward: WeightedBackward,
        rows: Sequence[Tensor | None],
        *,
        perturbed: bool = False,
        without: Collection[int] = (),
    ) -> None:
        """Rows <- their sums over the ranks, the tasks' own ones with them.

        Args:
            backward: has left its gradients in the first of the rows and in the own blocks; what it knows
                of them becomes what all ranks know.
            rows: [P] each, of the shared parameters; None where nothing is shared.
            perturbed: the own gradients are in the blocks' ``sam`` rows.
            without: tasks that all ranks have left out of their backward passes.

        Raises:
            RankFailedError: a rank has failed.
            ValueError: no rank has a loss.
        """
        roles = backward.roles
        own = {t: (b.sam if perturbed else b.jac)[0] for t, b in sorted(roles.own.items())}
        shared = [row for row in rows if row is not None]
        if not backward.present:
            for row in shared:
                row.zero_()
        for task, row in own.items():
            if task not in backward.own_sq:
                row.zero_()
        self._add_up([*shared, *own.values()])
        present = self.present().difference(without)
        if shared:
            backward.shared_sq = ops.row_norms(shared[0].unsqueeze(0))[0].square()
        backward.own_sq = {
            task: ops.row_norms(row.unsqueeze(0))[0].square()
            for task, row in own.items()
            if task in present
        }
        backward.present, backward.reached = present, roles.reached_by(present)

    def _add_up(self, rows: Sequence[Tensor], *, failed: bool = False) -> None:
        flag = torch.full_like(rows[0][:1], float(failed))
        dtype = self._dtype
        message = torch.cat([row.to(dtype) for row in (*rows, flag)])
        self._rows.pop(0)
        self._over = not self._rows
        self._ranks.total(message)
        self.failed = message[-1]
        if message.device.type == "cpu" and not failed and message[-1] > 0:
            self._over = True
            raise self._ranks.told()
        message = torch.where(message[-1] > 0, torch.nan, message) if message.is_cuda else message
        for row, part in zip(rows, message.split([*(r.numel() for r in rows), 1]), strict=False):
            row.copy_(part)

    def _length(self, roles: Roles, rows: int) -> int:
        """Of the message with so many rows."""
        shared = 0 if roles.shared is None else roles.shared.size
        return rows * shared + sum(block.size for block in roles.own.values())

    def present(self) -> set[int]:
        """The tasks that some rank has a loss of at this step (``present_in``)."""
        return present_in(torch.stack(self._counts).sum(0))

    @property
    def over(self) -> bool:
        """Whether nothing goes between the ranks any more."""
        return self._over

    def fail(self, failure: Exception) -> None:
        """This rank cannot go on: the others learn of it where they wait."""
        if self._over or self._ranks.broken:
            return
        self._over = True
        roles = self._roles
        if self._left and not (self._known or self._told):
            gather_failure(self._ranks, failure)
            return
        measuring = self.measuring
        if not self._left and measuring is not None and measuring.asks:
            gather_failure(self._ranks, failure)
            return
        assert roles is not None
        self._ranks.tell(failure)
        self.told = True
        device, tasks = roles.params[0].device, len(roles.tasks)
        reading = device.type == "cpu"
        for _ in range(self._left):
            zeros = [torch.zeros(self._extra(tasks) + 2, dtype=torch.float64, device=device)]
            average(self._ranks, [None] * tasks, [0.0] * tasks, device, extra=zeros, failed=True)
            if reading:
                return
        if measuring is not None and measuring.abandon() and reading:
            return
        for count in list(self._rows):
            row = torch.zeros(self._length(roles, count), dtype=self._dtype, device=device)
            self._add_up([row], failed=True)
            if reading:
                return

    @property
    def _dtype(self) -> torch.dtype:
        assert self._roles is not None
        return self._roles.params[0].dtype
