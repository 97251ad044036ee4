"""How alike tasks are: [T, T] matrices for ``order_tasks``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flatmtl.curriculum._arrays import Floats, Numbers, floats, square, symmetric
from flatmtl.grouping.scores import Affinity, read_matrix

_CANCELLED = 1e-14  # of the samples' size: below it a mean is what rounding has left of zero


def from_embeddings(embeddings: Numbers | Sequence[Numbers]) -> Floats:
    """The cosines of the tasks' mean embeddings.

    Data-CUBE (arXiv 2401.03563) orders tasks by the cosines of the mean embeddings of queries drawn at
    random from each task, made by a pre-trained encoder; as read in summaries of that paper.

    Args:
        embeddings: one entry a task: [n_i, d], a sample a row, or [d], a mean. An array [T, n, d] or
            [T, d] is the same. Arrays or tensors of any real dtype on any device; d is the same for all.

    Returns:
        [T, T] float64, symmetric, from -1 to 1, with 1 on the diagonal. A task whose mean is zero has
        similarity 0 to all, itself too. In float64 throughout, whatever the embeddings' size.

    Raises:
        TypeError: an entry does not hold real numbers.
        ValueError: no tasks, an entry of another shape, without samples, or not finite.
    """
    if isinstance(embeddings, (np.ndarray, torch.Tensor)) and embeddings.ndim < 2:
        raise ValueError(
            "embeddings must have an entry [n, d] or [d] for each task, got shape "
            f"{list(embeddings.shape)}"
        )
    directions = [_direction(f"embeddings[{t}]", entry) for t, entry in enumerate(embeddings)]  # type: ignore[arg-type]
    if not directions:
        raise ValueError("embeddings must have an entry for each task, got none")
    for t, direction in enumerate(directions):
        if len(direction) != len(directions[0]):
            raise ValueError(
                f"embeddings[{t}] must be of dimension {len(directions[0])}, as the first one, "
                f"got {len(direction)}"
            )
    return _cosines(np.stack(directions))


def _direction(name: str, given: Numbers) -> Floats:
    """[d] the mean as a vector of length 1, or zeros."""
    values = floats(name, given)
    if values.ndim not in (1, 2) or not values.size:
        raise ValueError(
            f"{name} must have shape [n, d] or [d], none of them 0, got {list(values.shape)}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")
    largest = float(np.abs(values).max())
    if largest == 0:
        return np.zeros(values.shape[-1])
    values = np.atleast_2d(values) / largest  # squares neither overflow nor vanish
    mean = values.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length <= _CANCELLED * float(np.linalg.norm(values, axis=1).mean()):
        return np.zeros_like(mean)
    return np.asarray(mean / length)


def _cosines(directions: Floats) -> Floats:
    found = np.clip(directions @ directions.T, -1, 1)
    np.fill_diagonal(found, directions.any(axis=1))
    return np.asarray((found + found.T) / 2)


def from_gram(gram: Numbers) -> Floats:
    """The cosines of the tasks' gradients, from their Gram matrix J J^T.

    Args:
        gram: [T, T], the dot products of the tasks' gradients: ``flatmtl.ops.gram``.

    Returns:
        [T, T] float64, symmetric, from -1 to 1, with 1 on the diagonal. A task whose gradient is zero
        has similarity 0 to all, itself too.

    Raises:
        TypeError: it does not hold real numbers.
        ValueError: not square, not finite, not symmetric, or negative on the diagonal.
    """
    matrix = square("gram", gram)
    if not np.isfinite(matrix).all():
        raise ValueError(f"gram must be finite, got {matrix[~np.isfinite(matrix)][0]}")
    diagonal = np.diagonal(matrix)
    if (diagonal < 0).any():
        raise ValueError(f"gram must not be negative on its diagonal, got {diagonal.min():.6g}")
    norms = np.sqrt(diagonal)
    alive = norms > 0
    size = np.where(alive, norms, 1.0)
    # one norm after the other: their product may overflow
    found = np.where(alive[:, None] & alive, matrix / size[:, None] / size, 0.0)
    found = np.clip(symmetric("gram", found, " as cosines"), -1, 1)
    np.fill_diagonal(found, alive)
    return found


def from_affinity(affinity: Affinity) -> Floats:
    """The mean of both directions of an affinity matrix, (A + A^T) / 2.

    An affinity is what a step on one task does to the loss of another, so it has a direction; being
    next to each other in an order has none. (A record's cosines are symmetric as they are:
    ``record.matrix("cosine")``.)

    Args:
        affinity: an ``AffinityRecord``, or an array [T, T], row = recipient. Its diagonal is not used.

    Returns:
        [T, T] float64, symmetric, zeros on the diagonal.

    Raises:
        ValueError: not square, or a pair was not measured.
    """
    matrix = read_matrix(affinity, None, diagonal=False)[1] / 2
    return np.asarray(matrix + matrix.T)
