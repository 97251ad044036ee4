"""What a group may be, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isfinite, lcm
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from flatmtl.grouping.names import Tasks, mask, members
from flatmtl.grouping.scores import Group
from flatmtl.losses import TaskName

Costs: TypeAlias = Sequence[float] | Mapping[Group, float] | Callable[[tuple[TaskName, ...]], float]
CALLED_AT_MOST = 16  # tasks, with a callable: 2^16 calls


@dataclass(frozen=True)
class Rules:
    """Sets that stay together and sets that stay apart, by places.

    Attributes:
        together: blocks of tasks of which a group holds all or none; every task is in one block.
        apart: pairs of blocks of which a group holds at most one.
    """

    together: list[tuple[int, ...]]
    apart: set[tuple[int, int]]

    @property
    def any(self) -> bool:
        """Whether there is any rule."""
        return bool(self.apart) or any(len(block) > 1 for block in self.together)

    def allow(self, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these groups, as masks [C], keep the rules."""
        allowed = np.full(groups.shape, True)
        for block in self.together:
            if len(block) > 1:
                bits = mask(block)
                inside = groups & bits
                allowed &= (inside == 0) | (inside == bits)
        for a, b in self.apart:
            first, second = mask(self.together[a]), mask(self.together[b])
            allowed &= ((groups & first) == 0) | ((groups & second) == 0)
        return allowed


def read_rules(must: Iterable[Group], must_not: Iterable[Group], tasks: Tasks) -> Rules:
    """``must`` and ``must_not``, checked against each other."""
    block = list(range(len(tasks)))  # each task's block, named by its first task
    for group in _sets(must, "must"):
        found = {block[t] for t in tasks.indices(group, "must")}
        block = [min(found) if b in found else b for b in block]
    firsts = sorted(set(block))
    together = [tuple(t for t, b in enumerate(block) if b == first) for first in firsts]
    apart = set()
    for group in _sets(must_not, "must_not"):
        indices = tasks.indices(group, "must_not")
        for i, t in enumerate(indices):
            for u in indices[i + 1 :]:
                if block[t] == block[u]:
                    raise ValueError(
                        f"must and must_not contradict each other: {tasks.names[t]!r} and "
                        f"{tasks.names[u]!r} must share every group and may share none; drop one"
                    )
                a, b = sorted((firsts.index(block[t]), firsts.index(block[u])))
                apart.add((a, b))
    return Rules(together, apart)


def _sets(groups: Iterable[Group], name: str) -> Iterable[Group]:
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise ValueError(f"{name} must be a sequence of sets of tasks, got {groups!r}")
    return groups


class Prices:
    """What each group costs."""

    def __init__(self, costs: Costs | None, tasks: Tasks) -> None:
        self._tasks = tasks
        self.by_size: list[float] | None = None
        self._special: dict[tuple[int, ...], float] = {}
        self._call: Callable[[tuple[TaskName, ...]], float] | None = None
        if costs is None:
            self.by_size = [1.0] * len(tasks)
        elif isinstance(costs, Mapping):
            for group, cost in costs.items():
                self._special[tasks.indices(group, "costs")] = _cost(cost, group)
        elif callable(costs):
            if len(tasks) > CALLED_AT_MOST:
                raise ValueError(
                    f"costs may be a function for at most {CALLED_AT_MOST} tasks, got {len(tasks)}: "
                    "give a sequence by group size, or a mapping"
                )
            self._call = costs
        else:
            by_size = [_cost(c, f"size {m}") for m, c in enumerate(costs, 1)]
            if len(by_size) != len(tasks):
                raise ValueError(
                    f"costs must have an entry for each group size 1 to {len(tasks)}, "
                    f"got {len(by_size)}"
                )
            self.by_size = by_size

    def of(self, group: tuple[int, ...]) -> float:
        """The cost of one group."""
        if self.by_size is not None:
            return self.by_size[len(group) - 1]
        if self._call is not None:
            named = self._tasks.group(group)
            return _cost(self._call(named), named)
        return self._special.get(group, 1.0)

    def of_all(self) -> npt.NDArray[np.float64]:
        """[2^T] the cost of every group, by its mask; 0 for the empty one."""
        costs = np.ones(1 << len(self._tasks))
        costs[0] = 0
        if self._call is not None:
            for bits in range(1, len(costs)):
                costs[bits] = self.of(members(bits))
        elif self.by_size is not None:
            costs[1:] = np.asarray(self.by_size)[sizes_of(len(self._tasks))[1:] - 1]
        for group, cost in self._special.items():
            costs[mask(group)] = cost
        return costs


def sizes_of(tasks: int) -> npt.NDArray[np.int64]:
    """[2^T] the number of members of every group, by its mask."""
    sizes = np.zeros(1, dtype=np.int64)
    for _ in range(tasks):
        sizes = np.concatenate([sizes, sizes + 1])
    return sizes


def _cost(cost: float, group: object) -> float:
    value = float(cost)
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"costs must be finite and not negative, got {cost!r} for {group!r}")
    return value


def units_of(costs: Iterable[float], budget: float) -> tuple[dict[float, int], int]:
    """Costs as whole numbers of their largest common step, and how many the budget pays.

    Raises:
        ValueError: where there is no common step with a denominator of at most 10 000.
    """
    fractions = {}
    for cost in sorted(set(costs)):
        near = Fraction(cost).limit_denominator(10_000)
        if abs(float(near) - cost) > 1e-9 * max(1.0, abs(cost)):
            raise ValueError(f"costs must be multiples of a common step such as 0.5, got {cost!r}")
        fractions[cost] = near
    denominator = lcm(*(f.denominator for f in fractions.values()))
    step = Fraction(gcd(*(int(f * denominator) for f in fractions.values())), denominator)
    if step == 0:  # all are free
        return dict.fromkeys(fractions, 0), 0
    units = {cost: int(f / step) for cost, f in fractions.items()}
    return units, int(budget / float(step) + 1e-6)
