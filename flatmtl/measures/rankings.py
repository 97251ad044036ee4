"""Whether one quantity orders things as another does: an indicator and the gain that it should foretell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1 of values [n] without NaN; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """The ranks of both."""
    given = {"a": np.asarray(a, dtype=np.float64), "b": np.asarray(b, dtype=np.float64)}
    for name, values in given.items():
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(
                f"{name} must have shape [n] with n at least 2, got shape {list(values.shape)}"
            )
        if np.isnan(values).any():
            raise ValueError(f"{name} must not hold NaN, got {int(np.isnan(values).sum())} of them")
    if len(given["a"]) != len(given["b"]):
        raise ValueError(f"b must be as long as a ({len(given['a'])}), got {len(given['b'])}")
    return average_ranks(given["a"]), average_ranks(given["b"])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank.

    Args:
        a: [n] numbers; infinities are ranked as such.
        b: [n] numbers.

    Returns:
        A number within [-1, 1]; NaN where all of ``a`` or all of ``b`` are equal.

    Raises:
        ValueError: not two vectors of one length, at least 2; or a NaN.
    """
    x, y = (ranks - (len(ranks) + 1) / 2 for ranks in _pair(a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(max(float(x @ y) / scale, -1.0), 1.0) if scale else math.nan


_CELLS = 1 << 20  # of pairs that are looked at together


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b: pairs in the same order minus pairs in opposite order, corrected for ties.

    (C - D) / sqrt((n0 - n_a)(n0 - n_b)) with n0 = n (n - 1)/2 pairs, n_a of them equal in ``a``, n_b in
    ``b``. The time grows with n^2.

    Args:
        a: [n] numbers; infinities are ordered as such.
        b: [n] numbers.

    Returns:
        A number within [-1, 1]; NaN where all of ``a`` or all of ``b`` are equal.

    Raises:
        ValueError: not two vectors of one length, at least 2; or a NaN.
    """
    x, y = _pair(a, b)
    agree = of_x = of_y = 0  # every pair counts twice in each
    step = max(1, _CELLS // len(x))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        p, q = np.sign(x[rows, None] - x), np.sign(y[rows, None] - y)
        agree += int((p * q).sum())
        of_x += np.count_nonzero(p)
        of_y += np.count_nonzero(q)
    scale = math.sqrt(of_x * of_y)
    return min(max(agree / scale, -1.0), 1.0) if scale else math.nan


def permutation_p(
    a: ArrayLike,
    b: ArrayLike,
    *,
    statistic: Callable[[ArrayLike, ArrayLike], float] = spearman,
    draws: int = 9999,
    seed: int = 0,
) -> float:
    """How likely a correlation at least as strong is by chance, two-sided, from random orders of ``b``.

    (1 + orders with |statistic| at least the observed one) / (1 + draws): never 0. Among all n! orders at
    least two are as strong as any: below 2 / n! it means nothing.

    Args:
        a: [n] numbers.
        b: [n] numbers.
        statistic: ``spearman`` or ``kendall``.
        draws: number of random orders.
        seed: of the orders.

    Returns:
        The p-value; NaN where the statistic is.

    Raises:
        ValueError: ``draws`` is below 1, or as the statistic does.
        TypeError: ``draws`` is no int.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws must be an int, got {type(draws).__name__}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    observed = abs(statistic(a, b))
    if math.isnan(observed):
        return math.nan
    rng = np.random.default_rng(seed)
    shuffled = np.array(b, dtype=np.float64)
    count = 0
    for _ in range(draws):
        rng.shuffle(shuffled)
        count += abs(statistic(a, shuffled)) >= observed - 1e-12  # a tie, summed in another order
    return (1 + count) / (1 + draws)
