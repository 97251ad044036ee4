"""One panel for each kind of diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from flatmtl.plots import _draw, _series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def losses(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    _draw.by_task(ax, tasks, arrays, "losses", smooth, legend, far=5.0)
    ax.set_title("loss")


def weights(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    _draw.by_task(ax, tasks, arrays, "weights", smooth, legend, far=20.0)
    ax.set_title("weight of the task's gradient")


def flat_weights(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    _draw.by_task(ax, tasks, arrays, "flat_weights", smooth, legend, far=20.0)
    ax.set_title("weight of the task's flat part")


def norms(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    _draw.by_task(ax, tasks, arrays, "norms", smooth, legend, far=5.0)
    ax.set_title("gradient norm")


def sharpness(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    _draw.by_task(ax, tasks, arrays, "sharpness", smooth, legend, far=20.0)
    ax.set_title("sharpness: perturbed loss - loss")


def conflict(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    share = 100.0 * arrays["conflict"]
    faint = 0.25 if len(share) > 200 else 0.5
    ax.plot(arrays["step"], share, ".", color=_draw.COLOURS[0], alpha=faint, markersize=5, mew=0)
    mean = _series.running_mean(share[:, None], _series.window(len(share), smooth, least=9))[:, 0]
    _draw.line(ax, arrays["step"], mean, color=_draw.COLOURS[0], lw=1.8)
    ax.set(title="pairs of tasks in conflict", ylim=(-4, 104))
    ax.yaxis.set_major_formatter("{x:.0f} %")
    _draw.by_step(ax)


def cosines(
    ax: Axes, tasks: list[str], arrays: _draw.Arrays, smooth: int | None, legend: bool
) -> None:
    mean = _series.mean(arrays["cosines"], axis=0)
    np.fill_diagonal(mean, np.nan)  # 1, and the eye would go there
    largest = np.nanmax(np.abs(mean))
    end = min(limit for limit in (0.1, 0.2, 0.5, 1.0) if limit >= min(largest, 1.0))
    cell, _ = _draw.square(ax, mean, tasks, end, ticks=np.linspace(-end, end, 5))
    size = min(11.0, 0.36 * cell)  # points; four characters must fit in a cell
    ax.set_title("mean cosine of the gradients")
    if size < 3.5:
        return  # nobody could read them
    for i, j in np.argwhere(~np.isnan(mean)):
        ax.text(
            j, i, _two_digits(mean[i, j]), ha="center", va="center", fontsize=size,
            color="white" if abs(mean[i, j]) > 0.6 * end else "black",
        )  # fmt: skip


Panel = Callable[["Axes", "list[str]", _draw.Arrays, "int | None", bool], None]
PANELS: tuple[tuple[Panel, str], ...] = (
    (losses, "losses"),
    (weights, "weights"),
    (flat_weights, "flat_weights"),
    (norms, "norms"),
    (sharpness, "sharpness"),
    (conflict, "conflict"),
    (cosines, "cosines"),
)


def has(arrays: _draw.Arrays, what: str) -> bool:
    # Cosines of two tasks: the diagonal alone is not worth a picture.
    values = arrays["conflict" if what == "cosines" else what]
    return bool(np.isfinite(values).any())


def _two_digits(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text
