"""What any given groups are worth, on the same footing as selected ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flatmtl.grouping.names import mask
from flatmtl.grouping.result import Grouping, grouping, serve
from flatmtl.grouping.scores import Affinity, Group, MatrixScores, Scores, read_scores
from flatmtl.losses import TaskName


def evaluate_groups(
    groups: Sequence[Group],
    affinity: Affinity,
    *,
    objective: str = "tag",
    minimise: bool = False,
    allow_single: bool = False,
    tasks: Sequence[TaskName] | None = None,
) -> Grouping:
    """The value of these groups: each task is served by the group where its score is best.

    Args:
        groups: sets of tasks that cover all tasks together; they may overlap. A group that serves no
            task is left out of the result. With a table in which a group stands more than once, its
            n-th mention here is its n-th one there.
        affinity: a record, a matrix or a table, as for ``select_groups``.
        objective: "tag", "hoa" or "table".
        minimise: whether scores are errors.
        allow_single: whether a task may be alone under "tag".
        tasks: names of the tasks.

    Returns:
        A ``Grouping`` with exact=False, an empty ``by_count``, each group at its cost in the table or
        1, and as the bound each task's best possible score.

    Raises:
        ValueError: an argument is not as above, tasks are not covered, or a task is alone where that is
            not allowed.
    """
    source = read_scores(
        affinity, objective, minimise=minimise, allow_single=allow_single, tasks=tasks
    )
    candidates = _candidates(groups, source)
    served = serve(source, candidates)
    costs = [1.0] * len(served.candidates)
    if not isinstance(source, MatrixScores) and source.costs is not None:
        costs = [source.costs[c] for c in served.candidates]
    return grouping(
        source,
        served,
        costs,
        by_count=[],
        near_ties=[],
        exact=False,
        bound=float(source.ceiling().mean()),
    )


def _candidates(groups: Sequence[Group], source: Scores) -> list[int]:
    found = []
    seen: Counter[tuple[int, ...]] = Counter()
    for group in groups:
        indices = source.tasks.indices(group, "groups")
        if isinstance(source, MatrixScores):
            if len(indices) == 1 and not source.single:
                raise ValueError(
                    f"groups must have at least 2 tasks unless allow_single, got {tuple(group)!r}"
                )
            found.append(mask(indices))
            continue
        places = [c for c, listed in enumerate(source.groups) if listed == indices]
        if seen[indices] >= len(places):
            raise ValueError(f"groups must stand in the table, got {tuple(group)!r}")
        found.append(places[seen[indices]])
        seen[indices] += 1
    return found
