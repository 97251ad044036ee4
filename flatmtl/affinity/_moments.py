"""Means and sums of squared deviations of parts, merged into those of the whole (Chan et al.)."""

from __future__ import annotations

import numpy as np


def merged(
    mean: np.ndarray, m2: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the parts along the first axis: mean (NaN where nothing is), m2 (0 there) and count."""
    total = count.sum(axis=0)
    known = np.where(count > 0, mean, 0.0)  # [E, ...]
    shape = np.full(total.shape, np.nan)
    centre = np.divide((count * known).sum(axis=0), total, out=shape, where=total > 0)
    # A part that has nothing lies at the centre of the others, and so adds nothing.
    apart = np.where(count > 0, mean - centre, 0.0)
    spread = np.where(count > 0, m2, 0.0) + count * apart**2
    return centre, spread.sum(axis=0), total


def standard_error(m2: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Of a mean over ``count`` samples; NaN below two."""
    known = count > 1
    n = np.where(known, count, 2).astype(np.float64)
    return np.where(known, np.sqrt(m2 / (n * (n - 1.0))), np.nan)


def running(mean: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean over the parts up to each one; NaN as long as nothing is."""
    total = np.cumsum(count, axis=0)
    known = np.cumsum(count * np.where(count > 0, mean, 0.0), axis=0)
    return np.divide(known, total, out=np.full(total.shape, np.nan), where=total > 0)
