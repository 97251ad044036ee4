"""The row methods in numpy, float64, from their formulas: a list of steps in, the updates out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Given(NamedTuple):
    """What one step is given: unscaled rows [T, P], losses [T], the tasks that count [T]."""

    rows: np.ndarray
    losses: np.ndarray
    sound: np.ndarray


def trimmed_mean(rows: np.ndarray, sound: np.ndarray, trim: int) -> np.ndarray:
    """Column by column, over the tasks that count; no more trimmed than leaves one or two."""
    rows = rows[sound]
    if len(rows) == 0:
        return np.zeros(rows.shape[1])
    trim = min(trim, (len(rows) - 1) // 2)
    return np.sort(rows, axis=0)[trim : len(rows) - trim].mean(0)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def moco(
    steps: Sequence[Given],
    *,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
    normalize: bool = True,
) -> list[np.ndarray]:
    tasks, size = steps[0].rows.shape
    y, lam, updates = np.zeros((tasks, size)), np.full(tasks, 1 / tasks), []
    for t, (rows, losses, on) in enumerate(steps, 1):
        for i in np.flatnonzero(on):
            h = rows[i]
            if normalize:
                length = np.linalg.norm(h)
                h = h * (losses[i] / length) if length > 0 else 0 * h
            y[i] -= beta / t**beta_sigma * (y[i] - h)
        if on.any():
            part = y[on]
            moved = lam[on] - gamma / t**gamma_sigma * (part @ part.T @ lam[on] + rho * lam[on])
            lam[on] = lam[on].sum() * _softmax(moved)
        updates.append(lam[on] @ y[on])
    return updates


def db_mtl(
    steps: Sequence[Given], *, beta: float = 0.9, beta_sigma: float = 0.0, eps: float = 1e-8
) -> list[np.ndarray]:
    y, updates = np.zeros_like(steps[0].rows), []
    for t, (rows, losses, on) in enumerate(steps, 1):
        b = beta / t**beta_sigma
        y[on] = b * y[on] + (1 - b) * rows[on] / (losses[on, None] + eps)
        norms = np.linalg.norm(y[on], axis=1)
        w = np.divide(norms.max(initial=0), norms, out=np.zeros_like(norms), where=norms > 0)
        updates.append(w @ y[on])
    return updates


def excess_mtl(
    steps: Sequence[Given], *, step: float = 1e-2, eps: float = 1e-7
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The update and the weights of every step."""
    tasks = len(steps[0].rows)
    squares, w, first = np.zeros_like(steps[0].rows), np.ones(tasks), np.zeros(tasks)
    updates = []
    for rows, _, on in steps:
        squares[on] += rows[on] ** 2
        excess = (rows[on] ** 2 / np.sqrt(squares[on] + eps)).sum(1)
        first[on] = np.where(first[on] == 0, excess, first[on])
        ratio = np.divide(excess, first[on], out=np.zeros_like(excess), where=first[on] > 0)
        if on.any():
            power = np.log(np.maximum(w[on], np.finfo(float).tiny)) + step * ratio
            w[on] = w[on].sum() * _softmax(power)
        updates.append((w[on] @ rows[on], np.where(on, w, 0)))
    return updates
