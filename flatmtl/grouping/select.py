"""``select_groups``: which groups of tasks to train together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from types import ModuleType

import numpy as np

from flatmtl.grouping.exact import Cost, exact
from flatmtl.grouping.result import Grouping
from flatmtl.grouping.rules import Costs, Prices, read_rules
from flatmtl.grouping.scores import Affinity, Group, MatrixScores, TableScores, read_scores
from flatmtl.grouping.search import search
from flatmtl.losses import TaskName


def select_groups(
    affinity: Affinity,
    max_groups: int | None = None,
    *,
    objective: str = "tag",
    costs: Costs | None = None,
    budget: float | None = None,
    must: Iterable[Group] = (),
    must_not: Iterable[Group] = (),
    partition: bool = False,
    allow_single: bool = False,
    minimise: bool = False,
    near_ties: int = 0,
    tasks: Sequence[TaskName] | None = None,
    heuristic: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Grouping:
    """The groups of tasks, at most ``max_groups``, in which the tasks do best: network selection of TAG.

    A network trains a group; groups may overlap, and each task is served by the network where its
    score is best. The result maximises the mean over tasks of that score (Fifty et al., NeurIPS 2021),
    with the fewest groups that reach it. Exact, by a dynamic programme over sets of tasks: for T tasks
    and k groups about (ceil(k / 2) - 1) 3^(T - 1) steps at 1e9 a second on one core, and 8 bytes 2^T
    (ceil(k / 2) + 2) of memory. k = 4: T = 15 in 0.01 s, T = 20 in about 1.2 s and 34 MB.
    Near-ties take max_groups - 2 sweeps of 3^(T - 1) and a search; rules and costs by group
    3^T steps more; a budget of b steps about (b + 1) times the number of different costs as much.

    Ctrl-C ends the computation within about 50 ms if it runs in the main thread.

    Args:
        affinity: an ``AffinityRecord``, or an array [T, T], **row = recipient, column = source**; with
            objective="table" a mapping group -> {task: score}, or a sequence of (group, scores, cost) in
            which a group may come again at another cost; groups that are not in it are no candidates.
        max_groups: most groups; may be None with a budget.
        objective: the score of task t in group G. "tag": the mean of affinity[t, j] over the other
            members j. "hoa": the same for groups of two and more, affinity[t, t] if t is alone. "table":
            as given.
        costs: of groups: None (1 each), a sequence [T] by group size 1 to T, a mapping group -> cost
            (others cost 1), or a function of the tuple of tasks (at most 16 tasks). With a budget they
            must be multiples of a common step, such as 0.5. A sequence of (group, scores, cost) brings
            its own.
        budget: the most that the groups may cost together.
        must: sets of tasks of which a group holds all or none.
        must_not: sets of tasks of which a group holds at most one.
        partition: whether groups must be disjoint.
        allow_single: "tag": whether a task may be alone, with the score affinity[t, t]. ("hoa" always
            lets it; a table lists what it lets.)
        minimise: whether scores are errors, so that smaller is better.
        near_ties: how many of the next best selections to return. A selection is a set of groups of which
            each is strictly the best one for some task.
        tasks: names of the tasks, 0 to T-1 by default; a record names its own. Groups in all arguments
            use names, or indices where the names are strings.
        heuristic: a multi-start local search in place of the exact one, for any number of tasks
            (617 tasks, 20 groups: 4 s); the result says exact=False and has a bound. Not with a table,
            costs, a budget or near-ties.
        progress: called with a fraction up to 1 about every 100 ms.

    Returns:
        The groups, who is served where, scores, near-ties and the best value by number of groups.

    Raises:
        ValueError: an argument is not as above, used entries are not finite, rules contradict each other
            or leave no selection, the budget is too small, costs have no common step, or the problem is
            too large for the exact search.
        ImportError: flatmtl was installed without its compiled parts.
    """
    source = read_scores(
        affinity, objective, minimise=minimise, allow_single=allow_single, tasks=tasks
    )
    most = _whole("max_groups", max_groups, 1, optional=budget is not None)
    wanted = _whole("near_ties", near_ties, 0) or 0
    if isinstance(source, TableScores) and source.costs is not None and costs is not None:
        raise ValueError("costs must be None where the table has costs of its own")
    if budget is not None and not (np.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget must be finite and not negative, got {budget!r}")
    rules = read_rules(must, must_not, source.tasks)
    core = _core()
    if heuristic:
        unable = {
            "objective='table'": not isinstance(source, MatrixScores),
            "costs": costs is not None,
            "a budget": budget is not None,
            "near_ties": wanted > 0,
        }
        for what, given in unable.items():
            if given:
                raise ValueError(
                    f"heuristic must be False with {what}: only the exact search has it"
                )
        assert isinstance(source, MatrixScores)
        assert most is not None
        found = search(core, source, most, rules, partition=partition, progress=progress)
    else:
        cost = Cost(Prices(costs, source.tasks), budget)
        found = exact(core, source, most, cost, rules, partition, wanted, progress)
    if progress is not None:
        progress(1.0)
    return found


def _whole(name: str, value: int | None, least: int, *, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        unless = " (None needs a budget)" if value is None else ""
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}{unless}")
    return int(value)


def _core() -> ModuleType:
    try:
        from flatmtl import _core
    except ImportError as error:
        raise ImportError(
            "select_groups needs flatmtl's compiled parts: install a C++ compiler (g++), then flatmtl "
            "again"
        ) from error
    return _core
