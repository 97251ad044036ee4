"""Pictures of an ``AffinityRecord``: the matrix as a map, pairs of tasks by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flatmtl.plots import _draw, _names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flatmtl.affinity import AffinityRecord

TITLES = {
    "affinity": "affinity: 1 - loss after / loss before",
    "affinity_per_lr": "affinity / learning rate",
    "cosine": "cosine of the gradients",
    "first_order": "first-order affinity",
    "beyond_momentum": "affinity beyond the momentum's",
}
DIAGONAL = "#BBBBBB"
_MOST_PAIRS = len(_draw.COLOURS)
_FEW_PAIRS = 6
_MANY_CELLS = 400  # from here on a few outliers may leave the scale


def heatmap(
    ax: Axes,
    tasks: Sequence[int | str],
    matrix: np.ndarray,
    quantity: str,
    *,
    normalised: bool = False,
) -> None:
    names, count = _names.shown(tasks), len(tasks)
    others = np.where(np.isfinite(matrix), matrix, np.nan)
    np.fill_diagonal(others, np.nan)  # never used by the selection, and the eye would go there
    sizes = np.abs(others[~np.isnan(others)])
    end = float(np.quantile(sizes, 0.99) if len(sizes) >= _MANY_CELLS else sizes.max()) or 1.0
    factor, text = unit(end)
    values, end = others / factor, end / factor
    colours = _draw.matplotlib().colormaps["RdBu"].with_extremes(bad=_draw.PALE)
    image = ax.imshow(values, cmap=colours, vmin=-end, vmax=end)
    _grey_diagonal(ax, count)
    width, height = _draw.inches(ax)
    high = min(1.0, 0.85 * width / height)  # about as high as the square will be
    extend = "both" if (np.abs(sizes) / factor > end * (1 + 1e-9)).any() else "neither"
    bar = ax.figure.colorbar(
        image, ax=ax, shrink=high, aspect=28 * high, extend=extend, extendfrac=0.02
    )
    if text:
        bar.set_label(text)
    bar.outline.set_visible(False)
    cell = 72.0 * min(width, height) / count
    font, labelled = _draw.labels(count, cell)
    written = [names[i] for i in labelled]
    turned = max(map(len, written)) * 0.7 * font > cell * labelled.step
    ax.set_xticks(labelled, written, rotation=90 if turned else 0, fontsize=font)
    ax.set_yticks(labelled, written, fontsize=font)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="source (its gradient)", ylabel="recipient (its loss)")
    title = TITLES.get(quantity, quantity)
    ax.set_title(f"{title}, rows normalised" if normalised else title)
    size = min(11.0, 0.31 * cell)  # points; five characters must fit in a cell
    if size < 3.5:
        return  # nobody could read them
    for (i, j), value in np.ndenumerate(matrix / factor):
        dark = i != j and abs(value) > 0.6 * end
        ax.text(
            j, i, digits(value), ha="center", va="center",
            color="white" if dark else "#555555" if i == j else "black",
            fontsize=size if abs(value) < 99.995 else 0.8 * size,
        )  # fmt: skip


def _grey_diagonal(ax: Axes, count: int) -> None:
    from matplotlib.colors import ListedColormap

    mask = np.ma.masked_equal(np.eye(count), 0.0)
    ax.imshow(mask, cmap=ListedColormap([DIAGONAL]), interpolation="nearest")


def unit(end: float) -> tuple[float, str]:
    """What to divide by, so that two decimals say something: 1 for values about 1."""
    power = math.floor(math.log10(end))
    return (1.0, "") if -1 <= power <= 1 else (10.0**power, f"in $10^{{{power}}}$")


def digits(value: float) -> str:
    if np.isnan(value):
        return "–"
    if abs(value) >= 999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text


def over_time(
    ax: Axes, record: AffinityRecord, quantity: str, pairs: list[tuple[int, int]], legend: bool
) -> None:
    names = _names.shown(record.tasks, 16)
    mean, epochs = record.by_epoch(quantity), np.arange(len(record.steps))
    error = np.stack([record.standard_error(quantity, epoch) for epoch in range(len(epochs))])
    end = max((np.nanmax(np.abs(mean[:, i, j])) for i, j in pairs), default=1.0) or 1.0
    factor, text = unit(float(end))
    for k, (i, j) in enumerate(pairs):
        colour = _draw.COLOURS[k]
        values, wide = mean[:, i, j] / factor, np.nan_to_num(error[:, i, j]) / factor
        label = f"{names[i]} ← {names[j]}"
        if len(epochs) == 1:
            beside = epochs + 0.06 * (k - (len(pairs) - 1) / 2)  # not over one another
            ax.errorbar(beside, values, wide, fmt="o", capsize=3, color=colour, label=label)
            continue
        ax.fill_between(epochs, values - wide, values + wide, color=colour, alpha=0.15, lw=0)
        _draw.line(ax, epochs, values, color=colour, lw=1.8, label=label)
    low, high = ax.get_ylim()
    if low < 0.0 < high:
        ax.axhline(0.0, color="black", lw=0.8, alpha=0.6)
    _draw.by_step(ax)
    ax.set_xlabel("epoch")
    ax.set_ylabel("mean ± standard error" + (f", {text}" if text else ""))
    ax.set_title(f"{TITLES.get(quantity, quantity).split(':')[0]} of recipient ← source")
    if legend:
        low, high = ax.get_ylim()
        rows = math.ceil(len(pairs) / 2)
        ax.set_ylim(low, high + (high - low) * 0.09 * rows)  # above the lines
        ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")


def choose_pairs(
    record: AffinityRecord, quantity: str, given: Sequence[tuple[int | str, int | str]] | None
) -> list[tuple[int, int]]:
    """As (row, column): the ones given, or those that are largest in size."""
    if given is not None:
        if not 1 <= len(given) <= _MOST_PAIRS:
            raise ValueError(f"pairs must be 1 to {_MOST_PAIRS}, got {len(given)}")
        chosen = [(position(record.tasks, i), position(record.tasks, j)) for i, j in given]
    else:
        sizes = np.abs(record.matrix(quantity))
        np.fill_diagonal(sizes, np.nan)
        order = np.argsort(np.where(np.isfinite(sizes), -sizes, np.inf), axis=None, kind="stable")
        known = int(np.isfinite(sizes).sum())
        flat = order[: min(_FEW_PAIRS, known)]
        chosen = [divmod(int(at), len(record.tasks)) for at in flat]
    seen = record.counts(quantity)
    chosen = [(i, j) for i, j in chosen if seen[i, j]]
    if not chosen:
        raise ValueError("record must hold a measured pair of two tasks, got none")
    return chosen


def position(tasks: Sequence[int | str], name: int | str) -> int:
    if name not in tasks:
        raise ValueError(f"tasks must be among those of the record, got {name!r}")
    return list(tasks).index(name)
