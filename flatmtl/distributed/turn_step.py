"""A step with one task's turn: the row of that task alone goes between the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.distributed.ranks import Ranks
from flatmtl.roles import Roles


class TurnStep(OneRowStep):
    """A step with CoopFlat.

    Args:
        ranks: the ranks.
        roles: as they are known before the step; None at the first one.
        samples: how many samples this rank's losses are means of; None: each rank counts alike.
        batches: how many micro-batches the step has.
        turn: T -> the task whose turn it is.
    """

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        batches: int,
        turn: Callable[[int], int],
    ) -> None:
        super().__init__(ranks, roles, samples, batches, [1])
        self._turn = turn

    @property
    def _known(self) -> bool:
        roles = self._roles
        return super()._known and roles is not None and bool(roles.of_turn.get(self._task(roles)))

    def _task(self, roles: Roles) -> int:
        return self._turn(len(roles.tasks))

    def _length(self, roles: Roles, rows: int) -> int:
        parts = (roles.shared, roles.own.get(self._task(roles)))
        return sum(block.size for block in parts if block is not None)

    def reduce_turn(self, blocks: Sequence[Block], *, here: bool) -> list[Tensor]:
        """The blocks' ``update`` <- its sum over the ranks; ``here``: whether this one has a part in it.

        Returns:
            Their squared norms.

        Raises:
            RankFailedError: a rank has failed.
        """
        rows = [block.update for block in blocks]
        if not here:
            for row in rows:
                row.zero_()
        self._add_up(rows)
        return [ops.row_norms(row.unsqueeze(0))[0].square() for row in rows]
