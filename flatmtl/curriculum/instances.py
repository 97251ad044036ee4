"""Samples from easy to hard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from flatmtl.curriculum._arrays import Floats, Numbers, floats

Indices: TypeAlias = npt.NDArray[np.int64]

_ROWS = 1 << 14  # at a time: a copy in float64 of so many


def difficulty_margin(query: Numbers, positive: Numbers, negative: Numbers) -> Floats:
    """How much closer a query is to what it should match than to what it should not.

    cos(query, positive) - cos(query, negative), from -2 to 2; large is easy. Data-CUBE (arXiv 2401.03563)
    measures a sample's difficulty by how well its positive and its negative can be told apart. Its formula
    was not verified; this one is a stand-in.

    Args:
        query: [n, d] embeddings, arrays or tensors of any real dtype on any device.
        positive: [n, d].
        negative: [n, d].

    Returns:
        [n] float64. The cosine with a zero embedding is 0.

    Raises:
        TypeError: an argument does not hold real numbers.
        ValueError: the shapes differ, or an entry is not finite.
    """
    given = {"query": query, "positive": positive, "negative": negative}
    parts = {k: v if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in given.items()}
    shape = list(parts["query"].shape)
    for name, part in parts.items():
        if len(shape) != 2 or list(part.shape) != shape:
            wanted = "[n, d]" if len(shape) != 2 else f"{shape}, as query has,"
            raise ValueError(f"{name} must have shape {wanted} got {list(part.shape)}")
    margin = np.empty(shape[0])
    for at in range(0, shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        q, p, n = (_unit(name, part[rows]) for name, part in parts.items())
        margin[rows] = np.einsum("nd,nd->n", q, p) - np.einsum("nd,nd->n", q, n)
    return margin


def _unit(name: str, given: Numbers) -> Floats:
    """[n, d] rows of length 1; those of zeros stay."""
    rows = floats(name, given)
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite, got {rows[~np.isfinite(rows)][0]}")
    for size in (np.abs(rows).max(axis=1, initial=0), None):  # squares neither overflow nor vanish
        length = np.linalg.norm(rows, axis=1) if size is None else size
        rows /= np.where(length > 0, length, 1.0)[:, None]
    return rows


def order_instances(
    easiness: Numbers,
    *,
    drop: float = 0.0,
    tasks: Sequence[object] | npt.NDArray[np.generic] | torch.Tensor | None = None,
) -> Indices:
    """The samples from easy to hard, without the hardest.

    Data-CUBE sorts a task's samples so and leaves out the hardest as noise; which share is not known,
    so that none is left out by default.

    Args:
        easiness: [n], larger is easier: margins as they are, losses with a minus sign. May be infinite.
        drop: the share of samples to leave out, the hardest ones, from 0 up to but without 1; rounded
            down to whole samples.
        tasks: [n] the task of each sample; the share is then left out of each task by itself.

    Returns:
        int64 indices of the samples left, easy to hard; equals in the order in which they came.

    Raises:
        TypeError: easiness does not hold real numbers, or drop is none.
        ValueError: easiness is not 1-D or has NaN, drop is out of range, or tasks is of another length.
    """
    values = floats("easiness", easiness)
    if values.ndim != 1:
        raise ValueError(f"easiness must have shape [n], got {list(values.shape)}")
    if np.isnan(values).any():
        raise ValueError(
            f"easiness must not be NaN, got it at [{int(np.flatnonzero(np.isnan(values))[0])}]"
        )
    if not isinstance(drop, Real) or isinstance(drop, bool):
        raise TypeError(f"drop must be a number, got {type(drop).__name__}")
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be from 0 up to but without 1, got {drop}")
    order = np.argsort(-values, kind="stable").astype(np.int64)
    place = np.zeros(len(values), dtype=np.int64) if tasks is None else labels(tasks)[1]
    if len(place) != len(values):
        raise ValueError(f"tasks must have {len(values)} entries, as easiness, got {len(place)}")
    kept = np.ones(len(order), dtype=np.bool_)
    for members in split(place[order]):
        # 0.29 * 100 is a little less than 29
        number = math.floor(float(drop) * len(members) + 1e-9)
        kept[members[len(members) - number :]] = False
    return np.asarray(order[kept])


def labels(
    given: Sequence[object] | npt.NDArray[np.generic] | torch.Tensor,
) -> tuple[npt.NDArray[np.generic], Indices]:
    """The different tasks of samples, sorted, and the place of each sample's task among them."""
    values = given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if values.dtype == object:  # a column of strings in pandas
        values = np.asarray(values.tolist())
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iuU"):
        raise ValueError(
            "tasks must have the name of a task, all ints or all strings, for each sample, got "
            f"{values.dtype} of shape {list(values.shape)}"
        )
    names, place = np.unique(values, return_inverse=True)
    return names, place.astype(np.int64)


def split(place: Indices) -> list[Indices]:
    """For each task the positions of its samples, ascending."""
    order = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place)) if len(place) else np.zeros(0, dtype=np.int64)
    return [np.asarray(part) for part in np.split(order, ends[:-1])]
