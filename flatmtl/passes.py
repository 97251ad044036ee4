"""The forward passes of one step: the closures of its micro-batches, run plainly and perturbed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flatmtl.losses import Losses, TaskLosses, TaskName, added, read_losses
from flatmtl.replay import Replay

Closure = Callable[..., Losses]


class Passes:
    """What a step was given: one closure, one for each micro-batch, or losses that are there already.

    Attributes:
        total: the clean losses so far, added up over the micro-batches, as the closure returned them.
        repeatable: whether the forward passes can be run again.

    Args:
        given: what.
        replay: of the random numbers.
        replaying: the perturbed passes draw the clean ones'.
        partial: other processes have losses too: a batch may hold no task here.
        inside: entered for every forward pass.
    """

    def __init__(
        self,
        given: object,
        replay: Replay | None = None,
        replaying: bool = False,
        *,
        partial: bool = False,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.total: Losses | None = None
        self._partial, self._inside = partial, inside
        self._replay, self._replaying = replay, replaying
        self._losses: TaskLosses | None = None
        self._present: list[set[TaskName]] = []  # of each micro-batch
        self._closures = closures_in(given)
        if not self._closures:
            self._losses = read_losses(given, partial=partial)
        self._by_task = [takes(c, "tasks") for c in self._closures]
        self.repeatable = bool(self._closures)

    def __len__(self) -> int:
        """The number of micro-batches."""
        return max(1, len(self._closures))

    def clean(self) -> Iterator[TaskLosses]:
        """The losses of every micro-batch, its forward pass run just before."""
        if self._losses is not None:
            losses, self._losses = self._losses, None
            self.total = losses.values
            yield losses
        for closure in self._closures:
            if self._replay is not None:
                self._replay.note()
            with torch.enable_grad(), self._inside():
                losses = read_losses(closure(), partial=self._partial)
            self._present.append({losses.names[k] for k in losses.present})
            values = losses.values
            yield losses
            self.total = added(self.total, values)

    def again(
        self,
        tasks: Sequence[TaskName],
        task: int | None,
        *,
        graph: bool = True,
        replay: bool = False,
        query: bool = False,
        last: bool = False,
    ) -> Iterator[tuple[TaskLosses, int]]:
        """Runs every micro-batch that has the task again.

        A closure that takes ``tasks=`` is asked for that task alone.

        Args:
            tasks: all tasks' names.
            task: the number of the one; None: all of them, in this order.
            graph: False: without gradients.
            replay: with the random numbers of the clean pass, also where that is not asked for.
            query: of query data, where a closure takes ``query=``.
            last: the last micro-batch alone.

        Yields:
            The micro-batch's losses, and where the task's stands among them (0 if all were asked for).
        """
        for number, (closure, by_task) in enumerate(
            zip(self._closures, self._by_task, strict=True)
        ):
            name = None if task is None else tasks[task]
            if name is not None and name not in self._present[number]:
                continue
            if last and number < len(self._closures) - 1:
                continue
            if self._replay is not None and (replay or self._replaying):
                self._replay.rewind(number)
            alone = by_task and name is not None
            asked: dict[str, object] = {"tasks": [name]} if alone else {}
            if query and takes(closure, "query"):
                asked["query"] = True
            with torch.set_grad_enabled(graph), self._inside():
                returned = closure(**asked)
                losses = read_losses(returned, graph=graph, partial=self._partial)
            if set(losses.names) == set(tasks):
                losses = losses.in_order(list(tasks))
                position = 0 if task is None else task
            elif alone and len(losses.names) == 1 and losses.names[0] in (0, name):
                position = 0
            else:
                wanted = "" if name is None else f" (or, if it takes tasks=, {name!r} alone)"
                raise ValueError(
                    f"closure must return the losses of tasks {list(tasks)} when called again{wanted}, "
                    f"got {losses.names}"
                )
            if task is not None and losses.detached[position] is None:
                raise ValueError(
                    f"closure must return the loss of task {name!r} when called again, got None"
                )
            yield losses, position

    def end(self) -> None:
        """Leaves the random number generators as the clean passes left them."""
        if self._replay is not None:
            self._replay.end()


def closures_in(given: object) -> list[Closure]:
    """The closures that a step was given, one for each micro-batch; none where it was given losses."""
    if callable(given) and not isinstance(given, Tensor):
        return [given]
    if isinstance(given, Sequence) and given and all(map(callable, given)):
        return list(given)
    return []


def takes(closure: Closure, name: str) -> bool:
    """Whether the closure has an argument of that name."""
    # Plain functions do without inspect, which costs as much as a kernel.
    code = getattr(closure, "__code__", None)
    if code is not None and not hasattr(closure, "__wrapped__"):
        return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return name in inspect.signature(closure).parameters
