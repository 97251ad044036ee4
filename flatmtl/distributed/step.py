"""One step of one rank: what it sends and waits for, and what becomes of it if a rank fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from flatmtl.distributed.agree import gather_failure
from flatmtl.distributed.capture import RankedCapture, squares
from flatmtl.distributed.exchange import Arrived, Exchange
from flatmtl.distributed.ranks import Ranks
from flatmtl.jacobian import Captured
from flatmtl.losses import TaskName
from flatmtl.roles import Roles
from flatmtl.sharpness import check_radius

Samples: TypeAlias = float | Sequence[float] | Mapping[str, float] | None


class RowStep:
    """A step that averages a row for every task, and another one at the perturbed parameters.

    Args:
        ranks: the ranks.
        roles: as they are known before the step; None at the first one.
        samples: how many samples this rank's losses are means of; None: each rank counts alike.
        perturbed: whether rows at perturbed parameters follow.
        local: the perturbations are those of this rank's own rows, which are sent after them.

    Attributes:
        local: the same.
        capture: takes this rank's gradients.
    """

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        *,
        perturbed: bool,
        local: bool,
    ) -> None:
        self._ranks = ranks
        self._samples = samples
        self._perturbed, self.local = perturbed, perturbed and local
        self._known = ranks.agreed and roles is not None and roles.complete
        self._exchange: Exchange | None = None
        self._over = False
        self.capture: RankedCapture | None = None
        if self._known:
            assert roles is not None
            self._open(roles)

    def _open(self, roles: Roles) -> None:
        assert roles.messages is not None
        tasks = range(len(roles.tasks))
        stages = [[("jac", task) for task in tasks]]
        if self.local:
            stages = [[(name, task) for task in tasks for name in ("jac", "sam")]]
        elif self._perturbed:
            stages.append([("sam", task) for task in tasks])
        self._exchange = Exchange(self._ranks, roles.messages, stages)

    def begin(self, roles: Roles, batches: int) -> RankedCapture:
        """What takes this rank's gradients."""
        at_once = None if self.local else self._exchange
        counts = counts_of(self._samples, roles.tasks)
        self.capture = RankedCapture(roles, self._ranks, batches, counts, at_once)
        return self.capture

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
        found = capture.averaged(self._arrive("jac"))
        self._over = not self._perturbed
        return found

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

    def perturbed_rows(self, captured: Captured) -> tuple[Captured, dict[int, list[Tensor]]]:
        """The averaged rows at the parameters, and the squared norms of those at the perturbed ones.

        Raises:
            RankFailedError: a rank has failed.
        """
        capture = self.capture
        assert capture is not None
        if self.local:
            captured = capture.averaged(self._arrive("jac"))
        self._arrive("sam")
        self._over = True
        shared, own = squares(capture.roles, "sam", captured.present)
        norms = {task: [shared[task]] for task in captured.present}
        for task, sq in own.items():
            norms[task].append(sq)
        return captured, norms

    def _arrive(self, name: str) -> Arrived:
        assert self._exchange is not None
        arrived = self._exchange.arrive(name)
        if arrived.failed.device.type == "cpu" and arrived.failed > 0:
            self._over = True
            raise self._ranks.told()
        return arrived

    def fail(self, failure: Exception) -> None:
        """This rank cannot go on: the others learn of it where they wait."""
        if self._over or self._ranks.broken:
            return
        self._over = True
        if self._exchange is None:
            gather_failure(self._ranks, failure)
        else:
            self._exchange.abandon(failure)


def counts_of(samples: Samples, tasks: Sequence[TaskName]) -> dict[int, float]:
    """Task -> how many samples its loss is a mean of on this rank; {} where that was not said.

    Raises:
        TypeError, ValueError: they are no such numbers, one for each task.
    """
    if samples is None:
        return {}
    if isinstance(samples, Mapping):
        if set(samples) != set(tasks):
            raise ValueError(f"samples must have the tasks {list(tasks)}, got {list(samples)}")
        numbers = [samples[name] for name in tasks]  # type: ignore[index]
    elif isinstance(samples, Sequence) and not isinstance(samples, str):
        numbers = list(samples)
        if len(numbers) != len(tasks):
            raise ValueError(
                f"samples must have one entry for each of {len(tasks)} tasks, got {len(numbers)}"
            )
    else:
        numbers = [samples] * len(tasks)
    return {task: check_radius("samples", number) for task, number in enumerate(numbers)}
