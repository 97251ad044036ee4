"""Acts on device flags without waiting for the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatmtl import cuda_graphs
from flatmtl.losses import TaskName

Act = Callable[[list[bool]], None]


def outside() -> int:
    """The stack level, for a caller's ``warnings.warn``, of the code that uses flatmtl."""
    frame, level = sys._getframe(1), 1
    inside = ("flatmtl.", "torch.")  # torch wraps step()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


class Watch:
    """Hands flags to the host: at once on the CPU, at a later call on CUDA.

    Args:
        together: several processes post the same flags, and must act on them at the same call of ``poll``:
            the second after, whenever they arrive.
    """

    def __init__(self, *, together: bool = False) -> None:
        self._together = together
        self._polls = 0
        # of each flag when it has arrived, its copy here, what to do, and the poll before it was posted
        self._waiting: list[tuple[torch.cuda.Event, Tensor, Act, int]] = []

    def post(self, flags: Tensor, act: Act) -> None:
        """Has ``act`` called with ``flags`` (bool [n]) as soon as they are known here.

        What it raises comes from this call on the CPU and from a later ``poll`` on CUDA.
        """
        if flags.device.type != "cuda":
            act(flags.tolist())
            return
        if cuda_graphs.capturing():
            return  # a captured step has no host to act on
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((arrived, host, act, self._polls))

    def poll(self) -> None:
        """Acts on the flags that have arrived."""
        self._polls += 1
        if not self._waiting or cuda_graphs.capturing():
            return
        while self._waiting and self._due(*self._waiting[0]):
            _, host, act, _ = self._waiting.pop(0)
            act(host.tolist())

    def _due(self, arrived: torch.cuda.Event, host: Tensor, act: Act, posted: int) -> bool:
        if not self._together:
            return arrived.query()
        if self._polls < posted + 2:
            return False
        arrived.synchronize()  # of the step before the last: it has most likely arrived
        return True


def raise_invalid_loss(method: str) -> Act:
    """An act on "every loss was one that the weighting can take".

    Raises:
        ValueError: (the act) the flag is false.
    """

    def act(sound: list[bool]) -> None:
        if not all(sound):
            raise ValueError(
                f"losses must be of the range that {method} takes (above 0; GradNorm: from 0 on), got one "
                "that is not; its task was left out"
            )

    return act


def raise_nonfinite(tasks: Sequence[TaskName]) -> Act:
    """An act on "task i's gradients are finite".

    Raises:
        FloatingPointError: (the act) a flag is false.
    """

    def act(finite: list[bool]) -> None:
        bad = [name for name, ok in zip(tasks, finite, strict=True) if not ok]
        if bad:
            raise FloatingPointError(
                f"losses must have finite gradients: those of task(s) {bad} hold NaN or infinity; "
                "nonfinite='mask' leaves such tasks out of a step instead, 'skip' the whole step"
            )

    return act
