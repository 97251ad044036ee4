"""The sizes that are measured, those that matter most first: what time does not allow is at the end."""

from __future__ import annotations

import torch

TASKS = (8, 2, 3, 4, 16, 32, 40, 64)
COLUMNS = (25_000_000, 100_000_000, 10_000_000, 1_000_000)
SOLVER_TASKS = (8, 2, 4, 16, 40, 64)
DTYPES = (torch.float32, torch.bfloat16)
MOST_BYTES = 60e9  # of the matrices of task gradients together

QUICK_TASKS = (8, 2)
QUICK_COLUMNS = (20_000,)

MAIN_TASKS, MAIN_COLUMNS = 8, 25_000_000  # of the aggregate, and where torch.compile takes part


def tasks(quick: bool) -> tuple[int, ...]:
    """T."""
    return QUICK_TASKS if quick else TASKS


def columns(quick: bool) -> tuple[int, ...]:
    """P."""
    return QUICK_COLUMNS if quick else COLUMNS
