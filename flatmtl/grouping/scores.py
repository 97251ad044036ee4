"""What a group scores: from an affinity matrix, or from a table of candidate groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from flatmtl.grouping.names import Tasks, members
from flatmtl.losses import TaskName

Group: TypeAlias = Sequence[TaskName] | frozenset[TaskName]
Table: TypeAlias = (
    Mapping[Group, Mapping[TaskName, float]]
    | Sequence[tuple[Group, Mapping[TaskName, float], float]]
)
Floats: TypeAlias = npt.NDArray[np.float64]


@runtime_checkable
class Record(Protocol):
    """What selection needs of an ``AffinityRecord``."""

    @property
    def tasks(self) -> Sequence[TaskName]:
        """The tasks' names."""

    def matrix(self, quantity: str = ...) -> Floats:
        """[T, T] means, row = recipient."""


Affinity: TypeAlias = Record | npt.ArrayLike | Table

OBJECTIVES = ("tag", "hoa", "table")


@dataclass(frozen=True)
class MatrixScores:
    """Task t in group G scores the mean of matrix[t, j] over the other j in G; alone, matrix[t, t].

    Attributes:
        tasks: the tasks.
        matrix: [T, T] float64, row = recipient, in the sign of the user.
        sign: 1 where larger is better, -1 where smaller is.
        single: whether a task may be alone.
    """

    tasks: Tasks
    matrix: Floats
    sign: int
    single: bool

    def group(self, candidate: int) -> tuple[int, ...]:
        """The tasks of a candidate, which is the mask of its tasks."""
        return members(candidate)

    def scores(self, candidate: int) -> dict[int, float]:
        """Each member's score, in the sign of the user."""
        group = members(candidate)
        if len(group) == 1:
            return {group[0]: float(self.matrix[group[0], group[0]])}
        return {t: float(np.mean([self.matrix[t, j] for j in group if j != t])) for t in group}

    def ceiling(self) -> Floats:
        """[T] what no group can give a task more than: a mean is at most its largest entry."""
        values = self.sign * self.matrix
        if not self.single:
            values = np.where(np.eye(len(values), dtype=bool), -np.inf, values)
        return self.sign * values.max(axis=1)


@dataclass(frozen=True)
class TableScores:
    """Scores given for each candidate group.

    Attributes:
        tasks: the tasks.
        groups: [C] the candidates' tasks, by their places.
        values: [C, T] float64, NaN for tasks that are no members, in the sign of the user.
        costs: [C], or None where the table has none.
        sign: 1 where larger is better, -1 where smaller is.
    """

    tasks: Tasks
    groups: list[tuple[int, ...]]
    values: Floats
    costs: list[float] | None
    sign: int

    def group(self, candidate: int) -> tuple[int, ...]:
        """The tasks of a candidate, which is its place in the table."""
        return self.groups[candidate]

    def scores(self, candidate: int) -> dict[int, float]:
        """Each member's score, in the sign of the user."""
        return {t: float(self.values[candidate, t]) for t in self.groups[candidate]}

    def ceiling(self) -> Floats:
        """[T] what no candidate can give a task more than."""
        values = np.where(np.isnan(self.values), -np.inf, self.sign * self.values)
        return self.sign * values.max(axis=0)


Scores: TypeAlias = MatrixScores | TableScores


def read_scores(
    affinity: Affinity,
    objective: str,
    *,
    minimise: bool,
    allow_single: bool,
    tasks: Sequence[TaskName] | None,
) -> Scores:
    """The scores behind an ``affinity`` argument, checked."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    sign = -1 if minimise else 1
    if objective == "table":
        return _read_table(affinity, tasks, sign)
    single = allow_single or objective == "hoa"
    names, matrix = read_matrix(affinity, tasks, diagonal=single)
    if len(names) == 1 and not single:
        raise ValueError(
            "affinity must be of at least 2 tasks, got 1: a group needs two, unless allow_single "
            "lets a task be alone with its diagonal entry"
        )
    return MatrixScores(names, matrix, sign, single)


def read_matrix(
    affinity: Affinity, tasks: Sequence[TaskName] | None, *, diagonal: bool
) -> tuple[Tasks, Floats]:
    """[T, T] float64 and its tasks; off the diagonal finite, and on it where ``diagonal``."""
    if isinstance(affinity, Record):
        if tasks is not None:
            raise ValueError("tasks must be None with a record, which names its own tasks")
        tasks, affinity = affinity.tasks, affinity.matrix()
    elif isinstance(affinity, Mapping):
        raise ValueError("affinity must be a matrix or a record; a mapping needs objective='table'")
    matrix = np.array(affinity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"affinity must be a square matrix [T, T], row = recipient, column = source; "
            f"got shape {list(matrix.shape)}"
        )
    names = Tasks(range(len(matrix)) if tasks is None else tasks)
    if len(names) != len(matrix):
        raise ValueError(
            f"tasks must name the {len(matrix)} tasks of the matrix, got {len(names)} names"
        )
    used = np.full(matrix.shape, True)
    if not diagonal:
        np.fill_diagonal(used, False)
        np.fill_diagonal(matrix, 0)
    bad = np.argwhere(used & ~np.isfinite(matrix))
    if len(bad):
        t, j = bad[0]
        more = f" ({len(bad)} such entries)" if len(bad) > 1 else ""
        raise ValueError(
            f"affinity must be finite, got {matrix[t, j]} at [{t}, {j}] (recipient "
            f"{names.names[t]!r}, source {names.names[j]!r}){more}: measure that pair (more steps, or "
            "batches that have both tasks), leave the task out, or fill in a value of your own"
        )
    with np.errstate(over="ignore"):
        total = np.abs(matrix).sum()
    if not np.isfinite(total):
        raise ValueError("affinity must have entries whose sum is finite: scale the matrix down")
    return names, matrix


def _read_table(affinity: Affinity, tasks: Sequence[TaskName] | None, sign: int) -> TableScores:
    what = "affinity must map groups to {task: score} with objective='table', or be a sequence of "
    what += "(group, scores, cost)"
    costs: list[float] | None = None
    if isinstance(affinity, Mapping):
        listed = list(affinity.items())
    else:
        if isinstance(affinity, (str, np.ndarray)) or not isinstance(affinity, Iterable):
            raise ValueError(f"{what}; got {type(affinity).__name__}")
        rows: list[Any] = list(affinity)
        for row in rows:
            if not isinstance(row, (tuple, list)) or len(row) != 3:
                raise ValueError(f"{what}; got the entry {row!r}")
        listed = [(group, scores) for group, scores, _ in rows]
        costs = [float(cost) for _, _, cost in rows]
    if not listed:
        raise ValueError(f"{what}; got an empty one")
    for group, scores in listed:
        if (
            isinstance(group, str)
            or not isinstance(group, Iterable)
            or not isinstance(scores, Mapping)
        ):
            raise ValueError(f"{what}; got the entry {(group, scores)!r}")
    if tasks is None:
        tasks = list(dict.fromkeys(name for group, _ in listed for name in group))
    names = Tasks(tasks)
    groups = [names.indices(group, "affinity") for group, _ in listed]
    values = np.full((len(groups), len(names)), np.nan)
    for c, (group, scores) in enumerate(listed):
        given = {names.index(task, "affinity"): float(score) for task, score in scores.items()}
        if set(given) != set(groups[c]):
            raise ValueError(
                f"affinity must have a score for each task of a group and no other, got "
                f"{dict(scores)!r} for {tuple(group)!r}"
            )
        for t, score in given.items():
            if not np.isfinite(score):
                raise ValueError(
                    f"affinity must be finite, got {score} for task {names.names[t]!r} in the group "
                    f"{tuple(group)!r}: leave the candidate out, or give it a score"
                )
            values[c, t] = score
    return TableScores(names, groups, values, costs, sign)
