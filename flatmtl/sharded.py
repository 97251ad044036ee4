"""Rows of which every rank keeps a part: its columns of the Jacobian, and of the tasks' own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl.block import ALIGNMENT, Block
from flatmtl.messages import kind_of

_ops = torch.ops.flatmtl


@dataclass
class Part:
    """This rank's columns of a block.

    Attributes:
        rows: gives those of the rows of "jac" or "sam", whose buffer is made when it is asked for.
        update: [p], a view of the block's update.
        size: p.
    """

    rows: Callable[[str], Tensor]
    update: Tensor
    size: int

    @property
    def jac(self) -> Tensor:
        """[rows, p], gradients at the parameters, averaged over the ranks."""
        return self.rows("jac")

    @property
    def sam(self) -> Tensor:
        """[rows, p], the same at the perturbed parameters."""
        return self.rows("sam")


@dataclass(frozen=True)
class _Piece:
    """A stretch of a gradient that one rank gets: a parameter may lie across the border of two."""

    own: bool  # of the task's own parameters
    k: int
    start: int
    stop: int
    offset: int  # in the message


class ShardedRows:
    """Where rows go that are reduce-scattered: a message is [n, c], a chunk of c elements for every rank.

    A chunk holds p columns of the shared row, a tail (as in ``Messages``) and o columns of the task's own.

    Args:
        shared: the shared block, its size a multiple of n cache lines; None if nothing is shared.
        own: task -> the block of its own parameters, of such sizes too.
        tasks: how many there are.
        ranks: n.
        rank: which of them this is.
    """

    def __init__(
        self, shared: Block | None, own: Mapping[int, Block], tasks: int, ranks: int, rank: int
    ) -> None:
        self.dtype, self.device = kind_of([*([] if shared is None else [shared]), *own.values()])
        self.tail = ALIGNMENT // self.dtype.itemsize
        self._shared, self._own = shared, dict(own)
        self.tasks, self._ranks, self._rank = tasks, ranks, rank
        self._columns = 0 if shared is None else shared.size // ranks
        self._behind = self._columns + self.tail
        self._own_columns = {task: block.size // ranks for task, block in own.items()}
        self._width = self._behind + max(self._own_columns.values(), default=0)
        self._buffers: dict[str, Tensor] = {}
        self._pieces: dict[int, list[_Piece]] = {}
        self._outgoing: list[Tensor] = []

    def length(self, task: int) -> int:
        """c, the elements that one rank gets of a task's message."""
        return self._behind + self._own_columns.get(task, 0)

    def _family(self, name: str) -> Tensor:
        """[T, width]."""
        if name not in self._buffers:
            shape = (self.tasks, self._width)
            self._buffers[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._buffers[name]

    def message(self, name: str, task: int) -> Tensor:
        """[c], what this rank gets of a task's row."""
        return self._family(name)[task, : self.length(task)]

    def tails(self, name: str) -> Tensor:
        """[T, tail], of what this rank got."""
        return self._family(name)[:, self._columns : self._behind]

    def shared(self) -> Part | None:
        """This rank's columns of the shared block."""
        if self._shared is None:
            return None
        p, start = self._columns, self._columns * self._rank
        return Part(
            lambda name: self._family(name)[:, :p], self._shared.update[start : start + p], p
        )

    def own(self, task: int) -> Part:
        """This rank's columns of a task's own parameters."""
        o = self._own_columns[task]
        rows = slice(task, task + 1)
        columns = slice(self._behind, self._behind + o)
        start = o * self._rank
        return Part(
            lambda name: self._family(name)[rows, columns],
            self._own[task].update[start : start + o],
            o,
        )

    # ------------------------------------------------------------ whole rows, on their way

    def outgoing(self, task: int, number: int) -> Tensor:
        """[n c], one of two buffers in turn, for the message of a task."""
        length = self._ranks * self.length(task)
        while len(self._outgoing) < 2:
            size = self._ranks * self._width
            self._outgoing.append(torch.empty(size, dtype=self.dtype, device=self.device))
        return self._outgoing[number % 2][:length]

    def tails_of(self, message: Tensor, task: int) -> Tensor:
        """[n, tail], of a message that goes out."""
        return message.view(self._ranks, self.length(task))[:, self._columns : self._behind]

    def pack(
        self,
        message: Tensor,
        task: int,
        shared: Sequence[Tensor | None],
        own: Sequence[Tensor | None],
    ) -> None:
        """``message`` [n c] <- the gradients of the blocks' parameters (None: zero); tails are zero."""
        flat, offsets = [], []
        laid: dict[tuple[bool, int], Tensor] = {}
        for piece in self._pieces_of(task):
            grad = (own if piece.own else shared)[piece.k]
            if grad is None:
                continue
            key = (piece.own, piece.k)
            if key not in laid:
                block = self._own[task] if piece.own else self._shared
                assert block is not None
                laid[key] = block.flat(grad, piece.k)
            flat.append(laid[key][piece.start : piece.stop])
            offsets.append(piece.offset)
        _ops.pack_row_.default(message, flat, offsets, False)

    def _pieces_of(self, task: int) -> list[_Piece]:
        """The stretches of all gradients, in the order in which they lie in the message."""
        if task not in self._pieces:
            c = self.length(task)
            found: list[_Piece] = []
            blocks = [(False, self._shared, self._columns, 0)]
            blocks.append((True, self._own.get(task), self._own_columns.get(task, 0), self._behind))
            for own, block, columns, begin in blocks:
                for k, param in enumerate([] if block is None else block.params):
                    assert block is not None
                    at, end = block.offsets[k], block.offsets[k] + param.numel()
                    while at < end:
                        rank, column = divmod(at, columns)
                        stop = min(end, (rank + 1) * columns)
                        start = at - block.offsets[k]
                        offset = rank * c + begin + column
                        found.append(_Piece(own, k, start, start + stop - at, offset))
                        at = stop
            self._pieces[task] = sorted(found, key=lambda piece: piece.offset)
        return self._pieces[task]

    def whole(self, gathered: Tensor, task: int) -> tuple[Tensor | None, Tensor | None]:
        """The shared row [P] and the own one out of all ranks' parts [n c] of a task's row."""
        chunks = gathered.view(self._ranks, self.length(task))
        shared = own = None
        if self._shared is not None:
            shared = chunks[:, : self._columns].reshape(-1)
        if task in self._own:
            own = chunks[:, self._behind :].reshape(-1)
        return shared, own

    # ------------------------------------------------------------ updates

    def update_message(self) -> Tensor:
        """1-D, this rank's columns of all updates."""
        parts = [self.own(task) for task in sorted(self._own)]
        shared = self.shared()
        return torch.cat([p.update for p in ([] if shared is None else [shared]) + parts])

    def take_updates(self, gathered: Tensor) -> None:
        """The blocks' updates <- all ranks' columns, [n, ...]."""
        chunks = gathered.view(self._ranks, -1)
        at = 0
        blocks = [] if self._shared is None else [self._shared]
        for block in [*blocks, *(self._own[task] for task in sorted(self._own))]:
            columns = block.size // self._ranks
            block.update.view(self._ranks, columns).copy_(chunks[:, at : at + columns])
            at += columns
