"""Pictures of a ``History``, an ``AffinityRecord`` and a ``Grouping``.

matplotlib (``pip install 'flatmtl[plots]'``) is imported when one is made.

Each function takes the Axes to draw on, or makes a figure through pyplot, and returns the Axes; ``overview``
draws all of a history in one figure, ``grouping_report`` all of a grouping. Up to ten tasks of a history are
lines, drawn faint with their running mean on top; more are a map with a row for each task.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from flatmtl.history import History
from flatmtl.ops import _status
from flatmtl.plots import _draw, _panels
from flatmtl.plots._reports import (
    affinity,
    affinity_over_time,
    grouping_report,
    groups,
    value_by_count,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "affinity",
    "affinity_over_time",
    "conflict",
    "cosines",
    "grouping_report",
    "groups",
    "losses",
    "norms",
    "overview",
    "sharpness",
    "value_by_count",
    "weights",
]


def losses(history: History, ax: Axes | None = None, *, smooth: int | None = None) -> Axes:
    """The clean losses by step, in a logarithmic scale where they are positive and far apart.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.losses, history, ax, smooth)


def weights(
    history: History, ax: Axes | None = None, *, smooth: int | None = None, flat: bool = False
) -> Axes:
    """The weights of the tasks' gradients by step.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.
        flat: the weights of the flat parts instead.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.flat_weights if flat else _panels.weights, history, ax, smooth)


def norms(history: History, ax: Axes | None = None, *, smooth: int | None = None) -> Axes:
    """The norms of the tasks' gradients by step, in a logarithmic scale where they are far apart.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.norms, history, ax, smooth)


def sharpness(history: History, ax: Axes | None = None, *, smooth: int | None = None) -> Axes:
    """The losses at the perturbed points minus the clean ones, by step.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.sharpness, history, ax, smooth)


def conflict(history: History, ax: Axes | None = None, *, smooth: int | None = None) -> Axes:
    """The share of the pairs of tasks whose gradients have a negative cosine, by step.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.conflict, history, ax, smooth)


def cosines(history: History, ax: Axes | None = None) -> Axes:
    """The cosines of the tasks' gradients, each the mean over the kept steps that have it.

    Args:
        history: at least one step.
        ax: where to draw; None: a new figure, large enough for the values to be read.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history has no such values.
    """
    return _alone(_panels.cosines, history, ax, None)


def overview(
    history: History, path: str | PathLike[str] | None = None, *, smooth: int | None = None
) -> Figure:
    """All that the history has in one figure; reads the device once.

    Args:
        history: at least one step.
        path: where to save it, without pyplot; None: a pyplot figure, not saved.
        smooth: steps in the running mean; None: a fortieth of those kept; 1: none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    _draw.matplotlib()
    tasks, arrays = _read(history)
    panels = [draw for draw, needed in _panels.PANELS if _panels.has(arrays, needed)]
    # The map of the cosines wants a square: it stands beside the others, as high as all of them.
    with_map = _panels.cosines in panels
    by_step = [draw for draw in panels if draw is not _panels.cosines]
    if not by_step:
        raise ValueError(f"history must hold some values, got none in {len(arrays['step'])} steps")
    rows = 1 if len(by_step) <= 2 else 2
    columns = math.ceil(len(by_step) / rows)
    many = len(tasks) > _draw.MOST_LINES
    height = rows * (min(7.0, 1.6 + 0.14 * len(tasks)) if many else 3.3) + 0.7
    widths = [(5.2 if many else 4.6) * columns]
    if with_map:
        widths.append(min(height + 0.6, 4.0 + 0.45 * len(tasks)))
    figure = _draw.figure((sum(widths), height), on_screen=path is None)
    parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
    axes = list(parts[0].subplots(rows, columns, squeeze=False).flat)
    for ax, draw in zip(axes, by_step, strict=False):
        draw(ax, tasks, arrays, smooth, False)
    for ax in axes[len(by_step) :]:
        ax.remove()
    if with_map:
        _panels.cosines(parts[1].subplots(), tasks, arrays, smooth, False)
    if not many:
        handles, labels = axes[0].get_legend_handles_labels()
        columns = min(len(labels), 10)
        parts[0].legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(_headline(arrays))
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _read(history: History) -> tuple[list[str], _draw.Arrays]:
    if not isinstance(history, History):
        raise TypeError(f"history must be a flatmtl History, got {type(history).__name__}")
    arrays = history.arrays()
    if not len(arrays["step"]):
        raise ValueError("history must hold at least one step, got none")
    return [str(task) for task in history.tasks], arrays


def _alone(draw: _panels.Panel, history: History, ax: Axes | None, smooth: int | None) -> Axes:
    _draw.matplotlib()
    tasks, arrays = _read(history)
    needed = dict(_panels.PANELS)[draw]
    if not _panels.has(arrays, needed):
        raise ValueError(
            f"history must hold some {needed}, got none in {len(arrays['step'])} steps"
        )
    if ax is None:
        size = (7.0, min(12.0, max(4.0, 1.4 + 0.2 * len(tasks))))
        if draw is _panels.cosines:
            side = min(18.0, max(3.2, 0.42 * len(tasks)))
            size = (side + 1.3 + 0.08 * max(map(len, tasks)), side + 0.8)
        ax = _draw.figure(size, on_screen=True).add_subplot()
    draw(ax, tasks, arrays, smooth, True)
    return ax


_BITS = (
    (_status.INVALID_GRAM, "an invalid Gram matrix"),
    (_status.NOT_CONVERGED, "a solver short of its tolerance"),
    (_status.FALLBACK, "the method's fallback"),
    (_status.NO_ACTIVE_TASK | _status.INACTIVE_TASK, "a task without gradient"),
)


def _headline(arrays: _draw.Arrays) -> str:
    steps = arrays["step"]
    line = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    bits = np.maximum(arrays["status"], 0) | np.maximum(arrays["flat_status"], 0)
    for bit, words in _BITS:
        count = np.count_nonzero(bits & bit)
        if count:
            line += f", {count} with {words}"
    return line
