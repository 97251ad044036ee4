"""A step's own time: what is left of it without forward passes, backward passes and the update.

Outside of a step's own work lies what runs inside the closure, inside ``torch.autograd`` and inside the
base optimizer's ``step``; ``outside`` marks these, and ``OwnTime`` measures them (CPU: wall clock).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
OUTSIDE = (FORWARD, BACKWARD, UPDATE)
Around = Callable[[str], AbstractContextManager[object]]
Closure = Callable[..., Any]


def marked(function: Callable[..., Any], name: str, around: Around) -> Callable[..., Any]:
    """``function``, every call of it within ``around(name)``."""

    @functools.wraps(function)  # its signature too: flatmtl looks for tasks=
    def call(*args: Any, **kwargs: Any) -> Any:
        with around(name):
            return function(*args, **kwargs)

    return call


@contextmanager
def outside(
    base: torch.optim.Optimizer, closure: Closure, around: Around
) -> Iterator[Callable[..., Any]]:
    """Yields the closure with its calls marked; autograd's and ``base.step``'s are, while it is open."""
    autograd = torch.autograd
    with (
        mock.patch.object(autograd, "grad", marked(autograd.grad, BACKWARD, around)),
        mock.patch.object(autograd, "backward", marked(autograd.backward, BACKWARD, around)),
        mock.patch.object(base, "step", marked(base.step, UPDATE, around)),
    ):
        yield marked(closure, FORWARD, around)


@dataclass
class Split:
    """Where one step's time went.

    Attributes:
        total: seconds of the step.
        seconds: "forward", "backward", "update" -> seconds in there.
        calls: how many of each.
    """

    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OUTSIDE, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTSIDE, 0))

    @property
    def own(self) -> float:
        """Seconds outside of all passes and of the update."""
        return self.total - sum(self.seconds.values())


class OwnTime:
    """Measures steps: ``OwnTime(base, closure).measure(lambda closure: optimizer.step(closure))``."""

    def __init__(self, base: torch.optim.Optimizer, closure: Closure) -> None:
        self._base, self._closure = base, closure
        self._split = Split()
        self._inside = False

    @contextmanager
    def _around(self, name: str) -> Iterator[None]:
        if self._inside:  # autograd within the closure, say: counted as the outer one
            yield
            return
        self._inside = True
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self._split.seconds[name] += (time.perf_counter_ns() - begin) / 1e9
            self._split.calls[name] += 1
            self._inside = False

    def measure(self, step: Callable[[Closure], object]) -> Split:
        """One step, with the closure it must use."""
        self._split = Split()
        with outside(self._base, self._closure, self._around) as closure:
            begin = time.perf_counter_ns()
            step(closure)
            self._split.total = (time.perf_counter_ns() - begin) / 1e9
        return self._split
