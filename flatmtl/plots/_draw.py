"""Values by task and step on given Axes: lines for a few tasks, a map for many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmtl.plots import _series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for all kinds of colour vision, then darker shades; dashes tell the rest.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00",
    "#56B4E9", "#7A5195", "#8C6D1F", "#444444", "#66A61E",
)  # fmt: skip
MOST_LINES = len(COLOURS)
PALE = "#E4E4E4"  # where there is no value

Arrays = dict[str, np.ndarray]


def matplotlib() -> Any:  # noqa: ANN401
    try:
        import matplotlib
    except ImportError as missing:
        raise ImportError(
            "flatmtl.plots needs matplotlib: pip install 'flatmtl[plots]'"
        ) from missing
    return matplotlib


def figure(size: tuple[float, float], *, on_screen: bool) -> Figure:
    matplotlib()
    if on_screen:
        from matplotlib import pyplot

        return pyplot.figure(figsize=size, layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def by_task(
    ax: Axes,
    tasks: list[str],
    arrays: Arrays,
    what: str,
    smooth: int | None,
    legend: bool,
    *,
    far: float,
) -> None:
    """A line for each task, or a map of them if they are many; logarithmic if sizes differ ``far``."""
    steps, values = arrays["step"], arrays[what]
    window = _series.window(len(steps), smooth)
    if len(tasks) > MOST_LINES:
        map(ax, tasks, steps, values, far)
        return
    means = _series.running_mean(values, window)
    for task, name in enumerate(tasks):
        colour = COLOURS[task]
        if window > 1:
            line(ax, steps, values[:, task], color=colour, alpha=0.25, lw=0.8)
        line(ax, steps, means[:, task], color=colour, lw=1.8, label=name)
    shown = values if window == 1 else means
    scale, threshold = _series.scale(values, far)
    if scale == "symlog":
        ax.set_yscale("symlog", linthresh=threshold)
    else:
        ax.set_yscale(scale)
    if scale != "log" and (shown[np.isfinite(shown)] < 0).any():
        ax.axhline(0.0, color="black", lw=0.8, alpha=0.6)
    by_step(ax)
    if legend:
        ax.legend(frameon=False, fontsize=9, ncols=1 if len(tasks) <= 5 else 2)


def line(ax: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:  # noqa: ANN401
    lonely = _series.lonely(values)
    if lonely:
        style.update(marker=".", markersize=4, markevery=lonely)
    ax.plot(steps, values, **style)


def map(ax: Axes, tasks: list[str], steps: np.ndarray, values: np.ndarray, far: float) -> None:
    from matplotlib import colors

    scale, threshold = _series.scale(values, far)
    known = values[np.isfinite(values)]
    low, high = (float(q) for q in np.quantile(known, [0.01, 0.99]))  # outliers would dim the rest
    beyond = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
    norm: Any
    if scale == "log":
        norm = colors.LogNorm(low, high)
    elif scale == "symlog":
        norm = colors.SymLogNorm(threshold, vmin=-max(-low, high), vmax=max(-low, high))
    elif low < 0:
        norm = colors.Normalize(-max(-low, high), max(-low, high))
    else:
        norm = colors.Normalize(low, high)
    colours = matplotlib().colormaps["RdBu_r" if low < 0 else "viridis"].with_extremes(bad=PALE)
    image = ax.imshow(
        np.ma.masked_invalid(values.T), cmap=colours, norm=norm, aspect="auto",
        interpolation="nearest", extent=(steps[0] - 0.5, steps[-1] + 0.5, len(tasks) - 0.5, -0.5),
    )  # fmt: skip
    ends = (int(known.min() < norm.vmin), int(known.max() > norm.vmax))
    ax.figure.colorbar(image, ax=ax, extend=beyond[ends], extendfrac=0.02, aspect=30)
    font, shown = labels(len(tasks), 72.0 * inches(ax)[1] / len(tasks))
    ax.set_yticks(shown, [tasks[i] for i in shown], fontsize=font)
    ax.tick_params(axis="y", length=0)
    by_step(ax, grid=False)


def by_step(ax: Axes, *, grid: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(
        MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    low, high = ax.get_xlim()
    if high - low < 1:  # a single step
        ax.set_xlim(low - 0.5, high + 0.5)
    if grid:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes, roughly: labels take their part later."""
    box = ax.get_window_extent()
    return 0.85 * box.width / ax.figure.dpi, 0.85 * box.height / ax.figure.dpi


def labels(count: int, room: float) -> tuple[float, range]:
    """Of ``count`` labels with ``room`` points each: the font's size and those that can be read."""
    every = max(1, math.ceil(5.0 / (0.8 * room)))
    return min(9.0, 0.8 * room * every), range(0, count, every)
