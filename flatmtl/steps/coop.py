"""``coop_flat``: one task's sub-model, under noise on those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmtl import graph
from flatmtl.block import Block
from flatmtl.distributed.agree import agree_on_reach
from flatmtl.distributed.turn_step import TurnStep
from flatmtl.losses import TaskLosses, added_loss
from flatmtl.passes import Passes
from flatmtl.roles import Roles
from flatmtl.steps.away import away
from flatmtl.strategies import CoopFlat
from flatmtl.stream import Stream

if TYPE_CHECKING:
    from flatmtl.engine import Engine


def coop(engine: Engine, strategy: CoopFlat, passes: Passes, scale: Tensor | None) -> None:
    """The turn's task: its gradient, averaged over draws of noise on the other sub-models."""
    turn: _Turn | None = None
    link = engine.turn_step
    for roles, losses in engine.clean_passes(passes):
        if turn is None:
            _assign(roles, strategy.owners(roles.tasks))
            turn = _Turn(roles, strategy.turn(engine.steps, len(roles.tasks)), scale)
            engine.roles = roles
        if link is not None:
            _tell(link, roles, losses, turn.task)
        if turn.task in losses.present:
            turn.present = True
            if link is not None:
                turn.shares.append(link.shares[-1][turn.task])
            if not strategy.draws:
                turn.add(losses, turn.task)
    assert turn is not None
    roles, task = turn.roles, turn.task
    if link is not None:
        turn.present = task in link.present()
    if scale is not None and not turn.present:
        raise ValueError(
            f"losses must hold that of task {roles.tasks[task]!r}, whose turn it is, with a GradScaler, "
            "which cannot step without a gradient, got None"
        )
    after: list[Tensor | None] = [None] * len(roles.tasks)
    if turn.present and strategy.draws:
        stream = engine.directions
        assert stream is not None
        others = [block for owner, block in roles.own.items() if owner != task]
        for block in others:  # their .grad views the buffer that the noise goes to
            for param in block.params:
                param.grad = None

        def perturbed() -> None:
            for _ in range(strategy.draws):
                for block in others:
                    _shake(block, strategy.bound, stream, roles.params[0].device)
                for number, (losses, position) in enumerate(passes.again(roles.tasks, task)):
                    turn.add(losses, position, number)
                    after[task] = added_loss(after[task], losses.detached[position])
                    losses.outputs.clear()

        away(engine, passes, roles, perturbed)
        for block in turn.blocks:
            block.update.div_(strategy.draws)
        total = after[task]
        after[task] = None if total is None else total / strategy.draws
    if link is not None:
        turn.squares = link.reduce_turn(turn.blocks, here=bool(turn.shares))
        turn.reached = roles.of_turn[task] if turn.present else set()
    finite = roles.per_task({task: turn.square()}).isfinite()
    engine.check_finite(roles, finite, scale)
    if roles.shared is not None:
        engine.mask_shared(roles, finite)
    engine.write_grads(roles, turn.reached, {task}, finite)
    engine.record(roles, None, None, scale, after if strategy.draws else None)


class _Turn:
    """The gradient of one task, for its sub-model and the common parameters, into their ``update``."""

    def __init__(self, roles: Roles, task: int, scale: Tensor | None) -> None:
        self.roles, self.task, self.present = roles, task, False
        self.reached: set[int] = set()
        self._scale = scale
        parts = [(roles.shared, roles.shared_index)]
        parts.append((roles.own.get(task), roles.own_index.get(task, [])))
        self._parts = [(block, index) for block, index in parts if block is not None]
        self.squares: list[Tensor] = []
        #: of each micro-batch that has the task, 0-dim: the part of its loss in the mean over all processes
        self.shares: list[Tensor] = []

    @property
    def blocks(self) -> list[Block]:
        """Of the parameters that it is for."""
        return [block for block, _ in self._parts]

    def add(self, losses: TaskLosses, position: int, number: int = -1) -> None:
        """One backward pass; ``number``: of the micro-batch, among those that have the task."""
        params = [self.roles.params[k] for _, index in self._parts for k in index]
        seed = losses.seed(position, self._scale)
        if self.shares:
            seed = seed * self.shares[number].to(seed)
        grads = iter(losses.backward([position], params, [seed], retain_graph=False))
        squares = []
        for block, index in self._parts:
            chosen = [next(grads) for _ in index]
            for k, grad in zip(index, chosen, strict=True):
                if grad is not None:
                    self.roles.check_dense(k, grad)
                    self.reached.add(k)
            squares.append(block.pack(block.update, chosen, accumulate=bool(self.squares)))
        self.squares = squares

    def square(self) -> Tensor:
        """The squared norm of the sum, float64 0-dim."""
        zero = torch.zeros((), dtype=torch.float64, device=self.roles.params[0].device)
        return torch.stack([zero, *(sq.to(zero.device) for sq in self.squares)]).sum()


def _tell(link: TurnStep, roles: Roles, losses: TaskLosses, task: int) -> None:
    """The losses of a micro-batch over all processes, and at first what the task reaches."""
    if link.asks is not None:
        outputs = [losses.output(task)] if task in losses.present else []
        pairs = [(task, k) for hits in graph.reached(outputs, roles.params) for k in hits]
        _, pairs = agree_on_reach(link.asks, roles.tasks, losses.present, pairs)
        parts = {*roles.shared_index, *roles.own_index.get(task, [])}
        roles.of_turn.setdefault(task, set()).update({k for _, k in pairs} & parts)
        link.agreed(roles)
    link.average(roles, losses)


def _assign(roles: Roles, owners: dict[int, int]) -> None:
    """Lays the blocks out by sub-model: what none of them has is shared, whoever reaches it."""
    everyone = list(range(len(roles.tasks)))
    reach = [[owners[id(p)]] if id(p) in owners else everyone for p in roles.params]
    if roles.settled and roles.reach() == reach:
        return
    roles.name_shared(k for k, p in enumerate(roles.params) if id(p) not in owners)
    roles.take_reach(reach)


def _shake(block: Block, bound: float, stream: Stream, device: torch.device) -> None:
    """Parameters <- saved + U(-bound, bound), drawn on ``device``."""
    noise = block.update  # free: what has its turn is another block
    drawn = noise if noise.device == device else torch.empty_like(noise, device=device)
    drawn.uniform_(-bound, bound, generator=stream.on(device))
    if drawn is not noise:
        noise.copy_(drawn)
    block.move(noise, 1.0)
