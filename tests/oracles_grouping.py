"""Selections of groups in plain Python, written from the definitions: every set of candidates is tried."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations


def subsets(n: int, least: int = 1):
    """All groups of tasks 0..n-1."""
    for size in range(least, n + 1):
        yield from (frozenset(c) for c in combinations(range(n), size))


def score(matrix, task, group) -> float:
    others = [j for j in sorted(group) if j != task]
    if not others:
        return float(matrix[task][task])
    return sum(float(matrix[task][j]) for j in others) / len(others)


def candidates_of(matrix, single, must=(), must_not=(), cost=lambda group: 1.0):
    """(group, {task: score}, cost) of every allowed group."""
    found = []
    for group in subsets(len(matrix), 1 if single else 2):
        if any(0 < len(group & set(block)) < len(set(block)) for block in must):
            continue
        if any(len(group & set(block)) > 1 for block in must_not):
            continue
        found.append((group, {t: score(matrix, t, group) for t in group}, cost(group)))
    return found


class Brute:
    """Values of all selections of at most k candidates.

    best: the best sum of scores by number of groups (None: infeasible).
    selections: (value, indices) of all sets in which each candidate is strictly the best one for a task,
        best first.
    """

    def __init__(self, n, candidates, k, *, budget=None, partition=False, sign=1) -> None:
        self.best = []
        self.selections = []
        for count in range(1, k + 1):
            found = self.best[-1] if self.best else None
            for chosen in combinations(range(len(candidates)), count):
                groups = [candidates[c][0] for c in chosen]
                if partition and sum(map(len, groups)) != n:
                    continue
                if len(frozenset().union(*groups)) < n:
                    continue
                if budget is not None and sum(candidates[c][2] for c in chosen) > budget + 1e-9:
                    continue
                value, needed = self._judge(n, [candidates[c][1] for c in chosen], sign)
                if found is None or value > found:
                    found = value
                if needed:
                    self.selections.append((value, chosen))
            self.best.append(found)
        self.selections.sort(key=lambda pair: -pair[0])

    @staticmethod
    def _judge(n, scores, sign):
        total, needed = 0.0, set()
        for t in range(n):
            ranked = sorted(
                ((sign * s[t], c) for c, s in enumerate(scores) if t in s), reverse=True
            )
            total += ranked[0][0]
            if len(ranked) == 1 or ranked[0][0] > ranked[1][0] + 1e-11:
                needed.add(ranked[0][1])
        return total, len(needed) == len(scores)


def best_by_recursion(n, candidates, k) -> float:
    """The largest sum of scores with at most k groups, for more tasks: the lowest unserved task goes to
    some group that serves it and some others."""
    value: dict[frozenset, float] = {}
    for group, scores, _ in candidates:
        for served in (
            frozenset(s) for m in range(1, len(group) + 1) for s in combinations(group, m)
        ):
            total = sum(scores[t] for t in served)
            value[served] = max(total, value.get(served, -float("inf")))
    holding = [[s for s in value if min(s) == t] for t in range(n)]

    @lru_cache(None)
    def best(left, groups):
        if not left:
            return 0.0
        if groups == 0:
            return -float("inf")
        parts = (s for s in holding[min(left)] if s <= left)
        return max((value[s] + best(left - s, groups - 1) for s in parts), default=-float("inf"))

    return best(frozenset(range(n)), k)
