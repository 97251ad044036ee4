"""A grouping as text, with how sure it is."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmtl.affinity._names import printable
from flatmtl.losses import TaskName

if TYPE_CHECKING:
    from flatmtl.grouping import Grouping

THIN = 0.01  # a margin that may be called a tie
_WIDE = 110  # characters of a line


def text(
    grouping: Grouping, matrix: np.ndarray, error: np.ndarray | None, rules: Mapping[str, Any]
) -> str:
    """The groups, who is served where, what other numbers of groups and the next best would give.

    Args:
        grouping: what was chosen.
        matrix: [T, T], from which it was chosen.
        error: [T, T], standard errors of ``matrix``, or None if nothing is known of them.
        rules: options of ``evaluate_groups``.
    """
    shares = _shares(grouping, grouping.tasks)
    lines = ["", _headline(grouping, _deviation(shares, error)), ""]
    lines += _groups(grouping)
    lines += ["", *_served(grouping)]
    if len(grouping.by_count) > 1:
        lines += ["", *_by_count(grouping)]
    if grouping.near_ties:
        lines += ["", *_near_ties(grouping, shares, matrix, error, rules)]
    return "\n".join(lines) + "\n"


def _headline(grouping: Grouping, deviation: float | None) -> str:
    number = len(grouping.groups)
    line = f"{number} {'group' if number == 1 else 'groups'}, mean score {grouping.objective:.6g}"
    if deviation is not None:
        line += f" ± {deviation:.1g} (standard error as of independent steps)"
    if not grouping.exact:
        line += f"; found by a heuristic, nothing can be better than {grouping.bound:.6g}"
    return line


def _groups(grouping: Grouping) -> list[str]:
    lines = []
    for number, group in enumerate(grouping.groups):
        names = [printable(t) + ("" if grouping.served_by[t] == number else "*") for t in group]
        lines += textwrap.wrap(
            f"{number + 1:>3}  {', '.join(names)}", _WIDE, subsequent_indent="     ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    if sum(map(len, grouping.groups)) > len(grouping.tasks):
        lines.append("     * helps there, and is served by another group")
    return lines


def _served(grouping: Grouping) -> list[str]:
    names = [printable(task) for task in grouping.tasks]
    wide = max(len("task"), *map(len, names))
    lines = [f"{'task':<{wide}}  group       score"]
    for name, task in zip(names, grouping.tasks, strict=True):
        group, score = grouping.served_by[task] + 1, grouping.scores[task]
        lines.append(f"{name:<{wide}}  {group:>5}  {score:>10.4g}")
    return lines


def _by_count(grouping: Grouping) -> list[str]:
    lines = ["groups at most    mean score"]
    for number, value in enumerate(grouping.by_count, 1):
        shown = f"{'not possible':>14}" if value is None else f"{value:>14.6g}"
        best = "  <- the fewest that reach it" if number == grouping.fewest else ""
        lines.append(f"{number:>14}{shown}{best}")
    return lines


def _near_ties(
    grouping: Grouping,
    shares: np.ndarray,
    matrix: np.ndarray,
    error: np.ndarray | None,
    rules: Mapping[str, Any],
) -> list[str]:
    from flatmtl.grouping import evaluate_groups

    lines, thin = ["next best          behind"], 0
    for tie in grouping.near_ties:
        margin = abs(tie.objective - grouping.objective)
        share = margin / abs(grouping.objective) if grouping.objective else np.inf
        other = evaluate_groups(tie.groups, matrix, tasks=grouping.tasks, **rules)
        deviation = _deviation(shares - _shares(other, grouping.tasks), error)
        noise = deviation is not None and margin <= deviation
        thin += noise or share < THIN
        behind = f"{share:.2%}" if np.isfinite(share) else f"{margin:.2g}"
        sets = " ".join("{" + ", ".join(map(printable, group)) + "}" for group in tie.groups)
        mark = "  (within a standard error)" if noise else ""
        lines.append(f"{tie.objective:>12.6g}{behind:>13}  {sets}{mark}")
    if thin:
        lines.append(
            f"caveat: thin margins: {thin} of these {'is' if thin == 1 else 'are'} less than "
            f"{THIN:.0%} or one standard error behind the best"
        )
    return lines


def _shares(grouping: Grouping, tasks: Sequence[TaskName]) -> np.ndarray:
    """[T, T]: the weight of each entry of the matrix in the objective."""
    place = {task: n for n, task in enumerate(tasks)}
    found = np.zeros((len(tasks), len(tasks)))
    for task, group in grouping.served_by.items():
        members = grouping.groups[group]
        # alone, a task is scored by its diagonal entry
        others = [place[other] for other in members if other != task] or [place[task]]
        found[place[task], others] = 1.0 / (len(others) * len(tasks))
    return found


def _deviation(shares: np.ndarray, error: np.ndarray | None) -> float | None:
    """Of a sum of entries with these weights; None where an entry's own is not known."""
    if error is None or not np.isfinite(error[shares != 0]).all():
        return None
    return float(np.sqrt(np.sum((shares * np.where(shares != 0, error, 0.0)) ** 2)))
