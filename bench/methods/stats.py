"""Means over seeds with their intervals, differences in pairs, and the correction for many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, half of its 95 % t-interval, and the two-sided p-value of its being 0; NaN where unknown."""

    mean: float
    half: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half


def over_seeds(values: np.ndarray) -> Estimate:
    """One sample [S]; with one value there is no interval."""
    return stratified(np.asarray(values, dtype=float)[None])


def stratified(values: np.ndarray) -> Estimate:
    """The mean over data sets of the means over seeds, with the noise of seeds alone.

    The data sets are these and no sample of others: how much they differ is no part of the interval. Their
    variances may differ; degrees of freedom by Welch and Satterthwaite.

    Args:
        values: [D, S], D data sets, S seeds.
    """
    sets, seeds = values.shape
    mean = float(values.mean())
    if seeds < 2:
        return Estimate(mean, math.nan, math.nan)
    parts = values.var(axis=1, ddof=1) / seeds / sets**2  # [D]
    error = math.sqrt(parts.sum())
    if not error > 0:
        return Estimate(mean, 0.0, 1.0 if mean == 0 else 0.0)
    freedom = parts.sum() ** 2 / (parts**2 / (seeds - 1)).sum()
    return Estimate(
        mean,
        float(stats.t.ppf(0.975, freedom) * error),
        float(2 * stats.t.sf(abs(mean) / error, freedom)),
    )


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values: below 0.05 together at an error of at most 5 % for all of them."""
    order = np.argsort(p)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = highest
    return adjusted
