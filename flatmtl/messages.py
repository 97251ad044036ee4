"""Rows of gradients that lie so that one message carries all of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from flatmtl.block import ALIGNMENT, Block


def kind_of(blocks: Sequence[Block]) -> tuple[torch.dtype, torch.device]:
    """The one dtype of all blocks' rows, and their one device.

    Raises:
        ValueError: they are of several.
    """
    first = blocks[0]
    for block in blocks:
        if block.row_dtype != first.row_dtype or block.device != first.device:
            raise ValueError(
                "params must be of one dtype and on one device where several processes train, got "
                f"{first.row_dtype} on {first.device} and {block.row_dtype} on {block.device}"
            )
    return first.row_dtype, first.device


class Messages:
    """Buffers [T, width] in which a task's shared row, a tail and its own row lie side by side.

    The blocks' ``jac`` and ``sam`` are views of them. The tail holds what the ranks must know of each
    other (``Exchange``).

    Args:
        shared: the shared block; None if nothing is shared.
        own: task -> the block of its own parameters.
        tasks: how many there are.
        both: the shared block's two families of rows are one matrix.

    Raises:
        ValueError: the parameters are of several dtypes or devices.
    """

    def __init__(
        self, shared: Block | None, own: Mapping[int, Block], tasks: int, *, both: bool
    ) -> None:
        self.dtype, self.device = kind_of([*([] if shared is None else [shared]), *own.values()])
        self.tail = ALIGNMENT // self.dtype.itemsize
        self.tasks, self._both = tasks, both
        self._start = 0 if shared is None else shared.size
        self._behind = self._start + self.tail
        self._own = {task: block.size for task, block in own.items()}
        self.width = self._behind + max(self._own.values(), default=0)
        self._buffers: dict[str, Tensor] = {}
        if shared is not None:
            shared.lend(lambda name: self._rows(name)[:, : self._start])
        for task, block in own.items():
            block.lend(partial(self._own_row, task, block.size))

    def _rows(self, name: str) -> Tensor:
        """The buffer [T, width], or [2 T, width] for "both"."""
        if name not in self._buffers:
            rows = 2 * self.tasks if name == "both" else self.tasks
            shape = (rows, self.width)
            self._buffers[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._buffers[name]

    def family(self, name: str) -> Tensor:
        """[T, width], the buffer of "jac" or "sam", as halves of "both" where that is in use."""
        if self._both:
            both = self._rows("both")
            return both[: self.tasks] if name == "jac" else both[self.tasks :]
        return self._rows(name)

    def _own_row(self, task: int, size: int, name: str) -> Tensor:
        return self.family(name)[task : task + 1, self._behind : self._behind + size]

    def message(self, name: str, task: int) -> Tensor:
        """1-D: a task's shared row, tail and own row."""
        return self.family(name)[task, : self._behind + self._own.get(task, 0)]

    def tails(self, name: str) -> Tensor:
        """[T, tail]."""
        return self.family(name)[:, self._start : self._behind]
