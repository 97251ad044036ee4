"""Which tasks help which, and which train together, in pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flatmtl.affinity import AffinityRecord
from flatmtl.grouping import Grouping
from flatmtl.losses import TaskName
from flatmtl.plots import _affinity, _draw, _groups, _names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def affinity(
    record: AffinityRecord | ArrayLike,
    ax: Axes | None = None,
    *,
    quantity: str = "affinity",
    epochs: int | slice | None = None,
    normalise: bool = False,
    tasks: Sequence[TaskName] | None = None,
) -> Axes:
    """The affinities as a map: row = recipient (its loss), column = source (its gradient).

    The colours are centred at 0 and scaled to the entries off the diagonal, which is grey: the selection
    never uses it. Values stand in the cells while they can be read.

    Args:
        record: a record, or a matrix [T, T] with NaN where nothing is known.
        ax: where to draw; None: a new figure, large enough for the values to be read.
        quantity: one of the record's; of a matrix: what to call it.
        epochs: of a record, as in ``AffinityRecord.matrix``.
        normalise: of a record, as in ``AffinityRecord.matrix``.
        tasks: of a record: which to draw, in this order; of a matrix: the names.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: not square, unknown tasks or quantities, or no pair of two tasks was measured.
    """
    _draw.matplotlib()
    if isinstance(record, AffinityRecord):
        names = list(record.tasks)
        matrix = record.matrix(quantity, epochs=epochs, normalise=normalise)
        if tasks is not None:
            at = [_affinity.position(names, task) for task in tasks]
            names, matrix = [names[i] for i in at], matrix[np.ix_(at, at)]
    else:
        given = AffinityRecord.from_matrix(record, tasks)
        names, matrix = given.tasks, given.matrix(epochs=epochs, normalise=normalise)
    if not _has_pairs(matrix):
        raise ValueError("record must hold a measured pair of two tasks, got none")
    if ax is None:
        side = min(18.0, max(3.4, 0.5 * len(names)))
        label = _label(names)
        ax = _draw.figure((side + 1.6 + label, side + 0.9 + label), on_screen=True).add_subplot()
    _affinity.heatmap(ax, names, matrix, quantity, normalised=normalise)
    return ax


def affinity_over_time(
    record: AffinityRecord,
    ax: Axes | None = None,
    *,
    quantity: str = "affinity",
    pairs: Sequence[tuple[TaskName, TaskName]] | None = None,
) -> Axes:
    """Pairs of tasks by epoch, each a line in a band of its standard error.

    Args:
        record: at least one measured pair.
        ax: where to draw; None: a new figure.
        quantity: one of the record's.
        pairs: up to ten, each (recipient, source); None: the six largest in size over all epochs.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: not a record.
        ValueError: unknown tasks or quantities, too many pairs, or none of them was measured.
    """
    _draw.matplotlib()
    chosen = _affinity.choose_pairs(_checked(record), quantity, pairs)
    if ax is None:
        ax = _draw.figure((7.0, 4.2), on_screen=True).add_subplot()
    _affinity.over_time(ax, record, quantity, chosen, legend=True)
    return ax


def value_by_count(grouping: Grouping | Sequence[float | None], ax: Axes | None = None) -> Axes:
    """The best objective with at most 1, 2, ... groups; grey where no choice keeps to the rules.

    Args:
        grouping: what ``flatmtl.select_groups`` returned, or the values: None where there is no choice.
        ax: where to draw; None: a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no values.
    """
    _draw.matplotlib()
    values: Sequence[float | None]
    if isinstance(grouping, Grouping):
        values, fewest = grouping.by_count, grouping.fewest
    elif isinstance(grouping, Sequence):
        values, fewest = grouping, None
    else:
        raise TypeError(
            f"grouping must be a flatmtl Grouping or its values, got {type(grouping).__name__}"
        )
    if all(value is None for value in values):
        raise ValueError(f"grouping must hold values by number of groups, got {list(values)}")
    if ax is None:
        ax = _draw.figure((5.0, 3.6), on_screen=True).add_subplot()
    _groups.value_by_count(ax, values, fewest)
    return ax


def groups(
    grouping: Grouping,
    ax: Axes | None = None,
    *,
    affinity: AffinityRecord | ArrayLike | None = None,
) -> Axes:
    """The groups side by side: who trains in which, who is served where, with which score.

    Args:
        grouping: what ``flatmtl.select_groups`` or ``flatmtl.evaluate_groups`` returned.
        ax: where to draw; None: a new figure.
        affinity: writes beside each dot the mean affinity of the group's others for the task, if there is
            room; a record, or a matrix in the order of ``grouping.tasks``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the affinities are those of other tasks.
    """
    _draw.matplotlib()
    _check_grouping(grouping)
    matrix = None if affinity is None else _matrix_of(grouping, affinity)
    if ax is None:
        width = _label(grouping.tasks) + max(3.8, min(15.5, 1.5 + 0.8 * len(grouping.groups)))
        size = (width, min(18.0, max(2.4, 1.2 + 0.32 * len(grouping.tasks))))
        ax = _draw.figure(size, on_screen=True).add_subplot()
    _groups.diagram(ax, grouping, matrix)
    return ax


def grouping_report(
    record: AffinityRecord,
    grouping: Grouping,
    path: str | PathLike[str] | None = None,
    *,
    quantity: str = "affinity",
    epochs: int | slice | None = None,
    normalise: bool = False,
) -> Figure:
    """The matrix, the groups, what more groups bring and the largest pairs by epoch, with the caveats.

    Args:
        record: what the groups were selected from.
        grouping: what ``flatmtl.select_groups`` returned.
        path: where to save it, without pyplot; None: a pyplot figure, not saved.
        quantity: of the matrix that they were selected from; curves are of it too, over all epochs.
        epochs: of that matrix, as in ``AffinityRecord.matrix``.
        normalise: of that matrix, as in ``AffinityRecord.matrix``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: not a record.
        ValueError: the record has no measured pair, or other tasks.
    """
    _draw.matplotlib()
    pairs = _affinity.choose_pairs(_checked(record), quantity, None)
    _check_grouping(grouping)
    drawn = record.matrix(quantity, epochs=epochs, normalise=normalise)
    matrix = _matrix_of(grouping, AffinityRecord.from_matrix(drawn, record.tasks))
    explained = matrix if _explains(grouping, matrix) else None
    tasks, count = len(record.tasks), len(grouping.groups)
    tall = min(12.0, max(5.6, 0.42 * tasks + 1.8))
    left, middle = tall + 0.9, _label(grouping.tasks) + min(8.0, max(3.6, 1.4 + 0.62 * count))
    curves = len(grouping.by_count) > 1
    timed = len(record.steps) > 1
    widths = [left, middle] + [4.8] * (curves or timed)
    caveats = [
        line
        for caveat in record.caveats()
        for line in textwrap.wrap(f"• {caveat}", int(12.5 * sum(widths)), subsequent_indent="   ")
    ]
    foot = 0.17 * len(caveats) + 0.1
    figure = _draw.figure((sum(widths), tall + 0.5 + foot), on_screen=path is None)
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=[tall + 0.5, foot])
    above, below = halves[:, 0]
    parts = above.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
    panel = parts[0].subplots()
    _affinity.heatmap(panel, record.tasks, drawn, quantity, normalised=normalise)
    _groups.diagram(parts[1].subplots(), grouping, explained)
    if curves or timed:
        rows = max(curves + timed, round(tall / 4.0))  # curves that are not drawn out in height
        axes = list(parts[2].subplots(rows, 1, squeeze=False).flat)
        if curves:
            _groups.value_by_count(axes[0], grouping.by_count, grouping.fewest)
        if timed:
            _affinity.over_time(axes[curves], record, quantity, pairs, legend=False)
            handles, labels = axes[curves].get_legend_handles_labels()
            columns = 2 if max(map(len, labels)) <= 24 else 1
            parts[2].legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=columns,
                frameon=False,
                fontsize=8,
            )
        for ax in axes[curves + timed :]:
            ax.remove()
    if caveats:
        below.text(
            0.01, 1.0, "\n".join(caveats).replace("$", r"\$"), va="top", fontsize=8, color="#555555"
        )
    above.suptitle(_headline(grouping))
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _label(tasks: Sequence[TaskName]) -> float:
    """Inches that the tasks' names take."""
    return 0.08 * max(map(len, _names.shown(tasks)))


def _explains(grouping: Grouping, matrix: np.ndarray) -> bool:
    """Whether the scores are those of this matrix, and not of other epochs, errors or a table."""
    place = {task: n for n, task in enumerate(grouping.tasks)}
    for task, group in grouping.served_by.items():
        others = [place[other] for other in grouping.groups[group] if other != task]
        if others and not np.isclose(
            matrix[place[task], others].mean(), grouping.scores[task], rtol=1e-6, atol=0.0
        ):
            return False
    return True


def _headline(grouping: Grouping) -> str:
    number = len(grouping.groups)
    line = f"{number} {'group' if number == 1 else 'groups'} for {len(grouping.tasks)} tasks"
    line += f", mean score {grouping.objective:.4g}"
    return line if grouping.exact else f"{line} (not proven best: bound {grouping.bound:.4g})"


def _checked(record: AffinityRecord) -> AffinityRecord:
    if not isinstance(record, AffinityRecord):
        raise TypeError(f"record must be a flatmtl AffinityRecord, got {type(record).__name__}")
    return record


def _check_grouping(grouping: Grouping) -> None:
    if not isinstance(grouping, Grouping):
        raise TypeError(f"grouping must be a flatmtl Grouping, got {type(grouping).__name__}")


def _has_pairs(matrix: np.ndarray) -> bool:
    return bool((np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)).any())


def _matrix_of(grouping: Grouping, affinity: AffinityRecord | ArrayLike) -> np.ndarray:
    """[T, T] in the order of the grouping's tasks."""
    if not isinstance(affinity, AffinityRecord):
        return AffinityRecord.from_matrix(affinity, grouping.tasks).matrix()
    if set(affinity.tasks) != set(grouping.tasks):
        raise ValueError("affinity must be of the grouping's tasks, got those of another record")
    at = [affinity.tasks.index(task) for task in grouping.tasks]
    return affinity.matrix()[np.ix_(at, at)]
