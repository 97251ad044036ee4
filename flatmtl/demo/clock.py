"""Splits the time of an optimizer step into flatmtl's own code and everything else."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import ParamSpec, TypeVar
from unittest import mock

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StepClock:
    """Times whole steps, and within them the parts that any training would pay for.

    The time is the CPU time of the process: with one thread it is what the wall clock shows on a
    core of one's own, and other programs on the machine disturb it less.

    These parts are the closure (the forward passes), ``torch.autograd.grad`` (the backward passes)
    and the step of the base optimizer. Build the clock before the optimizer that wraps ``base``,
    and hand that optimizer closures that went through :meth:`outside`.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.whole: list[float] = []  # seconds of each step
        self.foreign: list[float] = []  # seconds of each step outside flatmtl's own code
        self._running = 0.0
        base.step = self.outside(base.step)  # type: ignore[method-assign, assignment]

    def outside(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """``function``, its time counted as not flatmtl's own."""

        @functools.wraps(function)  # keeps the signature: the optimizer looks for ``tasks``
        def timed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            begin = process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._running += process_time() - begin

        return timed

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one step of the optimizer."""
        self._running = 0.0
        timed = self.outside(torch.autograd.grad)  # type: ignore[arg-type]
        with mock.patch.object(torch.autograd, "grad", timed):
            begin = process_time()
            yield
            self.whole.append(process_time() - begin)
        self.foreign.append(self._running)
