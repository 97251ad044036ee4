"""Families of task gradients that solvers find easy, and ones that they do not."""

from __future__ import annotations

import numpy as np

FAMILIES = ["iid", "scales", "stationary", "parallel", "low_rank", "duplicates", "tiny", "huge",
            "mixed_norms"]  # fmt: skip


def family(rng: np.random.Generator, name: str, tasks: int, size: int) -> np.ndarray:
    """jac [tasks, size] in float64."""
    jac = rng.standard_normal((tasks, size))
    if name == "scales":  # one scale a task, over six decades
        jac *= 10 ** rng.uniform(-3, 3, (tasks, 1))
    elif name == "stationary":  # the mean gradient almost vanishes
        jac -= (1 - 1e-3) * jac.mean(axis=0)
    elif name == "parallel":  # all close to one direction, some against it
        signs = rng.choice([-1.0, 1.0], (tasks, 1))
        jac = signs * (rng.standard_normal(size) + 1e-3 * jac)
    elif name == "low_rank":
        rank = max(1, tasks // 3)
        jac = rng.standard_normal((tasks, rank)) @ rng.standard_normal((rank, size))
    elif name == "duplicates":
        jac = jac[rng.integers(0, (tasks + 1) // 2, tasks)]
    elif name == "tiny":
        jac *= 1e-8 / np.sqrt(size)
    elif name == "huge":
        jac *= 1e8 / np.sqrt(size)
    elif name == "mixed_norms":
        jac *= 10 ** rng.uniform(-8, 8, (tasks, 1)) / np.sqrt(size)
    elif name != "iid":
        raise ValueError(name)
    return jac
