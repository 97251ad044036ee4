"""Pictures of a ``Grouping``: who trains with whom and is served where, and what more groups bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flatmtl.plots import _affinity, _draw, _names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flatmtl.grouping import Grouping


def diagram(ax: Axes, grouping: Grouping, matrix: np.ndarray | None) -> None:
    """A column for each group, a row for each task: full where it is served, hollow where it helps."""
    tasks, groups, served = grouping.tasks, grouping.groups, grouping.served_by
    rows = sorted(tasks, key=lambda task: (served[task], tasks.index(task)))
    at = {task: row for row, task in enumerate(rows)}
    width, height = _draw.inches(ax)
    cell = 72.0 * min(height / len(rows), width / (len(groups) + 1.0))
    dot = min(16.0, max(2.0, 0.62 * cell))
    end = max((abs(score) for score in grouping.scores.values() if np.isfinite(score)), default=1.0)
    factor, unit = _affinity.unit(end or 1.0)
    for g, group in enumerate(groups):
        colour = _draw.COLOURS[g % len(_draw.COLOURS)]
        ends = [min(at[task] for task in group), max(at[task] for task in group)]
        ax.plot([g, g], ends, color=colour, lw=max(1.0, 0.15 * dot), alpha=0.45, zorder=1)
        for full in (True, False):
            members = [at[task] for task in group if (served[task] == g) == full]
            ax.plot(
                [g] * len(members), members, "o", color=colour, ms=dot, zorder=2,
                mfc=colour if full else "white", mew=max(0.4, 0.12 * dot),
            )  # fmt: skip
    font, labelled = _draw.labels(len(rows), 72.0 * height / len(rows))
    ax.set_yticks(labelled, _names.shown(rows[i] for i in labelled), fontsize=font)
    room = 0.0
    if matrix is not None and labelled.step == 1 and cell > 17.0:
        room = 0.4
        _scores_in_groups(ax, grouping, matrix / factor, at, min(8.0, 0.3 * cell), dot)
    right = ax.secondary_yaxis("right")
    values = [_affinity.digits(grouping.scores[rows[i]] / factor) for i in labelled]
    right.set_yticks(labelled, values, fontsize=font)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    columns, shown = _draw.labels(len(groups), 72.0 * width / (len(groups) + 1.0))
    ax.set_xticks(shown, [str(g + 1) for g in shown], fontsize=columns)
    ax.set(xlim=(-0.7, len(groups) - 0.3 + room), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xlabel("group   (● serves the task, ○ trains it too)")
    ax.set_title("groups and scores" + (f", {unit}" if unit else ""))
    ax.tick_params(length=0)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


def _scores_in_groups(
    ax: Axes,
    grouping: Grouping,
    matrix: np.ndarray,
    at: dict[int | str, int],
    font: float,
    dot: float,
) -> None:
    """Beside each dot the mean affinity of the others of the group for the task."""
    places = {task: n for n, task in enumerate(grouping.tasks)}
    for g, group in enumerate(grouping.groups):
        for task in group:
            others = [places[other] for other in group if other != task]
            if others:
                value = matrix[places[task], others].mean()
                ax.annotate(
                    _affinity.digits(value), (g, at[task]), xytext=(0.5 * dot + 2.0, 0.0),
                    textcoords="offset points", va="center", fontsize=font, color="#444444",
                )  # fmt: skip


def value_by_count(ax: Axes, values: Sequence[float | None], fewest: int | None) -> None:
    counts = np.arange(1, len(values) + 1)
    known = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    _draw.line(ax, counts, known, color=_draw.COLOURS[0], lw=1.8)
    ax.plot(counts, known, "o", color=_draw.COLOURS[0], ms=6)
    if fewest is not None:
        ax.plot(
            fewest, known[fewest - 1], "o", ms=13, mfc="none", mec=_draw.COLOURS[4], mew=1.6,
            label=f"fewest groups that reach the best: {fewest}",
        )  # fmt: skip
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    without = counts[np.isnan(known)]
    if len(without):
        ax.axvspan(without[0] - 0.5, without[-1] + 0.5, color=_draw.PALE, lw=0)
        middle = (without[0] + without[-1]) / 2
        ax.text(
            middle, 0.5, "not possible", transform=ax.get_xaxis_transform(), rotation=90,
            ha="center", va="center", fontsize=8, color="#555555",
        )  # fmt: skip
    _draw.by_step(ax)
    ax.set(xlabel="groups at most", ylabel="mean score of a task", xlim=(0.5, len(values) + 0.5))
    ax.margins(y=0.2)
    ax.set_title("what more groups bring")
