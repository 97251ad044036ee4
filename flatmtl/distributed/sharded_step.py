"""A step of which every rank keeps a part of the rows: reduce-scattered, and one Gram matrix of all parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.distributed.agree import agree_on_reach
from flatmtl.distributed.capture import RankedCapture
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.exchange import WHOLE, Exchange, ShardedExchange, Stages
from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.row_step import RowStep
from flatmtl.jacobian import Batched, hits, task_gradients
from flatmtl.losses import TaskLosses
from flatmtl.roles import Gradients, Roles

Second = Literal["flat", "sam"]  # what the Gram matrix at the perturbed parameters is of


class ShardedCapture(RankedCapture):
    """Rows that are packed into the message that carries them, one after the other."""

    def __init__(
        self,
        roles: Roles,
        ranks: Ranks,
        counts: Mapping[int, float],
        exchange: ShardedExchange | None,
    ) -> None:
        super().__init__(roles, ranks, 1, counts, exchange)
        self._held: dict[int, Gradients] = {}  # as long as nobody knows where they go

    def _add(
        self, losses: TaskLosses, batched: Batched | None, scale: Tensor | None, retain_graph: bool
    ) -> None:
        roles = self.roles
        for task, grads in task_gradients(losses, roles, batched, scale, retain_graph):
            self._check_reaches(losses, task, hits(grads))
            self._packed.add(task)
            if self._known:
                roles.note(task, grads)  # raises: the roles are settled for good
                self._send_until(task)
                self._held = {task: grads}
                del grads
                self._send_until(task + 1)
            else:
                self._held[task] = grads
        if self._known:
            self._send_until(len(roles.tasks))

    def _send_until(self, task: int) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        assert isinstance(exchange, ShardedExchange)
        for earlier in range(self._sent, task):
            grads = self._held.pop(earlier, None)
            if grads is not None:
                pack(self.roles, exchange, earlier, grads)
            exchange.send("jac", earlier, self.counts(earlier))
        self._sent = task

    def settle(self) -> None:
        """As for whole rows."""
        roles = self.roles
        if self._known:
            return
        for grads in self._held.values():
            for k, grad in enumerate(grads):
                if grad is not None:
                    roles.check_dense(k, grad)
        reached = [(task, k) for task, grads in self._held.items() for k in hits(grads)]
        if roles.note_all(*agree_on_reach(self._ranks, roles.tasks, self._packed, reached)):
            roles.settle()


def pack(roles: Roles, exchange: ShardedExchange, task: int, grads: Gradients) -> None:
    """The next message <- a task's gradients, of all parameters in ``roles.params``."""
    assert roles.sharded is not None
    shared = [grads[k] for k in roles.shared_index]
    own = [grads[k] for k in roles.own_index.get(task, [])]
    roles.sharded.pack(exchange.space(task), task, shared, own)


class ShardedStep(RowStep):
    """A row step with 1/n of the rows on each rank; see ``RowStep`` for its arguments.

    Args:
        second: what the Gram matrix at the perturbed parameters is of: the "flat" parts, or the gradients
            there ("sam").

    Attributes:
        grams: of "jac" and, with perturbed rows, of ``second``.
        whole: the shared row [P] and the own one of the task that is perturbed.
    """

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        losses: Callable[[], Sequence[Tensor | None]] | None,
        *,
        perturbed: bool,
        second: Second,
        tables: Callable[[int], list[int]] = lambda _: [],
    ) -> None:
        self._second = second
        self.whole: tuple[Tensor | None, Tensor | None] = (None, None)
        super().__init__(
            ranks, roles, samples, losses, perturbed=perturbed, local=False, tables=tables
        )

    def _stages(self, tasks: int) -> Stages:
        first = [("jac", task) for task in range(tasks)]
        second = [(name, task) for task in range(tasks) for name in (WHOLE, "sam")]
        return [first, second] if self._perturbed else [first]

    def _exchange_of(self, roles: Roles, stages: Stages) -> Exchange:
        assert roles.sharded is not None
        return ShardedExchange(self._ranks, roles.sharded, stages)

    def _capture_of(
        self, roles: Roles, batches: int, counts: dict[int, float], exchange: Exchange | None
    ) -> RankedCapture:
        if batches > 1:
            raise ValueError(
                f"losses must be of one micro-batch a step with shard_rows=True, got {batches}: no rank "
                "keeps whole rows to add to"
            )
        assert exchange is None or isinstance(exchange, ShardedExchange)
        return ShardedCapture(roles, self._ranks, counts, exchange)

    def _squares(self, name: str, present: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Squared norms of whole rows: from the Gram matrix, which all ranks' parts make together."""
        assert self.capture is not None
        roles = self.capture.roles
        rows, tasks = roles.rows, len(roles.tasks)
        none = roles.per_task({})
        own = {
            task: ops.row_norms(part.jac if name == "jac" else part.sam)[0].square()
            for task, part in ((t, roles.own_rows(t)) for t in roles.own)
        }
        gram, squares = torch.zeros(tasks, tasks).to(none), none
        if rows is not None and name == "jac":
            gram = ops.gram(rows.jac)
        elif rows is not None and self._second == "sam":
            gram = ops.gram(rows.sam)
        elif rows is not None:
            gram, squares = (
                ops.gram_difference(rows.sam, rows.jac),
                ops.row_norms(rows.sam).square(),
            )
        message = torch.cat([gram.reshape(-1), squares, roles.per_task(own)])
        self._ranks.total(message)
        gram = message[: tasks * tasks].view(tasks, tasks)
        squares, own_sq = message[tasks * tasks :].view(2, tasks).unbind()
        self.grams["jac" if name == "jac" else self._second] = gram
        if name == "jac" or self._second == "sam":
            squares = gram.diag()
        return squares, {task: own_sq[task] for task in own if task in present}

    def moving(self, task: int) -> None:
        """Puts the task's row together."""
        assert isinstance(self._exchange, ShardedExchange)
        self.whole = self._exchange.whole(task)

    def hold(
        self, task: int, shared: Sequence[Tensor | None], own: Sequence[Tensor | None]
    ) -> None:
        """A task's gradients at the perturbed parameters, for ``taken`` to send."""
        assert self.capture is not None
        assert isinstance(self._exchange, ShardedExchange)
        sharded = self.capture.roles.sharded
        assert sharded is not None
        sharded.pack(self._exchange.space(task), task, shared, own)

    def join_updates(self) -> None:
        """The blocks' updates <- all ranks' parts of them."""
        assert self.capture is not None
        sharded = self.capture.roles.sharded
        assert sharded is not None
        sharded.take_updates(self._ranks.join(sharded.update_message()))
