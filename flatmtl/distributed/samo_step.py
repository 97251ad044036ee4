"""A SAMO step of one rank: the mean gradient, a sign for each task, and a row for each."""

from __future__ import annotations

from torch import Tensor

from flatmtl.distributed.counts import Samples, counts_of
from flatmtl.distributed.exchange import Exchange
from flatmtl.distributed.losses import average
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.distributed.ranks import RankFailedError, Ranks
from flatmtl.distributed.row_step import squares
from flatmtl.roles import Roles

_RISE, _ROW = "rise", "sam"


class SamoStep:
    """What the ranks send each other at a step with SAMO.

    Args:
        ranks: the ranks.
        roles: as they are known before the step; None at the first one.
        samples: how many samples this rank's losses are means of; None: each rank counts alike.
        batches: how many micro-batches the step has.

    Attributes:
        clean: sends the losses and the mean gradient.
        failed: 0-dim, above 0 where a rank has failed; None: no row at perturbed parameters has come yet.
    """

    def __init__(self, ranks: Ranks, roles: Roles | None, samples: Samples, batches: int) -> None:
        self._ranks, self._samples = ranks, samples
        self.clean = OneRowStep(ranks, roles, samples, batches, [1])
        self._roles = roles
        self._counts: list[float] = []
        self._due: list[tuple[str, int]] = []  # what the others wait for, in its order
        self._exchange: Exchange | None = None
        self._present: set[int] = set()
        self._over = False
        self.failed: Tensor | None = None

    def begin(self, roles: Roles, here: set[int], present: set[int]) -> None:
        """The mean gradient has come.

        Args:
            roles: settled.
            here: the tasks that have a loss on this rank.
            present: those that have one on some rank.
        """
        counts = counts_of(self._samples, roles.tasks)
        tasks = range(len(roles.tasks))
        self._roles, self._present = roles, present
        self._counts = [counts.get(task, 1.0) if task in here else 0.0 for task in tasks]
        self._open(roles)

    def _open(self, roles: Roles) -> None:
        assert roles.messages is not None
        tasks = range(len(roles.tasks))
        self._exchange = Exchange(self._ranks, roles.messages, [[(_ROW, task) for task in tasks]])
        for task in tasks:
            if roles.shared is not None and task in self._present:
                self._due.append((_RISE, task))
            self._due.append((_ROW, task))

    def rise(self, task: int, here: Tensor | None) -> Tensor:
        """How far a task's loss rises between two points, over all ranks: float64 0-dim.

        Args:
            task: the task.
            here: on this rank; None where it has no loss.

        Raises:
            RankFailedError: a rank has failed.
        """
        assert self._roles is not None
        self._due.remove((_RISE, task))
        device = self._roles.params[0].device
        try:
            found = average(self._ranks, [here], [self._counts[task]], device)
        except RankFailedError:
            self._over = True
            self._wait()
            raise
        return found.values[0]

    def moving(self, task: int) -> None:
        """Nothing to send."""

    def moved(self, task: int) -> None:
        """Nothing to send: the mean gradient has come long ago."""

    def taken(self, task: int) -> None:
        """This rank's row of a task at the perturbed parameters is complete."""
        assert self._exchange is not None
        self._due.remove((_ROW, task))
        self._exchange.send(_ROW, task, self._counts[task])

    def rows(self) -> dict[int, list[Tensor]]:
        """The squared norms of the averaged rows at the perturbed parameters.

        Raises:
            RankFailedError: a rank has failed.
        """
        assert self._exchange is not None
        assert self._roles is not None
        self._over = True
        arrived = self._exchange.arrive(_ROW)
        self.failed = arrived.failed
        if arrived.failed.device.type == "cpu" and arrived.failed > 0:
            raise self._ranks.told()
        shared, own = squares(self._roles, _ROW, self._present)
        return {
            task: [shared[task], *([own[task]] if task in own else [])] for task in self._present
        }

    @property
    def over(self) -> bool:
        """Whether nothing goes between the ranks any more."""
        return self._over

    def fail(self, failure: Exception) -> None:
        """This rank cannot go on: the others learn of it where they wait."""
        if self._over or self._ranks.broken:
            return
        self._over = True
        if self._exchange is None:
            self.clean.fail(failure)
            if not self.clean.told or self._reading:
                return
            assert self._roles is not None
            self._present = set(range(len(self._roles.tasks)))
            self._open(self._roles)
        else:
            self._ranks.tell(failure)
        assert self._roles is not None
        assert self._exchange is not None
        for what, task in self._due:
            if what == _ROW:
                self._exchange.send(_ROW, task, 0, failed=True)
                continue
            average(self._ranks, [None], [0.0], self._roles.params[0].device, failed=True)
            if self._reading:
                break
        self._wait()

    @property
    def _reading(self) -> bool:
        assert self._roles is not None
        return self._roles.params[0].device.type == "cpu"

    def _wait(self) -> None:
        assert self._exchange is not None
        self._exchange.wait()
