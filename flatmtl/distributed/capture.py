"""Captures every task's gradient on each rank, and averages the rows over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flatmtl.distributed.agree import agree_on_reach
from flatmtl.distributed.exchange import Exchange
from flatmtl.distributed.ranks import Ranks
from flatmtl.jacobian import Batched, Capture, hits, task_gradients
from flatmtl.losses import TaskLosses
from flatmtl.roles import Gradients, Roles


class RankedCapture(Capture):
    """The rows of one step.

    As long as some task or parameter has not been seen on any rank, ranks tell each other what they have
    found once their backward passes are through, and send the rows then. After that each row is on its
    way during the next task's backward pass.

    Args:
        roles: of the parameters.
        ranks: the ranks.
        batches: how many micro-batches the step has here.
        counts: task -> what this rank's row counts for; 1 for one that is not in it.
        exchange: takes the rows as they come; None: not all is known yet, or they are sent later.
    """

    def __init__(
        self,
        roles: Roles,
        ranks: Ranks,
        batches: int,
        counts: Mapping[int, float],
        exchange: Exchange | None,
    ) -> None:
        super().__init__(roles)
        self._ranks, self._left = ranks, batches
        self._counts = counts
        self._exchange = exchange
        self._known = roles.complete
        self._extra: dict[tuple[int, int], Tensor] = {}  # gradients that no row has a place for
        self._sent = 0

    @property
    def here(self) -> set[int]:
        """The tasks that have a loss on this rank."""
        return set(self._packed)

    def counts(self, task: int) -> float:
        """What this rank's row of a task counts for."""
        return self._counts.get(task, 1.0) if task in self._packed else 0.0

    def _end_pass(self, tasks: list[int], *, keep: bool) -> None:
        if self._known:  # else nothing was noted: what this rank alone has seen settles nothing
            super()._end_pass(tasks, keep=keep)

    def all_counts(self) -> list[float]:
        """[T], ``counts`` of every task."""
        return [self.counts(task) for task in range(len(self.roles.tasks))]

    def _add(
        self, losses: TaskLosses, batched: Batched | None, scale: Tensor | None, retain_graph: bool
    ) -> None:
        roles = self.roles
        self._left -= 1
        for task, grads in task_gradients(losses, roles, batched, scale, retain_graph):
            self._check_reaches(losses, task, hits(grads))
            if self._known:
                roles.note(task, grads)  # raises: the roles are settled for good
            else:
                self._put_aside(task, grads)
            if roles.settled:
                if not self._left:
                    self._send_until(task)
                self._pack(task, grads)
            self._packed.add(task)
            if not self._left:
                self._send_until(task + 1)
            del grads  # not kept alive during the next backward pass
        if not self._left:
            self._send_until(len(roles.tasks))

    def _send_until(self, task: int) -> None:
        """Sends the rows of the tasks before this one: nothing more is added to them."""
        if self._exchange is None:
            return
        for earlier in range(self._sent, task):
            self._exchange.send("jac", earlier, self.counts(earlier))
        self._sent = task

    def _put_aside(self, task: int, grads: Gradients) -> None:
        roles = self.roles
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            roles.check_dense(k, grad)
            if not roles.settled or not (k in roles.shared_set or roles.owner.get(k) == task):
                kept = self._extra.get((task, k))
                self._extra[task, k] = grad if kept is None else kept + grad

    def settle(self) -> None:
        """Where not all is known: the ranks tell each other, and lay the rows out alike.

        Raises:
            ValueError: the tasks are not the same everywhere, or the roles do not hold.
            RankFailedError: a rank failed.
        """
        roles = self.roles
        if self._known:
            return
        here, reached = agree_on_reach(self._ranks, roles.tasks, self._packed, self._extra)
        if not roles.note_all(here, reached):
            return
        packed = sorted(self._packed)
        grads = {task: list(self._unpack(task)) for task in packed}
        self._packed = set()
        roles.settle()
        for (task, k), grad in self._extra.items():
            old = grads[task][k]
            grads[task][k] = grad if old is None else old + grad
        self._extra = {}
        for task in packed:
            self._pack(task, grads[task])

    def send_all(self, exchange: Exchange) -> None:
        """Sends every row that has not been sent."""
        self._exchange = exchange
        self._send_until(len(self.roles.tasks))
