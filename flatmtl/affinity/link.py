"""What goes between the processes at a step that a probe in a loop measures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatmtl.affinity.meter import Meter
from flatmtl.distributed.agree import check_same, gather_failure, gather_or_raise
from flatmtl.distributed.capture import RankedCapture
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.ranks import RankFailedError, Ranks
from flatmtl.distributed.row_step import RowStep
from flatmtl.jacobian import Captured
from flatmtl.losses import TaskName
from flatmtl.roles import Roles


class Link:
    """One measured step: what the tasks reach as long as that is not known, the rows, the losses.

    Args:
        ranks: the processes.
        meter: the probe's.
        samples: what this process's losses are means of.
        params: the trainable parameters that may be shared.

    Attributes:
        ranks: as given.
        asks: whether the ranks are going to tell each other what their tasks reach.
        step: takes the rows and the losses, once it is open.
    """

    def __init__(
        self,
        ranks: Ranks,
        meter: Meter,
        samples: Samples,
        params: list[Tensor],
    ) -> None:
        self.ranks, self._meter, self._samples = ranks, meter, samples
        self._params = params
        self.asks = True
        self.step: RowStep | None = None
        self._over = False

    def open(self, roles: Roles | None) -> None:
        """The shared parameters are known, on all ranks alike; None: there are none."""
        self.asks, self._over = False, roles is None
        self.step = RowStep(
            self.ranks,
            roles,
            self._samples,
            None,
            perturbed=False,
            local=False,
            tables=lambda tasks: [self._meter.columns(tasks)],
        )

    def agree(
        self, tasks: list[TaskName], here: set[TaskName], reach: dict[Tensor, set[TaskName]]
    ) -> set[TaskName]:
        """As long as not all is known, the ranks tell each other what their tasks reach.

        Args:
            tasks: all tasks' names.
            here: those that have a loss on this rank.
            reach: parameter -> the tasks that reach it; what other ranks know of is added.

        Returns:
            The tasks that some rank has; all of them where everything is known.

        Raises:
            ValueError: the ranks measure different things.
            RankFailedError: one has failed.
        """
        if not self.asks:
            return set(tasks)
        same: dict[str, Any] = {
            "probes": self._meter.facts(),
            "the losses' tasks and their order": tasks,
            "the parameters": [f"{list(p.shape)} {p.dtype}" for p in self._params],
        }
        reached = [reach.get(p, set()) for p in self._params]
        try:
            found = gather_or_raise(self.ranks, {"same": same, "here": here, "reached": reached})
            check_same([facts["same"] for facts in found])
        except BaseException:
            self._over = True  # on all of them
            raise
        for facts in found:
            for param, names in zip(self._params, facts["reached"], strict=True):
                if names:
                    reach.setdefault(param, set()).update(names)
        self.ranks.agreed = True
        return set().union(*(facts["here"] for facts in found))

    def begin(self, roles: Roles) -> RankedCapture:
        """What takes this rank's gradients."""
        assert self.step is not None
        return self.step.begin(roles, 1, partial=True)

    def rows(self) -> Captured:
        """The rows, averaged.

        Raises:
            RankFailedError: a rank has failed.
        """
        assert self.step is not None
        return self.step.rows()

    def fail(self, failure: Exception) -> None:
        """This rank cannot go on: the others learn of it where they wait."""
        if self._over or isinstance(failure, RankFailedError):
            return
        if self.step is not None:
            self.step.fail(failure)
        elif not self.ranks.broken:
            gather_failure(self.ranks, failure)
