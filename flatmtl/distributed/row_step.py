"""One step of one rank: what it sends and waits for, and what becomes of it if a rank fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.distributed.agree import gather_failure, present_in
from flatmtl.distributed.capture import RankedCapture
from flatmtl.distributed.counts import Samples, counts_of
from flatmtl.distributed.exchange import LOSSES, Arrived, Exchange, Stages
from flatmtl.distributed.losses import average
from flatmtl.distributed.ranks import Ranks
from flatmtl.jacobian import Captured
from flatmtl.roles import Roles


class RowStep:
    """A step that averages a row for every task, and another one at the perturbed parameters.

    Args:
        ranks: the ranks.
        roles: as they are known before the step; None at the first one.
        samples: how many samples this rank's losses are means of; None: each rank counts alike.
        losses: gives this rank's losses, where their means over all ranks are wanted too.
        perturbed: whether rows at perturbed parameters follow.
        local: the perturbations are those of this rank's own rows, which are sent after them.
        tables: from the number of tasks, how many columns each table of losses has that ``means`` is going
            to be given.
        twice: from the averaged rows at perturbed parameters others are made, which are averaged too.

    Attributes:
        local: the same.
        capture: takes this rank's gradients.
        averaged: the losses over all ranks, once the last rows have come.
        failed: 0-dim, above 0 where a rank has failed; None: nothing has come yet.
        there: bool [T], whether some rank has the task, once the averaged rows have come.
        grams: Gram matrices of whole rows, float64 [T, T], where this rank has a part of each.
    """

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        losses: Callable[[], Sequence[Tensor | None]] | None,
        *,
        perturbed: bool,
        local: bool,
        tables: Callable[[int], list[int]] = lambda _: [],
        twice: bool = False,
    ) -> None:
        self._ranks = ranks
        self._samples, self._losses = samples, losses
        self._perturbed, self.local = perturbed, perturbed and local
        self._tables = tables
        self._twice = twice and not self.local
        self._known = ranks.agreed and roles is not None and roles.complete
        self._exchange: Exchange | None = None
        self._over = False
        self.capture: RankedCapture | None = None
        self.averaged: list[Tensor | None] = []
        self.failed: Tensor | None = None
        self.there: Tensor | None = None
        self.grams: dict[str, Tensor] = {}
        if self._known:
            assert roles is not None
            self._open(roles)

    def _open(self, roles: Roles) -> None:
        tasks = len(roles.tasks)
        first, *second = self._stages(tasks)
        columns = [] if roles.shared is None else self._tables(tasks)
        # a stage each: behind every one the ranks look for marks
        self._exchange = self._exchange_of(
            roles, [first, *([(LOSSES, n)] for n in columns), *second]
        )

    @property
    def asks(self) -> bool:
        """Whether the ranks are going to tell each other what their tasks reach."""
        return self._exchange is None and not self._over

    def know(self, roles: Roles) -> None:
        """The ranks have agreed on the roles before the rows are taken."""
        if not self._known and roles.complete:
            self._known = True
            self._open(roles)

    def _stages(self, tasks: int) -> Stages:
        if self.local:
            return [[(name, task) for task in range(tasks) for name in ("jac", "sam")]]
        names = ["jac", *["sam"] * (self._perturbed + self._twice)]
        return [[(name, task) for task in range(tasks)] for name in names]

    def _exchange_of(self, roles: Roles, stages: Stages) -> Exchange:
        assert roles.messages is not None
        return Exchange(self._ranks, roles.messages, stages)

    def begin(self, roles: Roles, batches: int, *, partial: bool = False) -> RankedCapture:
        """What takes this rank's gradients; ``partial`` as in ``Capture``."""
        at_once = None if self.local else self._exchange
        counts = counts_of(self._samples, roles.tasks)
        self.capture = self._capture_of(roles, batches, counts, at_once)
        self.capture.partial = partial
        return self.capture

    def _capture_of(
        self, roles: Roles, batches: int, counts: dict[int, float], exchange: Exchange | None
    ) -> RankedCapture:
        return RankedCapture(roles, self._ranks, batches, counts, exchange)

    def rows(self) -> Captured:
        """The averaged rows; with ``local``, this rank's own ones.

        Raises:
            RankFailedError: a rank has failed.
            ValueError: the tasks are not the same on all ranks.
        """
        capture = self.capture
        assert capture is not None
        if not self._known:
            capture.settle()
            self._known = True
            self._open(capture.roles)
        if self.local:
            return capture.finish()
        assert self._exchange is not None
        capture.send_all(self._exchange)
        found = self._captured(self._arrive("jac"))
        if not self._perturbed:
            self._end()
        return found

    def moving(self, task: int) -> None:
        """A task's perturbation is next, on this rank or on others."""

    def moved(self, task: int) -> None:
        """The parameters are where this task's perturbation takes them: its row is not needed here."""
        if self.local:
            assert self._exchange is not None
            assert self.capture is not None
            self._exchange.send("jac", task, self.capture.counts(task))

    def taken(self, task: int) -> None:
        """This rank's row of a task at the perturbed parameters is complete."""
        assert self._exchange is not None
        assert self.capture is not None
        self._exchange.send("sam", task, self.capture.counts(task))

    def first_rows(self) -> None:
        """The rows at the perturbed parameters <- their means, for others to be made of them.

        Raises:
            RankFailedError: a rank has failed.
        """
        self._arrive("sam")

    def perturbed_rows(self, captured: Captured) -> tuple[Captured, dict[int, list[Tensor]]]:
        """The averaged rows at the parameters, and the squared norms of those at the perturbed ones.

        Raises:
            RankFailedError: a rank has failed.
        """
        capture = self.capture
        assert capture is not None
        if self.local:
            captured = self._captured(self._arrive("jac"))
        self._arrive("sam")
        self._end()
        shared, own = self._squares("sam", captured.present)
        norms = {task: [shared[task]] for task in captured.present}
        for task, sq in own.items():
            norms[task].append(sq)
        return captured, norms

    def means(self, table: Tensor) -> Tensor:
        """Losses of this rank, float64 [T, n] -> their means over all ranks, NaN where none has the task.

        Raises:
            RankFailedError: a rank has failed.
        """
        assert self._exchange is not None
        assert self.capture is not None
        return self._exchange.average(table, self.capture.all_counts())

    def _captured(self, arrived: Arrived) -> Captured:
        assert self.capture is not None
        self.there = arrived.counts > 0
        present = present_in(arrived.counts)
        shared_sq, own_sq = self._squares("jac", present)
        reached = self.capture.roles.reached_by(present)
        return Captured(shared_sq, own_sq, reached, present, self.capture.here)

    def _squares(self, name: str, present: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Squared norms of the averaged rows: float64 [T] of the shared ones, and of the tasks' own."""
        assert self.capture is not None
        return squares(self.capture.roles, name, present)

    def _end(self) -> None:
        capture = self.capture
        if self._losses is not None and capture is not None:
            device, counts = capture.roles.params[0].device, capture.all_counts()
            self.averaged = average(self._ranks, self._losses(), counts, device).entries()

    def _arrive(self, name: str) -> Arrived:
        assert self._exchange is not None
        arrived = self._exchange.arrive(name)
        self.failed = arrived.failed if self.failed is None else self.failed + arrived.failed
        if arrived.failed.device.type == "cpu" and arrived.failed > 0:
            self._over = True
            raise self._ranks.told()
        return arrived

    @property
    def over(self) -> bool:
        """Whether nothing goes between the ranks any more."""
        return self._over or (self._exchange is not None and self._exchange.done)

    def fail(self, failure: Exception) -> None:
        """This rank cannot go on: the others learn of it where they wait."""
        if self._over or self._ranks.broken:
            return
        if self._exchange is None:
            self._over = True
            gather_failure(self._ranks, failure)
        elif not self._exchange.done:
            self._ranks.tell(failure)
            self.abandon()

    def abandon(self) -> bool:
        """This rank has failed, and has told so. Returns whether the others wait for something here."""
        over, self._over = self._over, True
        if over or self._exchange is None or self._exchange.done:
            return False
        self._exchange.abandon()
        return True


def squares(roles: Roles, name: str, present: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Squared norms of whole rows: float64 [T] of the shared ones, and of the present tasks' own."""

    def of(block: Block) -> Tensor:
        return ops.row_norms(block.jac if name == "jac" else block.sam).square()

    shared = roles.per_task({}) if roles.shared is None else of(roles.shared)
    return shared, {t: of(block)[0] for t, block in roles.own.items() if t in present}
