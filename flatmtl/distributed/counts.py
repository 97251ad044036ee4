"""What each rank's losses count for in the mean over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from flatmtl.losses import TaskName
from flatmtl.sharpness import check_radius

Samples: TypeAlias = float | Sequence[float] | Mapping[str, float] | None


def counts_of(samples: Samples, tasks: Sequence[TaskName]) -> dict[int, float]:
    """Task -> how many samples its loss is a mean of on this rank; {} where that was not said.

    Raises:
        TypeError, ValueError: they are no such numbers, one for each task.
    """
    if samples is None:
        return {}
    if isinstance(samples, Mapping):
        if set(samples) != set(tasks):
            raise ValueError(f"samples must have the tasks {list(tasks)}, got {list(samples)}")
        numbers = [samples[name] for name in tasks]  # type: ignore[index]
    elif isinstance(samples, Sequence) and not isinstance(samples, str):
        numbers = list(samples)
        if len(numbers) != len(tasks):
            raise ValueError(
                f"samples must have one entry for each of {len(tasks)} tasks, got {len(numbers)}"
            )
    else:
        numbers = [samples] * len(tasks)
    return {task: check_radius("samples", number) for task, number in enumerate(numbers)}
