"""Other ways to a grouping or to a matrix: pair results (HOA), chance, clustering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flatmtl.grouping.names import Tasks
from flatmtl.grouping.scores import Affinity, Floats, read_matrix
from flatmtl.losses import TaskName

TRIES = 10_000


def hoa_matrix(
    single: Mapping[TaskName, float],
    pairs: Mapping[tuple[TaskName, TaskName], Mapping[TaskName, float]],
) -> tuple[Floats, list[TaskName]]:
    """The matrix of higher-order approximation (Standley et al., ICML 2020) from measured losses.

    Select with objective="hoa", and minimise=True if the results are losses.

    Args:
        single: task -> its result trained alone.
        pairs: (a, b) -> the results of a and of b trained together; every pair once, in any order.

    Returns:
        [T, T] float64 with the result of task t next to task j at [t, j] and alone at [t, t]; and the
        tasks, in the order of ``single``.

    Raises:
        ValueError: a pair is missing, comes twice, or lacks a result.
    """
    names = Tasks(list(single))
    matrix = np.full((len(names), len(names)), np.nan)
    for task, value in single.items():
        matrix[names.index(task, "single"), names.index(task, "single")] = value
    for pair, results in pairs.items():
        both = names.indices(pair, "pairs")
        if len(both) != 2:
            raise ValueError(f"pairs must hold pairs of two tasks, got {pair!r}")
        given = {names.index(task, "pairs"): value for task, value in results.items()}
        if set(given) != set(both):
            raise ValueError(
                f"pairs must have a result for each of the two tasks, got {dict(results)!r} for {pair!r}"
            )
        a, b = both
        if not np.isnan(matrix[a, b]):
            raise ValueError(f"pairs must have each pair once, got {pair!r} twice")
        matrix[a, b], matrix[b, a] = given[a], given[b]
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        a, b = (names.names[i] for i in bad[0])
        what = (
            f"single must be finite, got {a!r}"
            if a == b
            else "pairs must have finite results of all"
        )
        raise ValueError(what if a == b else f"{what} pairs, got none for {(a, b)!r}")
    return matrix, list(names.names)


def random_groups(
    tasks: Sequence[TaskName],
    max_groups: int,
    *,
    seed: int | np.random.Generator,
    partition: bool = False,
    allow_single: bool = False,
) -> list[tuple[TaskName, ...]]:
    """A random grouping that covers all tasks.

    Args:
        tasks: names of the tasks.
        max_groups: how many groups; fewer where there are not enough tasks for so many.
        seed: a number, or a generator to go on with.
        partition: disjoint groups: two tasks (one, if singles are allowed) for each group, the others
            anywhere. Otherwise each task is in a uniformly random non-empty set of groups.
        allow_single: whether a group may have one task.

    Returns:
        The groups, without duplicates.

    Raises:
        ValueError: fewer than two tasks without allow_single, or max_groups below 1.
    """
    names = Tasks(tasks)
    rng = np.random.default_rng(seed)
    n, least = len(names), 1 if allow_single else 2
    if max_groups < 1:
        raise ValueError(f"max_groups must be at least 1, got {max_groups}")
    if n < least:
        raise ValueError(f"tasks must be at least {least} (or allow_single), got {n}")
    if partition:
        groups = min(max_groups, n // least)
        label = np.concatenate([np.repeat(np.arange(groups), least), rng.integers(groups, size=n)])
        label = label[:n]
        order = rng.permutation(n)
        found = [tuple(sorted(order[label == g].tolist())) for g in range(groups)]
    else:
        found = _random_cover(n, min(max_groups, n), least, rng)
    return [names.group(group) for group in sorted(found)]


def _random_cover(
    n: int, groups: int, least: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    for _ in range(TRIES):
        inside = rng.random((n, groups)) < 0.5  # [T, groups]
        empty = ~inside.any(axis=1)
        while empty.any():
            inside[empty] = rng.random((int(empty.sum()), groups)) < 0.5
            empty = ~inside.any(axis=1)
        if (inside.sum(axis=0) >= least).all():
            return list({tuple(np.flatnonzero(column).tolist()) for column in inside.T})
    raise ValueError(
        f"max_groups must be smaller: {TRIES} draws of {groups} groups of {n} tasks all had one of "
        f"fewer than {least}"
    )


def cluster_groups(
    affinity: Affinity,
    max_groups: int,
    *,
    method: str = "spectral",
    tasks: Sequence[TaskName] | None = None,
    seed: int = 0,
    allow_single: bool = False,
) -> list[tuple[TaskName, ...]]:
    """Disjoint groups by clustering the symmetric part of an affinity matrix; any number of tasks.

    Args:
        affinity: a record or an array [T, T], larger is closer; the diagonal is not used.
        max_groups: how many clusters; fewer where tasks that are alone must join others.
        method: "spectral" (on the entries shifted to be positive) or "agglomerative" (average linkage).
        tasks: names of the tasks.
        seed: of the spectral method's k-means.
        allow_single: whether a cluster may have one task; otherwise it joins the cluster to which its
            mean affinity is largest.

    Returns:
        The clusters.

    Raises:
        ValueError: an argument is not as above.
        ImportError: scikit-learn is missing (``pip install flatmtl[clustering]``).
    """
    names, matrix = read_matrix(affinity, tasks, diagonal=False)
    if max_groups < 1:
        raise ValueError(f"max_groups must be at least 1, got {max_groups}")
    n = len(names)
    likeness = (matrix + matrix.T) / 2
    if method not in ("spectral", "agglomerative"):
        raise ValueError(f"method must be spectral or agglomerative, got {method!r}")
    if max_groups == 1 or n == 1:
        label = np.zeros(n, dtype=np.int64)
    elif max_groups >= n:
        label = np.arange(n)
    else:
        label = _labels(likeness, max_groups, method, seed)
    groups = [np.flatnonzero(label == g).tolist() for g in np.unique(label)]
    while not allow_single and len(groups) > 1 and min(map(len, groups)) == 1:
        alone = min(groups, key=len)
        groups.remove(alone)
        max(groups, key=lambda g: likeness[alone[0], g].mean()).extend(alone)
    return [names.group(sorted(group)) for group in sorted(map(sorted, groups))]


def _labels(likeness: Floats, clusters: int, method: str, seed: int) -> npt.NDArray[np.int64]:
    try:
        from sklearn import cluster
    except ImportError as error:
        raise ImportError(
            "cluster_groups needs scikit-learn: pip install flatmtl[clustering]"
        ) from error
    off = likeness[~np.eye(len(likeness), dtype=bool)]
    spread = float(np.ptp(off)) or 1.0
    near = (likeness - off.min()) / spread  # off the diagonal from 0 to 1
    model: Any
    if method == "spectral":
        near = near + 1e-6  # connected
        np.fill_diagonal(near, 1)
        model = cluster.SpectralClustering(clusters, affinity="precomputed", random_state=seed)
        return np.asarray(model.fit_predict(near))
    far = 1 - near
    np.fill_diagonal(far, 0)
    model = cluster.AgglomerativeClustering(clusters, metric="precomputed", linkage="average")
    return np.asarray(model.fit_predict(far))
