"""Times of ``select_groups`` on one core beside the published enumeration: python -m bench.grouping."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from flatmtl import select_groups

GROUPS = 4
SIZES = (9, 15, 18, 20)
ENUMERATED = ((7, 3), (8, 3))  # tasks, groups
SEED = 0


def enumerate_sets(matrix: list[list[float]], groups: int) -> float:
    """Every set of so many groups, as the notebook of TAG does it; a task alone counts -1e6."""
    n = len(matrix)
    rows = []
    for size in range(1, n + 1):
        for group in combinations(range(n), size):
            row = [-np.inf] * n
            for t in group:
                others = [matrix[t][j] for j in group if j != t]
                row[t] = sum(others) / len(others) if others else -1e6
            rows.append(row)
    best = -np.inf
    for chosen in combinations(rows, groups):
        best = max(best, sum(map(max, zip(*chosen, strict=True))))
    return best / n


def value_of(matrix: np.ndarray, groups: int, near_ties: int) -> float:
    return select_groups(matrix, groups, near_ties=near_ties).objective


def timed(run: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Best seconds of some runs, and the value."""
    seconds, value = np.inf, np.nan
    for _ in range(repeats):
        start = time.perf_counter()
        value = run()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, value


def peak(run: Callable[[], float]) -> float:
    """MiB by which the resident memory of this process grows at most (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    rng = np.random.default_rng(SEED)
    print("| tasks | groups | near-ties | seconds | peak MiB |\n|---|---|---|---|---|")
    for near in (0, 3):
        for n in SIZES:
            run = partial(value_of, rng.normal(size=(n, n)), GROUPS, near)
            memory = peak(run)
            seconds, _ = timed(run, 2 if n > 18 else 5)
            print(f"| {n} | {GROUPS} | {near} | {seconds:.4f} | {memory:.0f} |", flush=True)
    print("\n| tasks | groups | enumeration s | select_groups s |\n|---|---|---|---|")
    for n, groups in ENUMERATED:
        matrix = rng.normal(size=(n, n))
        slow, expected = timed(partial(enumerate_sets, matrix.tolist(), groups), 1)
        fast, value = timed(partial(value_of, matrix, groups, 0), 5)
        assert abs(value - expected) < 1e-12, (value, expected)
        print(f"| {n} | {groups} | {slow:.2f} | {fast:.5f} |", flush=True)


if __name__ == "__main__":
    main()
