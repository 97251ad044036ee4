"""What measures at a step: the part of a probe that the loop around a step, or an engine, calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmtl.affinity import measure
from flatmtl.affinity.look_ahead import LookAhead, OptimizerStep, PlainStep
from flatmtl.affinity.tally import Tally
from flatmtl.block import Block
from flatmtl.buffers import BufferKeeper, watch_for_running_statistics
from flatmtl.distributed.row_step import RowStep
from flatmtl.jacobian import Captured
from flatmtl.losses import TaskName, loss_vector
from flatmtl.measures.gradients import gradient_cosines
from flatmtl.roles import Roles


@dataclass(frozen=True)
class MeterOptions:
    """What is measured; the arguments of ``AffinityProbe``, checked.

    Attributes:
        mode: "exact" or "first_order".
        every: a step in so many.
        look_ahead: "sgd" or "optimizer".
        lr: None: the optimizer's.
        push: "first_order" counts the momentum's part of a step in.
        momentum: whether steps go on in the direction of earlier ones.
        groups: sets of tasks whose joint step is measured.
    """

    mode: Literal["exact", "first_order"]
    every: int
    look_ahead: Literal["sgd", "optimizer"]
    lr: float | None
    push: bool
    momentum: bool
    groups: list[tuple[TaskName, ...]]

    @property
    def quantities(self) -> list[str]:
        """The names of what is measured, in the order in which it is kept."""
        names = ["affinity", "affinity_per_lr", "cosine"]
        names += ["first_order"] if self.mode == "exact" else []
        return names + (["beyond_momentum"] if self.momentum else [])


@dataclass
class _Seen:
    """What ``at_rows`` leaves for ``at_gram``."""

    losses: Tensor  # [T], before the step
    finite: Tensor  # bool [T]
    lr: float | Tensor
    push: Tensor | None  # [T], <g_j, the momentum's part of a step>
    order: list[int] | None  # the rows of the tasks as they are kept; None: as they come
    ahead: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # of exact mode


class Meter:
    """Measures at steps, and keeps what it found.

    Args:
        options: what.
        optimizer: makes the steps; it is only looked at.
        model: whose buffers looks ahead leave alone; None: there are none.

    Attributes:
        options: as given.
        tasks: the tasks' names; None before the first measured step.
        steps: steps seen.
        measured: steps measured.
        rates: the first and the last learning rate of the measured steps.
    """

    def __init__(
        self, options: MeterOptions, optimizer: Optimizer, model: nn.Module | None
    ) -> None:
        self.options = options
        self.tasks: list[TaskName] | None = None
        self.steps = 0
        self.measured = 0
        self.rates: list[float] = []
        self._base, self._model = optimizer, model
        self._buffers = BufferKeeper(model)
        self._watched = False
        self._way: tuple[Block, LookAhead] | None = None
        # of each group: positions; ones and zeros, [T]; by the order of the tasks
        self._members: tuple[list[TaskName], list[tuple[list[int], Tensor]]] = ([], [])
        self._met: set[TaskName] = set()  # tasks, as long as nothing is known to be shared
        self._masks: dict[frozenset[int], Tensor] = {}
        self._last = -options.every  # the step measured last
        self._pending: measure.Sample | None = None
        self._seen: _Seen | None = None  # of the step under way
        self._tallies: list[Tally] = []
        self._steps = 0  # measured in this epoch
        self._epochs: list[tuple[int, list[Tensor]]] = []

    def facts(self) -> str:
        """What must be the same on all processes that train together."""
        return f"{self.options}, {self.steps} steps seen, the last measured {self._last}"

    @property
    def due(self) -> bool:
        """Whether the next step that has task gradients is measured."""
        return self.steps - self._last >= self.options.every

    def at_rows(
        self,
        roles: Roles,
        captured: Captured,
        losses: Sequence[Tensor | None],
        scale: Tensor | None,
        again: Callable[[], Sequence[Tensor | None]],
        link: RowStep | None = None,
    ) -> None:
        """Measures what needs the task gradients themselves.

        Args:
            roles: the shared parameters, their block's rows being the task gradients.
            captured: their squared norms.
            losses: [T], detached.
            scale: of the gradients; None: 1.
            again: the losses of the same batch at the parameters as they are.
            link: to the other processes that have parts of the batch: rows are means over all, losses are
                this one's. None: there are none.

        Raises:
            ValueError: nothing is shared, or the learning rate is not one number.
            RankFailedError: another process has failed.
        """
        kept, tasks = self.settle_tasks(roles.tasks), roles.tasks
        block = roles.shared
        if block is None:
            # where the device is not read, ``present`` has tasks that no process may have had
            self.check_all_seen({tasks[k] for k in captured.present if roles.knows([k])})
            return
        device = block.device
        before = loss_vector(losses, device)
        inverse = torch.ones((), dtype=torch.float64, device=device)
        if scale is not None:
            inverse = inverse / scale.to(inverse)
        lr, push = self._rate(block), None
        if self.options.push:
            push = self._momentum_products(block, inverse)
        finite = captured.shared_sq.to(device).isfinite()
        if link is not None and link.there is not None:
            finite = finite & link.there.to(device)
        elif len(captured.present) < len(tasks):
            finite = finite & self._there(captured.present, len(tasks), device)
        # rows come in the order of an optimizer that may be younger than what was kept
        order = None if tasks == kept else [tasks.index(name) for name in kept]
        table = before.unsqueeze(1)
        if self.options.mode == "exact":
            after = self._look_ahead(roles, captured, block, finite, inverse, lr, again)
            table = torch.cat([table, after], 1)
        if link is not None:
            table = link.means(table)
            before = table[:, 0].contiguous()
        self._seen = _Seen(before, finite, lr, push, order)
        if self.options.mode == "exact":
            self._seen.ahead = measure.falls(before, table[:, 1:], len(self.options.groups))

    def columns(self, tasks: int) -> int:
        """How many losses of each task ``at_rows`` needs the means of, where several processes train."""
        options = self.options
        if options.mode == "first_order":
            return 1
        return 1 + tasks + len(options.groups) + options.momentum

    def _look_ahead(
        self,
        roles: Roles,
        captured: Captured,
        block: Block,
        finite: Tensor,
        inverse: Tensor,
        lr: float | Tensor,
        again: Callable[[], Sequence[Tensor | None]],
    ) -> Tensor:
        """The losses after each look ahead, float64 [T, n] (``measure.losses_ahead``)."""
        reach, tasks, device = roles.reach(), roles.tasks, block.device
        rows = measure.Rows(
            block,
            finite,
            captured.present,
            inverse,
            [[task in reach[k] for k in roles.shared_index] for task in range(len(tasks))],
        )

        def once() -> Tensor:
            with torch.no_grad():
                found = again()
            gone = [tasks[task] for task in sorted(captured.here) if found[task] is None]
            if gone:
                raise ValueError(
                    f"closure must return the losses of task(s) {gone} when called again, got None"
                )
            self._buffers.restore(unseen=True)
            return loss_vector(found, device)

        self._buffers.save()
        with watch_for_running_statistics(
            self._model is None and not self._watched, "look-ahead", "AffinityProbe"
        ):
            members = self._members_in(roles.tasks, device)
            way, momentum = self._step_of(block), self.options.momentum
            after = measure.losses_ahead(rows, once, way, lr, members, momentum=momentum)
        self._watched = True
        return after

    def at_gram(self, gram: Tensor) -> None:
        """Measures what the Gram matrix tells, after ``at_rows``.

        Args:
            gram: float64 [T, T], of the unscaled task gradients.
        """
        seen = self._seen
        assert seen is not None
        z, alone = measure.first_order(gram, seen.losses, seen.finite, seen.lr, seen.push)
        found, joint = {"cosine": gradient_cosines(gram)}, None
        if seen.ahead is not None:
            found["first_order"] = z
            z, joint, alone = seen.ahead
        found["affinity"], found["affinity_per_lr"] = z, z / seen.lr
        if alone is not None:
            found["beyond_momentum"] = z - alone.unsqueeze(1)
        if seen.order is not None:
            found = {name: _rows(_rows(m, seen.order).T, seen.order).T for name, m in found.items()}
            joint = None if joint is None else _rows(joint, seen.order)
        self._pending = measure.Sample(found, joint)
        if not isinstance(seen.lr, Tensor):
            self.rates = [self.rates[0] if self.rates else seen.lr, seen.lr]

    def made(self, ok: Tensor | None) -> None:
        """The step was made.

        Args:
            ok: bool 0-dim: whether it was, as the device knows; None: it was.
        """
        sample = self._pending
        self.drop()
        if sample is not None:
            stack = torch.stack([sample.matrices[name] for name in self.options.quantities])
            parts = [stack] if sample.groups is None else [stack, sample.groups]
            if ok is not None:
                parts = [torch.where(ok.to(p.device), p, torch.nan) for p in parts]
            if not self._tallies:
                self._tallies = [Tally(tuple(p.shape), p.device) for p in parts]
            for tally, part in zip(self._tallies, parts, strict=True):
                tally.add(part)
            self._last = self.steps
            self._steps += 1
            self.measured += 1
        self.steps += 1

    def drop(self) -> None:
        """The step was not made: what it measured is forgotten."""
        self._pending = self._seen = None

    def settle_tasks(self, names: Sequence[TaskName]) -> list[TaskName]:
        """The tasks in the order in which they are kept, the first one seen.

        Raises:
            ValueError: they are not those of before, or do not hold those of ``groups``.
        """
        if self.tasks is None:
            known = set(names)
            for group in self.options.groups:
                for name in group:
                    if name not in known:
                        raise ValueError(
                            f"groups must hold tasks out of {list(names)}, got {name!r}"
                        )
            self.tasks = list(names)
        elif set(names) != set(self.tasks):
            raise ValueError(
                f"losses must be of the tasks {self.tasks}, as before (None for one that is missing from "
                f"the batch), got {list(names)}"
            )
        return self.tasks

    def check_all_seen(self, present: set[TaskName]) -> None:
        """What to make of a batch at which no parameter is known to be shared: it is not measured.

        Raises:
            ValueError: there is no hope, as every task has been seen by now.
        """
        assert self.tasks is not None
        self._met |= present
        if len(self._met) == len(self.tasks):
            raise ValueError(
                "shared must hold a trainable parameter that at least two tasks reach, got none: no task's "
                "step can touch another"
            )

    def _members_in(
        self, names: list[TaskName], device: torch.device
    ) -> list[tuple[list[int], Tensor]]:
        """The groups' members among tasks in this order. Made once: a copy waits for a device."""
        if self._members[0] != names:
            found = []
            for group in self.options.groups:
                positions = [names.index(name) for name in group]
                ones = torch.zeros(len(names), dtype=torch.float64)
                ones[positions] = 1.0
                found.append((positions, ones.to(device)))
            self._members = (list(names), found)
        return self._members[1]

    def _there(self, present: set[int], tasks: int, device: torch.device) -> Tensor:
        """bool [T]: the tasks that have a loss. Made once for each set of them: a copy waits for a device."""
        key = frozenset(present)
        if key not in self._masks:
            self._masks[key] = torch.tensor([task in key for task in range(tasks)], device=device)
        return self._masks[key]

    def _rate(self, block: Block) -> float | Tensor:
        if self.options.lr is not None:
            return self.options.lr
        ids = {id(p) for p in block.params}
        found: list[Any] = [
            group.get("lr")
            for group in self._base.param_groups
            if any(id(p) in ids for p in group["params"])
        ]
        if any(rate is None for rate in found):
            raise ValueError("lr must be given where the optimizer's groups have none, got None")
        if any(rate is not found[0] and rate != found[0] for rate in found[1:]):
            raise ValueError(
                "lr must be given where the shared parameters' groups have different ones, got "
                f"{[float(rate) for rate in found]}"
            )
        rate = found[0]
        on_device = isinstance(rate, Tensor) and rate.device.type != "cpu"
        return rate if on_device else float(rate)

    def _step_of(self, block: Block) -> LookAhead:
        if self._way is None or self._way[0] is not block:
            plain = self.options.look_ahead == "sgd"
            way = PlainStep(block) if plain else OptimizerStep(block, self._base)
            self._way = (block, way)
        return self._way[1]

    def _momentum_products(self, block: Block, inverse: Tensor) -> Tensor:
        """float64 [T]: <g_j, mu * buffer>, the inner products with the momentum's part of a step."""
        factors = {
            id(p): group["momentum"] for group in self._base.param_groups for p in group["params"]
        }
        buffers = []
        for param in block.params:
            buffer = self._base.state.get(param, {}).get("momentum_buffer")
            buffers.append(None if buffer is None else buffer * factors[id(param)])
        push = block.empty()
        block.pack(push, buffers)
        rows = block.jac
        if rows.dtype == push.dtype:
            return torch.mv(rows, push).double() * inverse
        return torch.stack([torch.dot(row.to(push.dtype), push) for row in rows]).double() * inverse

    # ------------------------------------------------------------ what it found

    def end_epoch(self) -> None:
        """What is measured from now on is kept apart. Reads the device."""
        self._epochs.append((self._steps, [tally.read() for tally in self._tallies]))
        self._tallies, self._steps = [], 0

    def epochs(self) -> list[tuple[int, list[Tensor]]]:
        """Of each epoch how many steps were measured, and what ``Tally.read`` gives. Reads the device."""
        if self._epochs and not self._steps:
            return list(self._epochs)
        return [*self._epochs, (self._steps, [tally.read() for tally in self._tallies])]

    @property
    def _kind(self) -> dict[str, Any]:
        """What must be the same for measurements to go on."""
        options = self.options
        return {
            "mode": options.mode,
            "look_ahead": options.look_ahead,
            "quantities": options.quantities,
            "groups": [list(group) for group in options.groups],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on measuring: tensors and plain values."""
        return {
            "kind": self._kind,
            "steps": self.steps,
            "measured": self.measured,
            "last": self._last,
            "tasks": self.tasks,
            "rates": list(self.rates),
            "epoch": (self._steps, [tally.read() for tally in self._tallies]),
            "epochs": [(steps, [part.clone() for part in parts]) for steps, parts in self._epochs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave, of a probe with the same arguments.

        Raises:
            ValueError: the probe that it is from measured other things.
        """
        if state.get("kind") != self._kind:
            raise ValueError(
                f"state must be of a probe of the same kind, {self._kind}, got {state.get('kind')}"
            )
        steps, parts = state["epoch"]
        names = state["tasks"]
        old, self.tasks = self.tasks, None
        if names is not None:
            try:
                self.settle_tasks(names)
            except ValueError:
                self.tasks = old
                raise
        self.steps, self.measured = int(state["steps"]), int(state["measured"])
        self._last, self.rates = int(state["last"]), list(state["rates"])
        self._epochs = [(n, [part.clone() for part in kept]) for n, kept in state["epochs"]]
        self._steps = int(steps)
        device = self._base.param_groups[0]["params"][0].device
        self._tallies = [Tally(tuple(part.shape[1:]), device) for part in parts]
        for tally, part in zip(self._tallies, parts, strict=True):
            tally.load(part)
        self.drop()


def _rows(matrix: Tensor, order: list[int]) -> Tensor:
    """The rows in another order, without an index tensor, whose copy waits for a device."""
    return torch.stack([matrix[k] for k in order])
