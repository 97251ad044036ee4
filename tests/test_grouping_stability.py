"""How often redrawn affinities choose which groups."""

from __future__ import annotations

import numpy as np
import pytest

from flatmtl import AffinityRecord
from flatmtl.grouping import select_groups, stability

PAIRS = [("a", "b"), ("c", "d")]


def record(matrix, error, steps=25):
    """Of a given mean and standard error [T, T]."""
    m2 = np.asarray(error) ** 2 * steps * (steps - 1)
    count = np.full(m2.shape, steps)
    return AffinityRecord(
        tasks=list("abcd")[: len(m2)],
        mean={"affinity": np.asarray(matrix)[None]},
        m2={"affinity": m2[None]},
        count={"affinity": count[None]},
        steps=np.array([steps]),
    )


def paired(gap):
    matrix = np.zeros((4, 4))
    matrix[[0, 1, 2, 3], [1, 0, 3, 2]] = gap
    return matrix


def test_without_noise_one_selection(rng):
    matrix = rng.standard_normal((4, 4))
    found = stability(record(matrix, np.zeros((4, 4))), 2, draws=5)
    ((groups, share),) = found.selections
    assert share == 1.0
    assert set(groups) == set(select_groups(matrix, 2, tasks=list("abcd")).groups)
    assert set(np.unique(found.together)) <= {0.0, 1.0}
    assert (np.diag(found.together) == 1).all()


def test_shares_follow_the_noise(rng):
    seed = int(rng.integers(2**31))
    clear = stability(record(paired(1.0), np.full((4, 4), 0.01)), 2, seed=seed)
    assert dict(clear.selections)[tuple(PAIRS)] == 1.0
    assert clear.together[0].tolist() == [1, 1, 0, 0]
    lost = stability(record(paired(0.01), np.full((4, 4), 1.0)), 2, seed=seed)
    assert len(lost.selections) > 5
    assert abs(sum(share for _, share in lost.selections) - 1) < 1e-12
    shares = [share for _, share in lost.selections]
    assert shares == sorted(shares, reverse=True)
    assert "others" in str(lost)
    assert "100.0 %  {a, b} {c, d}" in str(clear)


def test_a_coin(rng):
    """Three tasks, where the first is served with b or with c: the share is that of a normal difference."""
    matrix = np.array([[0.0, 0.5, 0.2], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    error = np.zeros((3, 3))
    error[0, 1] = error[0, 2] = 0.3
    found = stability(record(matrix, error), 1 + 1, draws=2000, seed=int(rng.integers(2**31)))
    # a is with b where 0.5 + 0.3 x > 0.2 + 0.3 y: Phi(0.3 / (0.3 sqrt(2))) = 0.7602
    assert abs(found.together[0, 1] - 0.7602) < 5 * np.sqrt(0.76 * 0.24 / 2000)


def test_options_and_seeds_go_through(rng):
    one = record(rng.standard_normal((4, 4)), np.full((4, 4), 0.5))
    found = stability(one, 2, must_not=[("a", "b")], draws=50, seed=3)
    assert found.together[0, 1] == 0
    again = stability(one, 2, must_not=[("a", "b")], draws=50, seed=3)
    assert again.selections == found.selections
    assert stability(one, 2, draws=50, seed=4).selections != found.selections


def test_bad_input(rng):
    error = np.full((4, 4), 0.1)
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        stability(record(paired(1.0), error), 2, draws=0)
    with pytest.raises(ValueError, match="at least two measured steps of every pair"):
        stability(record(paired(1.0), error, steps=1), 2)
    with pytest.raises(ValueError, match="max_groups"):
        stability(record(paired(1.0), error), 0)
