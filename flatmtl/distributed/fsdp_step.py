"""Steps with FSDP2: every process holds a part of the parameters, and of each row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.distributed.agree import agree_on_reach, gather_or_raise, present_in
from flatmtl.distributed.capture import RankedCapture
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.exchange import Exchange
from flatmtl.distributed.losses import Averaged
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.row_step import RowStep
from flatmtl.distributed.sharded_step import Second
from flatmtl.jacobian import Batched, Captured, hits
from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.roles import Gradients, Roles
from flatmtl.shards import is_sharded, runs_of
from flatmtl.weighted import WeightedBackward

NO_TASK = (
    "losses must hold at least one task on every rank where parameters are sharded, as each takes part in "
    "every pass, got only None on rank {rank}"
)
NOT_HERE = (
    "losses[{task!r}] must not be None on any rank where the task's own parameters are sharded: return a "
    "loss over nothing (head(z).sum() * 0) with samples=0 for it, or leave the heads out of fully_shard"
)
NOT_LIKE = (
    "losses[{task!r}] must not be None on a rank that has no other task through the same sharded "
    "parameters, as each rank takes part in every pass: return a loss over nothing with samples=0 for it"
)


class FSDPCapture(RankedCapture):
    """Rows whose sharded columns FSDP2 averages by itself, in every backward pass.

    A rank that lacks a task takes part with a seed of zero: what it holds of the mean comes to it too.
    """

    def __init__(
        self, roles: Roles, ranks: Ranks, batches: int, counts: Mapping[int, float]
    ) -> None:
        super().__init__(roles, ranks, batches, counts, None)
        self._held: dict[int, list[Tensor | None]] = {}  # as long as nobody knows where they go
        self._rows: set[int] = set()  # that have been written

    def _add(
        self, losses: TaskLosses, batched: Batched | None, scale: Tensor | None, retain_graph: bool
    ) -> None:
        roles = self.roles
        present = losses.present
        if not present:
            raise ValueError(NO_TASK.format(rank=self._ranks.rank))
        if not self._known and all(map(is_sharded, roles.params)):
            self._check_alike(present)
        others = {
            task: like(roles, task, present) if self._known else present[0]
            for task in range(len(roles.tasks))
            if task not in present
        }
        for task in range(len(roles.tasks)):
            keep = retain_graph or task < len(roles.tasks) - 1
            if task in present:
                seed = losses.seed(task, scale) * self._counts.get(task, 1.0)
                found: Gradients = losses.backward([task], roles.params, [seed], retain_graph=keep)
                self._check_reaches(losses, task, hits(found))
                self._packed.add(task)
            else:
                found = stand_in(losses, others[task], roles.params, scale, keep)
            if self._known:
                roles.note(task, found)
                self._pack_row(task, found)
            else:
                self._hold(task, found)

    def _check_alike(self, present: list[int]) -> None:
        """Raises ValueError on all ranks if they have different tasks, and none knows yet who reaches what.

        Where some parameters are replicated those may be the heads, and a task may be missing.
        """
        found = gather_or_raise(self._ranks, {"here": present})
        tasks = self.roles.tasks
        for rank, facts in enumerate(found):
            if facts["here"] != found[0]["here"]:
                here = [[tasks[t] for t in one["here"]] for one in (found[0], facts)]
                raise ValueError(
                    "losses must be of the same tasks on all ranks at the first step if all parameters are "
                    f"sharded, got {here[0]} on rank 0 and {here[1]} on rank {rank}"
                )

    def _hold(self, task: int, grads: Gradients) -> None:
        held = self._held.setdefault(task, [None] * len(grads))
        for k, grad in enumerate(grads):
            if grad is not None:
                old = held[k]
                held[k] = grad.clone() if old is None else old + grad

    def _pack_row(self, task: int, grads: Gradients) -> None:
        here = task in self._packed
        pack_part(self.roles, "jac", task, grads, here=here, accumulate=task in self._rows)
        self._rows.add(task)

    def settle(self) -> None:
        """As for whole rows."""
        roles = self.roles
        if self._known:
            return
        reached = [
            (task, k)
            for task, grads in self._held.items()
            if task in self._packed
            for k in hits(grads)
        ]
        if roles.note_all(*agree_on_reach(self._ranks, roles.tasks, self._packed, reached)):
            roles.settle()
        for task, grads in self._held.items():
            self._pack_row(task, grads)
        self._held = {}


def like(roles: Roles, task: int, present: Collection[int]) -> int:
    """One of these tasks that reaches the same sharded parameters: the same collectives go with it.

    Raises:
        ValueError: there is none.
    """
    if task in roles.own and any(map(is_sharded, roles.own[task].params)):
        raise ValueError(NOT_HERE.format(task=roles.tasks[task]))
    reaches = [
        reached for p, reached in zip(roles.params, roles.reach(), strict=True) if is_sharded(p)
    ]
    for other in sorted(present):
        if all((task in reached) == (other in reached) for reached in reaches):
            return other
    raise ValueError(NOT_LIKE.format(task=roles.tasks[task]))


def stand_in(
    losses: TaskLosses,
    other: int,
    params: Sequence[Tensor],
    scale: Tensor | None,
    retain_graph: bool,
) -> list[Tensor | None]:
    """What this rank holds of the gradients of a task that it lacks: by a backward pass times zero.

    ``other``: where the loss stands that goes back in its place. Replicated parameters have none.
    """
    seed = losses.seed(other, scale) * 0.0
    grads = losses.backward([other], params, [seed], retain_graph=retain_graph)
    return [g if is_sharded(p) else None for g, p in zip(grads, params, strict=True)]


def pack_part(
    roles: Roles, name: str, task: int, grads: Gradients, *, here: bool, accumulate: bool
) -> None:
    """The task's rows of a family <- gradients of all parameters in ``roles.params``.

    Raises:
        ValueError: the task is missing on this rank, and some of its own parameters are sharded: they
            would have needed this rank's part in their collectives.
    """
    if not here and task in roles.own and any(map(is_sharded, roles.own[task].params)):
        raise ValueError(NOT_HERE.format(task=roles.tasks[task]))
    if roles.shared is not None:
        block = roles.shared
        row = (block.jac if name == "jac" else block.sam)[task]
        block.pack(row, [grads[k] for k in roles.shared_index], accumulate=accumulate)
    if task in roles.own:
        block = roles.own[task]
        row = (block.jac if name == "jac" else block.sam)[0]
        block.pack(row, [grads[k] for k in roles.own_index[task]], accumulate=accumulate)


class FSDPStep(RowStep):
    """A row step with FSDP2; see ``RowStep`` and ``ShardedStep`` for the arguments."""

    def __init__(
        self,
        ranks: Ranks,
        roles: Roles | None,
        samples: Samples,
        losses: Callable[[], Sequence[Tensor | None]] | None,
        *,
        perturbed: bool,
        second: Second,
    ) -> None:
        self._second = second
        self._factors: Tensor | None = None  # float64 [T], from the rows as they came to means
        super().__init__(ranks, roles, samples, losses, perturbed=perturbed, local=False)

    def _open(self, roles: Roles) -> None:
        pass  # FSDP2 has an order of its own

    def _capture_of(
        self, roles: Roles, batches: int, counts: dict[int, float], exchange: Exchange | None
    ) -> RankedCapture:
        if batches > 1 and self._perturbed:
            raise ValueError(
                "losses must be of one micro-batch a step with sharpness where parameters are sharded, got "
                f"{batches}"
            )
        return FSDPCapture(roles, self._ranks, batches, counts)

    def rows(self) -> Captured:
        """This rank's part of the averaged rows."""
        capture = self.capture
        assert capture is not None
        capture.settle()
        roles = capture.roles
        counts = torch.stack(
            [torch.full_like(roles.per_task({})[0], n) for n in capture.all_counts()]
        )
        gram, _, own_sq, counts = self._together("jac", counts)
        self._factors = torch.where(counts > 0, self._ranks.size / counts, 0.0)
        present = present_in(counts)
        self._over = not self._perturbed
        shared_sq, own_sq = self._as_means("jac", gram, None, own_sq)
        if not self._perturbed:
            self._end()
        own = {task: own_sq[task] for task in roles.own if task in present}
        return Captured(shared_sq, own, roles.reached_by(present), present, capture.here)

    def perturbed_rows(self, captured: Captured) -> tuple[Captured, dict[int, list[Tensor]]]:
        """As for whole rows."""
        assert self.capture is not None
        roles = self.capture.roles
        gram, squares, own_sq, _ = self._together("sam", roles.per_task({}))
        flat = self._second == "flat"
        squares, own_sq = self._as_means("sam", gram, squares if flat else None, own_sq)
        self._end()
        norms = {task: [squares[task]] for task in captured.present}
        for task in roles.own:
            if task in captured.present:
                norms[task].append(own_sq[task])
        return captured, norms

    def _together(self, name: str, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the ranks: the Gram matrix, squared norms [T] of the rows, own ones, and counts."""
        assert self.capture is not None
        roles = self.capture.roles
        rows = [(block, block.jac if name == "jac" else block.sam) for block in roles.blocks]
        add_up_replicated(self._ranks, rows)
        tasks, zeros = len(roles.tasks), roles.per_task({})
        gram, squares = zeros.new_zeros(tasks, tasks), zeros
        block = roles.shared
        if block is not None:
            for part, sharded in runs_of(block):
                share = self._ranks.share(sharded)
                jac, sam = block.jac[:, part], block.sam[:, part] if name == "sam" else None
                if sam is None:
                    gram = gram + ops.gram(jac) * share
                elif self._second == "sam":
                    gram = gram + ops.gram(sam) * share
                else:
                    # the rows at the parameters are means already, and these are not yet
                    sam.mul_(self._scale_of(sam).unsqueeze(1))
                    gram = gram + ops.gram_difference(sam, jac) * share
                    squares = squares + ops.row_norms(sam).square() * share
        own = {
            task: square(self._ranks, b, (b.jac if name == "jac" else b.sam)[0])
            for task, b in roles.own.items()
        }
        message = torch.cat([gram.reshape(-1), squares, roles.per_task(own), counts])
        self._ranks.total(message)
        squares, own_sq, counts = message[tasks * tasks :].view(3, tasks).unbind()
        return message[: tasks * tasks].view(tasks, tasks), squares, own_sq, counts

    def _scale_of(self, rows: Tensor) -> Tensor:
        assert self._factors is not None
        return self._factors.to(rows)

    def _as_means(
        self, name: str, gram: Tensor, squares: Tensor | None, own_sq: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows, Gram matrix and squared norms as those of means; ``squares``: known, of means already."""
        assert self.capture is not None
        assert self._factors is not None
        roles, factors = self.capture.roles, self._factors
        done = name == "sam" and self._second == "flat"
        if roles.shared is not None and not done:
            rows = roles.shared.jac if name == "jac" else roles.shared.sam
            rows.mul_(self._scale_of(rows).unsqueeze(1))
            gram = gram * factors.unsqueeze(0) * factors.unsqueeze(1)
        for task, block in roles.own.items():
            row = (block.jac if name == "jac" else block.sam)[0]
            row.mul_(factors[task].to(row))
        self.grams["jac" if name == "jac" else self._second] = gram
        return gram.diag() if squares is None else squares, own_sq * factors.square()

    def taken(self, task: int) -> None:
        """Nothing is sent: FSDP2 has done it."""

    def adaptive_sq_norm(self, block: Block, row: Tensor, eta: float) -> Tensor:
        """As ``Block.adaptive_sq_norm``, over all ranks' columns."""
        total = torch.zeros((), dtype=torch.float64, device=block.device)
        for part, sharded in runs_of(block):
            share = self._ranks.share(sharded)
            total = total + block.adaptive_sq_norm(row, eta, part) * share
        return self._ranks.total(total)

    def take(
        self, passes: Passes, task: int, scale: Tensor | None, *, query: bool
    ) -> Tensor | None:
        """A task's rows at the perturbed parameters; with a seed of zero where this rank lacks it.

        Returns:
            The loss there; None where the rank lacks it.
        """
        capture = self.capture
        assert capture is not None
        roles, here = capture.roles, task in capture.here
        asked = task if here else like(roles, task, capture.here)
        after = None
        for losses, position in passes.again(roles.tasks, asked, query=query):
            if here:
                seed = losses.seed(position, scale) * capture.counts(task)
                found: Gradients = losses.backward(
                    [position], roles.params, [seed], retain_graph=False
                )
                after = losses.detached[position]
            else:
                found = stand_in(losses, position, roles.params, scale, False)
            pack_part(roles, "sam", task, found, here=here, accumulate=False)
            losses.outputs.clear()
        return after

    def fail(self, failure: Exception) -> None:
        """The others are inside FSDP2's collectives: they find the text when those fail."""
        if not self._over and not self._ranks.broken:
            self._ranks.tell(failure)


class FSDPOneRowStep(OneRowStep):
    """A step with one row with FSDP2, which averages the sharded columns by itself."""

    def average(self, roles: Roles, losses: TaskLosses) -> Averaged:
        """As for whole rows; the shares are n times as large, as FSDP2 divides by n."""
        if not losses.present:
            raise ValueError(NO_TASK.format(rank=self._ranks.rank))
        for task, block in roles.own.items():
            if task not in losses.present and any(map(is_sharded, block.params)):
                raise ValueError(NOT_HERE.format(task=roles.tasks[task]))
        found = super().average(roles, losses)
        self._check_reach(roles, losses, found.counts)
        return Averaged(found.values, found.shares * self._ranks.size, found.counts)

    @property
    def idle(self) -> frozenset[int]:
        """None: a task that is left out of a pass would be missing in FSDP2's collectives."""
        return frozenset()

    @staticmethod
    def _check_reach(roles: Roles, losses: TaskLosses, counts: Tensor) -> None:
        """Raises ValueError if other ranks' tasks reach sharded parameters that none of this rank's does."""
        made = counts > 0
        for task in range(len(roles.tasks)):
            if task in losses.present or (made.device.type == "cpu" and not made[task]):
                continue
            for param, reached in zip(roles.params, roles.reach(), strict=True):
                if (
                    is_sharded(param)
                    and task in reached
                    and not set(reached).intersection(losses.present)
                ):
                    raise ValueError(NOT_LIKE.format(task=roles.tasks[task]))

    def reduce(
        self,
        backward: WeightedBackward,
        rows: Sequence[Tensor | None],
        *,
        perturbed: bool = False,
        without: Collection[int] = (),
    ) -> None:
        """As for whole rows, of this rank's columns."""
        roles = backward.roles
        (shared,) = rows
        pairs = [] if roles.shared is None or shared is None else [(roles.shared, shared)]
        for task, block in sorted(roles.own.items()):
            row = block.jac[0]
            if task not in backward.own_sq:
                row.zero_()
            pairs.append((block, row))
        add_up_replicated(self._ranks, [(block, row.unsqueeze(0)) for block, row in pairs])
        squares = torch.stack([square(self._ranks, block, row) for block, row in pairs])
        self._ranks.total(squares)
        self._over = True
        present = self.present().difference(without)
        found = list(squares.unbind())
        if shared is not None:
            backward.shared_sq = found.pop(0)
        backward.own_sq = {
            task: sq for task, sq in zip(sorted(roles.own), found, strict=True) if task in present
        }
        backward.present, backward.reached = present, roles.reached_by(present)

    def fail(self, failure: Exception) -> None:
        """As for rows of all tasks."""
        if not self._over and not self._ranks.broken:
            self._ranks.tell(failure)


def add_up_replicated(ranks: Ranks, pairs: Sequence[tuple[Block, Tensor]]) -> None:
    """Columns of replicated parameters <- 1/n of their sum over the ranks, as FSDP2's own ones are.

    ``pairs``: blocks, and rows [k, P] of them.
    """
    found = [
        rows[:, part] for block, rows in pairs for part, sharded in runs_of(block) if not sharded
    ]
    if not found:
        return
    message = torch.cat([rows.reshape(-1) for rows in found]).div_(ranks.size)
    ranks.total(message)
    for rows, part in zip(found, message.split([r.numel() for r in found]), strict=True):
        rows.copy_(part.view(rows.shape))


def square(ranks: Ranks, block: Block, row: Tensor) -> Tensor:
    """This rank's summand of the squared norm of a block's row [P], float64 0-dim."""
    total = torch.zeros((), dtype=torch.float64, device=block.device)
    for part, sharded in runs_of(block):
        share = ranks.share(sharded)
        total = total + ops.row_norms(row[part].unsqueeze(0))[0].square() * share
    return total
