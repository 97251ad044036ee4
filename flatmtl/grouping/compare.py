"""Ways to group tasks, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flatmtl.grouping.baselines import cluster_groups, random_groups
from flatmtl.grouping.evaluate import evaluate_groups
from flatmtl.grouping.scores import Affinity, Floats, Group, Record, read_matrix
from flatmtl.grouping.select import select_groups
from flatmtl.losses import TaskName

METHODS = ("tag", "cosine", "clustering", "random")


@dataclass(frozen=True)
class ComparisonRow:
    """One method.

    Attributes:
        method: its name.
        groups: what it chose; None for several draws.
        objective: its value under the truth, the mean over draws.
        deviation: the standard deviation over draws; None for one grouping.
    """

    method: str
    groups: list[tuple[TaskName, ...]] | None
    objective: float
    deviation: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods under one measure.

    Attributes:
        rows: one a method, in the order asked for.
        best: the value of the best selection under that measure.
    """

    rows: list[ComparisonRow]
    best: float

    def __str__(self) -> str:
        """A table, one line a method."""
        width = max(len(row.method) for row in self.rows)
        lines = []
        for row in self.rows:
            value = f"{row.objective:.6g}"
            if row.deviation is not None:
                value += f" +- {row.deviation:.2g}"
            groups = " ".join(f"{{{', '.join(map(str, g))}}}" for g in row.groups or [])
            lines.append(f"{row.method:<{width}}  {value:<22}  {groups}".rstrip())
        return "\n".join([*lines, f"best possible {self.best:.6g}"])


def compare_groupings(
    record: Affinity,
    max_groups: int,
    *,
    truth: Affinity | None = None,
    methods: Sequence[str] = METHODS,
    groups: Mapping[str, Sequence[Group]] | None = None,
    objective: str = "tag",
    minimise: bool = False,
    allow_single: bool = False,
    partition: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> Comparison:
    """What groupings by several methods are worth under one measure.

    Args:
        record: an ``AffinityRecord``; or a matrix [T, T], which has no cosine.
        max_groups: most groups of each method.
        truth: what they are judged by: a matrix, or a table with objective="table", over the same tasks;
            the record's affinity by default.
        methods: out of "tag" (selection on the affinity), "cosine" (on the cosines), "clustering"
            (spectral, on the affinity; needs scikit-learn) and "random" (mean and deviation over draws).
        groups: further groupings, by name.
        objective: of the truth, as for ``select_groups``.
        minimise: whether the truth holds errors.
        allow_single: whether a task may be alone, in all methods.
        partition: whether selected and random groups must be disjoint.
        draws: number of random groupings.
        seed: of the random ones.

    Returns:
        A row for each method, and the best value possible under the truth.

    Raises:
        ValueError: an unknown method, or one that the record has no data for, or as ``select_groups``.
    """
    single = allow_single or (truth is None and objective == "hoa")
    names, affinity = read_matrix(record, None, diagonal=single)
    tasks = names.names
    measure = affinity if truth is None else truth
    if isinstance(measure, Record):
        measure = measure.matrix()

    def judged(name: str, chosen: Sequence[Group]) -> ComparisonRow:
        result = evaluate_groups(
            chosen,
            measure,
            objective=objective,
            minimise=minimise,
            allow_single=allow_single,
            tasks=tasks,
        )
        return ComparisonRow(name, result.groups, result.objective)

    def selected(matrix: Floats) -> list[tuple[TaskName, ...]]:
        return select_groups(
            matrix, max_groups, tasks=tasks, allow_single=allow_single, partition=partition
        ).groups

    rows = []
    for method in methods:
        if method == "tag":
            rows.append(judged(method, selected(affinity)))
        elif method == "cosine":
            if not isinstance(record, Record):
                raise ValueError("methods must leave out 'cosine' where record is a matrix")
            rows.append(judged(method, selected(record.matrix("cosine"))))
        elif method == "clustering":
            clusters = cluster_groups(affinity, max_groups, tasks=tasks, allow_single=allow_single)
            rows.append(judged(method, clusters))
        elif method == "random":
            rng = np.random.default_rng(seed)
            values = [
                judged(
                    method,
                    random_groups(
                        tasks,
                        max_groups,
                        seed=rng,
                        partition=partition,
                        allow_single=allow_single,
                    ),
                ).objective
                for _ in range(draws)
            ]
            rows.append(ComparisonRow(method, None, float(np.mean(values)), float(np.std(values))))
        else:
            raise ValueError(f"methods must be out of {', '.join(METHODS)}, got {method!r}")
    rows += [judged(name, chosen) for name, chosen in (groups or {}).items()]
    best = select_groups(
        measure,
        max_groups,
        objective=objective,
        minimise=minimise,
        allow_single=allow_single,
        partition=partition,
        tasks=tasks,
    )
    return Comparison(rows, best.objective)
