"""What a selection of groups comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flatmtl.grouping.scores import Scores
from flatmtl.losses import TaskName


@dataclass(frozen=True)
class NearTie:
    """Another selection, close to the best one.

    Attributes:
        groups: its groups.
        objective: the mean of its tasks' scores.
        margin: how much better the best selection is, never negative.
    """

    groups: list[tuple[TaskName, ...]]
    objective: float
    margin: float


@dataclass(frozen=True)
class Grouping:
    """Groups of tasks, one network each, and where each task is served.

    Attributes:
        groups: the groups; each serves at least one task, and a task may help in others.
        served_by: task -> index of the group that serves it.
        scores: task -> its score there.
        objective: the mean of the scores.
        by_count: the best objective with at most 1, 2, ..., max_groups groups; None where that is
            infeasible. Empty where groups were only evaluated.
        fewest: the smallest number of groups that reaches the objective: ``len(groups)``.
        near_ties: the next best selections, best first.
        cost: what the groups cost together.
        group_costs: what each costs.
        exact: whether no selection can be better.
        bound: no selection is better than this; the objective itself if ``exact``.
        tasks: all tasks.
    """

    groups: list[tuple[TaskName, ...]]
    served_by: dict[TaskName, int]
    scores: dict[TaskName, float]
    objective: float
    by_count: list[float | None]
    fewest: int
    near_ties: list[NearTie]
    cost: float
    exact: bool
    bound: float
    tasks: list[TaskName]
    group_costs: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        """Groups with who is served where, then near-ties and the value by number of groups."""
        kind = "exact" if self.exact else f"not proven best, bound {self.bound:.6g}"
        lines = [f"{len(self.groups)} group(s), objective {self.objective:.6g} ({kind})"]
        for g, group in enumerate(self.groups):
            served = [f"{t} {self.scores[t]:.6g}" for t in group if self.served_by[t] == g]
            lines.append(f"  {{{', '.join(map(str, group))}}} serves {', '.join(served)}")
        if self.cost != len(self.groups):
            lines.append(f"  cost {self.cost:g}")
        if self.by_count:
            values = ", ".join(
                f"{k}: {'infeasible' if v is None else format(v, '.6g')}"
                for k, v in enumerate(self.by_count, 1)
            )
            lines.append(f"by number of groups  {values}")
        for tie in self.near_ties:
            groups = " ".join(f"{{{', '.join(map(str, group))}}}" for group in tie.groups)
            lines.append(f"near-tie {tie.objective:.6g} (behind by {tie.margin:.3g})  {groups}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Served:
    """Which candidates serve which tasks.

    Attributes:
        candidates: those that serve a task, in the order given.
        owner: [T] place in ``candidates``.
        scores: [T] in the sign of the user.
    """

    candidates: list[int]
    owner: list[int]
    scores: list[float]

    @property
    def objective(self) -> float:
        """The mean of the scores."""
        return sum(self.scores) / len(self.scores)


def serve(source: Scores, candidates: Sequence[int]) -> Served:
    """Each task in the candidate where it scores best, the first one of equals."""
    best: dict[int, tuple[float, int]] = {}
    for place, candidate in enumerate(candidates):
        for t, score in source.scores(candidate).items():
            if t not in best or source.sign * score > source.sign * best[t][0]:
                best[t] = (score, place)
    missing = [source.tasks.names[t] for t in range(len(source.tasks)) if t not in best]
    if missing:
        raise ValueError(f"groups must cover all tasks, got none with {missing[0]!r}")
    used = sorted({place for _, place in best.values()})
    at = {place: k for k, place in enumerate(used)}
    order = range(len(source.tasks))
    return Served(
        [candidates[place] for place in used],
        [at[best[t][1]] for t in order],
        [best[t][0] for t in order],
    )


def grouping(
    source: Scores,
    served: Served,
    costs: Sequence[float],
    *,
    by_count: list[float | None],
    near_ties: list[NearTie],
    exact: bool,
    bound: float,
) -> Grouping:
    """The result in the user's names. costs: of each candidate that serves."""
    names = source.tasks.names
    return Grouping(
        groups=[source.tasks.group(source.group(c)) for c in served.candidates],
        served_by=dict(zip(names, served.owner, strict=True)),
        scores=dict(zip(names, served.scores, strict=True)),
        objective=served.objective,
        by_count=by_count,
        fewest=len(served.candidates),
        near_ties=near_ties,
        cost=float(sum(costs)),
        exact=exact,
        bound=served.objective if exact else bound,
        tasks=list(names),
        group_costs=[float(c) for c in costs],
    )
