"""Turns a device flag into an error without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatmtl.losses import TaskName


def _raise(finite: Tensor, tasks: Sequence[TaskName]) -> None:
    bad = [name for name, ok in zip(tasks, finite.tolist(), strict=True) if not ok]
    if bad:
        raise FloatingPointError(
            f"losses must have finite gradients: those of task(s) {bad} hold NaN or infinity; "
            "nonfinite='mask' leaves such tasks out of a step instead"
        )


class NonfiniteWatch:
    """Raises for tasks with non-finite gradients: at once on the CPU, at a later call on CUDA."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.cuda.Event, Tensor, list[TaskName]]] = []

    def post(self, finite: Tensor, tasks: Sequence[TaskName]) -> None:
        """Notes a step's flags, bool [T].

        Raises:
            FloatingPointError: a flag is false, and it lies on the CPU.
        """
        if finite.device.type != "cuda":
            _raise(finite, tasks)
            return
        if torch.cuda.is_current_stream_capturing():
            return  # a captured step has no host to raise on: the task is masked
        host = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((arrived, host, list(tasks)))

    def poll(self) -> None:
        """Looks at the flags that have arrived.

        Raises:
            FloatingPointError: one of them is false.
        """
        if not self._waiting or torch.cuda.is_current_stream_capturing():
            return
        while self._waiting and self._waiting[0][0].query():
            _, host, tasks = self._waiting.pop(0)
            _raise(host, tasks)
