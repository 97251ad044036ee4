"""Results of methods on several tasks as one number each, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flatmtl.measures.rankings import Floats, average_ranks


def _metrics(metrics: ArrayLike, least: int, shape: str) -> Floats:
    given = np.asarray(metrics, dtype=np.float64)
    if given.ndim < least or given.size == 0:
        raise ValueError(f"metrics must have shape {shape}, got {list(given.shape)}")
    return given


def _lower(lower_is_better: ArrayLike, tasks: int) -> np.ndarray:
    """bool [tasks]."""
    given = np.asarray(lower_is_better)
    if given.dtype != np.bool_:
        raise TypeError(f"lower_is_better must be a bool, or one a task, got {lower_is_better!r}")
    if given.ndim and given.shape != (tasks,):
        raise ValueError(
            f"lower_is_better must be one bool or {tasks}, one a task, got shape {list(given.shape)}"
        )
    return np.broadcast_to(given, (tasks,))


def delta_m(
    metrics: ArrayLike, baseline: ArrayLike, *, lower_is_better: ArrayLike
) -> float | Floats:
    """The mean relative change against a baseline over the tasks, in percent; negative is better.

    (100/T) sum_i (-1)^(l_i) (M_i - B_i)/B_i with l_i = 1 where higher is better (Maninis et al., arXiv
    1904.08918, with the sign of the tables for NYUv2, Cityscapes and QM9, where a lower number is
    better; theirs is the opposite). The baseline is usually single-task training.

    Args:
        metrics: [..., T], for example [methods, seeds, T]; a NaN makes the number of its row NaN.
        baseline: [T], above 0: relative to a number that is zero or negative, a change means nothing.
        lower_is_better: one bool for all tasks, or [T] of them.

    Returns:
        float64 [...]; a float where ``metrics`` is [T].

    Raises:
        TypeError: ``lower_is_better`` is no bool.
        ValueError: shapes do not fit, or ``baseline`` is not finite and above 0.
    """
    given = _metrics(metrics, 1, "[..., T]")
    tasks = given.shape[-1]
    base = np.asarray(baseline, dtype=np.float64)
    if base.shape != (tasks,):
        raise ValueError(
            f"baseline must have one entry for each of the {tasks} tasks, got shape {list(base.shape)}"
        )
    if not (np.isfinite(base) & (base > 0)).all():
        raise ValueError(f"baseline must be finite and above 0, got {base.tolist()}")
    sign = np.where(_lower(lower_is_better, tasks), 1.0, -1.0)
    change = 100.0 * (sign * ((given - base) / base)).mean(axis=-1)
    return float(change) if given.ndim == 1 else change


def mean_rank(metrics: ArrayLike, *, lower_is_better: ArrayLike) -> Floats:
    """The rank of each method, 1 the best, averaged over the tasks; equal ones share their mean rank.

    Args:
        metrics: [methods, T]. NaN, a method that has failed, is worse than any number.
        lower_is_better: one bool for all tasks, or [T] of them.

    Returns:
        float64 [methods].

    Raises:
        TypeError: ``lower_is_better`` is no bool.
        ValueError: shapes do not fit.
    """
    given = _metrics(metrics, 2, "[methods, T]")
    if given.ndim != 2:
        raise ValueError(f"metrics must have shape [methods, T], got {list(given.shape)}")
    cost = np.where(_lower(lower_is_better, given.shape[1]), given, -given)
    failed = np.isnan(cost)
    total = np.zeros(len(cost))
    for column, missing in zip(cost.T, failed.T, strict=True):
        sound = ~missing
        total[sound] += average_ranks(column[sound])
        total[missing] += (sound.sum() + 1 + len(column)) / 2
    return total / given.shape[1]


class MeanInterval(NamedTuple):
    """A mean and the confidence interval around it, each float64 [...].

    Attributes:
        mean: the mean.
        low: the interval's lower end; NaN from one value.
        high: its upper end; NaN from one value.
    """

    mean: Floats
    low: Floats
    high: Floats


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> MeanInterval:
    """The mean over the last axis with its interval by Student's t, mean +- t s/sqrt(n).

    For a handful of seeds: t is that of n - 1 degrees of freedom, exact to rounding (2.5 standard
    deviations for three seeds at 95 %). It takes the values for independent and about normal.

    Args:
        values: [..., n], for example ``delta_m`` of [methods, seeds, T].
        level: how often such an interval holds the true mean, between 0 and 1.

    Returns:
        mean, low, high.

    Raises:
        ValueError: no values, or ``level`` is not between 0 and 1.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim < 1 or given.size == 0:
        raise ValueError(f"values must have shape [..., n], got {list(given.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    n = given.shape[-1]
    mean = np.asarray(given.mean(axis=-1))
    if n == 1:
        unknown = np.full_like(mean, np.nan)
        return MeanInterval(mean, unknown, unknown.copy())
    half = _quantile(float(level), n - 1) * given.std(axis=-1, ddof=1) / math.sqrt(n)
    return MeanInterval(mean, np.asarray(mean - half), np.asarray(mean + half))


def _inside(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)) of Student's t: a finite sum (Abramowitz and Stegun 26.7.3-4)."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * square
        total += term
    if not odd:
        return sine * total
    return (angle + (sine * total if freedom > 1 else 0.0)) * 2 / math.pi


def _quantile(level: float, freedom: int) -> float:
    """The t with P(|t| < t) = level, by bisection on the angle."""
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _inside(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(high)
