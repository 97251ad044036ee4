"""What is drawn of a series of steps: running means, gaps, the scale."""

from __future__ import annotations

import math

import numpy as np


def scale(values: np.ndarray, far: float) -> tuple[str, float]:
    """The scale's name and, for "symlog", the size up to which it is linear."""
    sizes = np.abs(values[np.isfinite(values)])
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return "linear", 0.0
    low, middle, high = np.quantile(sizes, [0.01, 0.5, 0.99])
    if high < far * (low if (values[np.isfinite(values)] > 0).all() else middle):
        return "linear", 0.0
    if (values[np.isfinite(values)] > 0).all():
        return "log", 0.0
    return "symlog", 10.0 ** math.ceil(math.log10(middle))


def window(steps: int, smooth: int | None, least: int = 1) -> int:
    if smooth is None:
        return min(steps, max(least, steps // 40))
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 1:
        raise ValueError(f"smooth must be an int from 1 on, or None, got {smooth!r}")
    return min(steps, smooth)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[N, K] -> the mean of the finite values around each; NaN where ``window`` steps have none."""
    known = np.isfinite(values)
    kernel = np.ones(window)

    def summed(numbers: np.ndarray) -> np.ndarray:
        start = (window - 1) // 2
        full = np.apply_along_axis(np.convolve, 0, numbers, kernel)
        return full[start : start + len(numbers)]

    count = np.rint(summed(known.astype(float)))
    with np.errstate(invalid="ignore"):
        mean = summed(np.where(known, values, 0.0)) / np.where(count > 0, count, np.nan)
    return mean


def lonely(values: np.ndarray) -> list[int]:
    """Where a value stands between gaps, so that a line alone would not show it."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of the values that are there; NaN, without a warning, where none is."""
    count = (~np.isnan(values)).sum(axis=axis)
    return np.nansum(values, axis=axis) / np.where(count > 0, count, np.nan)
