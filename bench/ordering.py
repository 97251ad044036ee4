"""CPU times and results of ``order_tasks`` on one core: python -m bench.ordering."""

from __future__ import annotations

import time

import numpy as np

from flatmtl.curriculum import TaskOrder, from_embeddings, order_tasks

EXACT = (8, 12, 15, 18, 20, 22)
ANNEALED = (8, 12, 15, 18, 20, 22, 50, 200, 617)
DIMENSION = 16
SEED = 0


def timed(matrix: np.ndarray, exact: bool) -> tuple[float, TaskOrder]:
    """CPU seconds, which other work on the machine leaves alone, at best of some runs; the order."""
    seconds, found = np.inf, None
    for _ in range(5 if len(matrix) <= 50 else 2):
        start = time.process_time()
        found = order_tasks(matrix, exact=exact)
        seconds = min(seconds, time.process_time() - start)
    assert found is not None
    return seconds, found


def main() -> None:
    print("| tasks | search | seconds | similarity | nearest neighbour | bound |")
    print("|:---|:---|---:|---:|---:|---:|")
    for search, sizes in (("exact", EXACT), ("annealing", ANNEALED)):
        for n in sizes:
            means = np.random.default_rng([SEED, n]).normal(size=(n, DIMENSION))
            seconds, found = timed(from_embeddings(means), search == "exact")
            values = (found.similarity, found.nearest_neighbour, found.bound)
            numbers = " | ".join(f"{value:.3f}" for value in values)
            print(f"| {n} | {search} | {seconds:.4f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
