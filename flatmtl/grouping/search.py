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
        bound=float(source.ceiling().mean()),
    )
