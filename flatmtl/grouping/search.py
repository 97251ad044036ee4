"""The declared heuristic: a multi-start local search, compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from flatmtl.grouping.names import mask
from flatmtl.grouping.result import Grouping, grouping, serve
from flatmtl.grouping.rules import Rules
from flatmtl.grouping.scores import MatrixScores

SEED = 0
WORK = 4e8  # steps of climbing in all; decides how many starts there are
STARTS = (2, 40)


def search(
    core: ModuleType,
    source: MatrixScores,
    max_groups: int,
    rules: Rules,
    *,
    partition: bool,
    progress: Callable[[float], None] | None,
) -> Grouping:
    """A good selection, the same one every time, and what none can exceed."""
    n = len(source.tasks)
    most = min(max_groups, n)
    apart = np.zeros((len(rules.together),) * 2, dtype=np.bool_)
    for a, b in rules.apart:
        apart[a, b] = apart[b, a] = True
    starts = int(np.clip(WORK / (most * 200.0 * n * n), *STARTS))
    sums, groups = core.select_by_search(
        source.sign * source.matrix,
        units=[list(block) for block in rules.together],
        conflicts=apart,
        max_groups=most,
        disjoint=partition,
        allow_single=source.single,
        seed=SEED,
        starts=starts,
        progress=progress,
    )
    if not groups:
        raise ValueError(
            f"heuristic=True found no selection of at most {max_groups} group(s) under these rules: "
            "raise max_groups, relax must, must_not, partition or allow_single, or, for up to about "
            "20 tasks, take the exact search"
        )
    masks = [mask(group) for group in groups]
    served = serve(source, masks)
    by_count: list[float | None] = [None if s == -np.inf else source.sign * s / n for s in sums]
    for k in range(len(served.candidates) - 1, most):  # fillers were dropped, sums were rounded
        by_count[k] = served.objective if by_count[k] is None else by_count[k]
    by_count[-1] = served.objective
    by_count += by_count[-1:] * (max_groups - most)
    return grouping(
        source,
        served,
        [1.0] * len(served.candidates),
        by_count=by_count,
        near_ties=[],
        exact=False,
        bound=source.sign * _ceiling(source, most) / n,
    )


def _ceiling(source: MatrixScores, max_groups: int) -> float:
    """No selection has a larger sum of scores, in the sign in which larger is better.

    A group that serves s tasks has at least s - 1 others for each, so a task's score is at most the mean
    of its s - 1 largest entries. The sum for a group is at most that of the s tasks with the largest
    means; the sizes s of at most ``max_groups`` groups add up to T, which a dynamic programme settles.
    """
    n = len(source.tasks)
    values = source.sign * source.matrix
    others = np.sort(np.where(np.eye(n, dtype=bool), -np.inf, values), axis=1)[:, ::-1][:, :-1]
    means = np.cumsum(others, axis=1) / np.arange(1, n)  # [T, T - 1], of the 1, 2, ... largest
    alone = means[:, :1] if n > 1 else np.full((1, 1), -np.inf)  # serves one task, with a helper
    if source.single:
        alone = np.maximum(alone, np.diagonal(values)[:, None])
    by_size = np.concatenate([alone, means], axis=1)  # [T, T], a group that serves 1, 2, ... tasks
    best = np.sort(by_size, axis=0)[::-1]
    gain = [best[:size, size - 1].sum() for size in range(1, n + 1)]
    reach = np.concatenate([[0.0], gain])  # [T + 1], by the number of tasks served
    for _ in range(1, max_groups):
        more = reach.copy()
        for size in range(1, n + 1):
            more[size:] = np.maximum(more[size:], gain[size - 1] + reach[: n + 1 - size])
        reach = more
    return float(reach[n])
