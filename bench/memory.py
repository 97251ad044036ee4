"""What a step keeps in memory: every allocation of torch's CPU allocator, as torch.profiler reports it.

An allocation belongs to a forward pass, a backward pass or the update if it happens in there
(``own_time.outside``), else it is the step's own. The data are there before and do not count, nor does the
model; where a step gives up one of the model's tensors for a new one, the new one counts as the model's.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.fs_mtl_steps import Entrant
from bench.own_time import BACKWARD, OUTSIDE, outside

_MARK, _STEP, _OWN, _MODEL = "bench::", "step", "own", "model"


@dataclass
class Footprint:
    """One step's.

    Attributes:
        own: bytes that the step's own allocations of this and earlier steps take at most at one time.
        kept: bytes of these that are left after the step.
        buffers: the most storages at one time that are as large as all shared parameters together; one
            n times as large counts as n.
        gradients: bytes that results of backward passes take at most, outside of the passes.
    """

    own: int
    kept: int
    buffers: int
    gradients: int


def _flat(tree: list[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _flat(event.children)


class _Ledger:
    """What is alive, by owner."""

    def __init__(self, large: int) -> None:
        self._large = large
        self._live: dict[int, tuple[int, str]] = {}
        self._model = 0  # all that was allocated for the model
        self.bytes: dict[str, int] = dict.fromkeys((_OWN, _MODEL, *OUTSIDE), 0)
        self.buffers = 0

    def enter(self, pointer: int, size: int, owner: str) -> None:
        """An allocation, or with a negative size the end of one."""
        if size >= 0:
            self._live[pointer] = (size, owner)
        else:
            _, owner = self._live.pop(pointer, (0, owner))
        self.bytes[owner] += size
        if owner == _OWN:
            self.buffers += (1 if size >= 0 else -1) * (abs(size) // self._large)

    def model_is_made(self) -> None:
        """From here on, what the model loses is taken off the step's own."""
        self._model = self.bytes[_MODEL]

    @property
    def own(self) -> int:
        """Bytes of the step's own."""
        return self.bytes[_OWN] - (self._model - self.bytes[_MODEL])


def footprints(make: Callable[[], Entrant], steps: int = 3) -> list[Footprint]:
    """The first steps of a new entrant; in the first one it makes its buffers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        with record_function(_MARK + _MODEL):
            entrant = make()
        for _ in range(steps):
            with record_function(_MARK + _STEP):
                step = entrant.step
                with outside(
                    entrant.base, entrant.losses, lambda name: record_function(_MARK + name)
                ) as closure:
                    step(closure)
    events = list(_flat(prof.profiler.kineto_results.experimental_event_tree()))
    found = [e for e in events if e.name.startswith(_MARK)]
    spans = [
        (e.start_time_ns, e.end_time_ns, e.name.removeprefix(_MARK))
        for e in sorted(found, key=lambda e: e.start_time_ns)
    ]
    changes = [
        (e.start_time_ns, e.typed[1].ptr, e.typed[1].alloc_size)
        for e in events
        if e.typed[0].name == "Allocation"
    ]
    large = sum(p.numel() * p.element_size() for p in entrant.network.trunk.parameters())
    return _replay(spans, sorted(changes), large)


def _replay(
    spans: list[tuple[int, int, str]], changes: list[tuple[int, int, int]], large: int
) -> list[Footprint]:
    marked = [span for span in spans if span[2] != _STEP]
    starts = [begin for begin, _, _ in marked]

    def owner(when: int) -> str:
        """The marked part at a time; nested ones do not occur."""
        at = bisect.bisect_right(starts, when) - 1
        return marked[at][2] if at >= 0 and when <= marked[at][1] else _OWN

    ledger, result, position = _Ledger(large), [], 0
    for begin, end, _ in (span for span in spans if span[2] == _STEP):
        step = Footprint(0, 0, 0, 0)
        while position < len(changes) and changes[position][0] <= end:
            when, pointer, size = changes[position]
            by = owner(when)
            if by == _OWN:  # before it, too: what the last backward pass has left
                step.gradients = max(step.gradients, ledger.bytes[BACKWARD])
            ledger.enter(pointer, size, by)
            position += 1
            if when < begin:  # the model, before the first step
                ledger.model_is_made()
                continue
            step.own = max(step.own, ledger.own)
            step.buffers = max(step.buffers, ledger.buffers)
        step.kept = ledger.own
        result.append(step)
    return result


def in_models(count: int, network: torch.nn.Module) -> float:
    """Bytes in units of the model's parameters."""
    return count / sum(p.numel() * p.element_size() for p in network.parameters())
