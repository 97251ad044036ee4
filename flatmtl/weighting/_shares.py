"""What several methods of losses do: shares among the tasks that are there, options with one entry a task."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl.weighting import _options


def shares(values: Tensor, there: Tensor | None, temperature: float = 1.0) -> Tensor:
    """n times the softmax of values / temperature over the n tasks that are there, [T]; 0 for the others."""
    if there is None:
        return among(values, None, temperature).mul_(values.shape[0])
    return among(values, there, temperature).mul_(there.sum())


def among(values: Tensor, there: Tensor | None, temperature: float = 1.0) -> Tensor:
    """The softmax of values / temperature over the tasks that are there, [T]; 0 for the others.

    NaN where none is there. The temperature may be as small as numbers are.
    """
    if there is not None:
        values = torch.where(there, values, -torch.inf)
    if temperature != 1.0:  # the largest goes first: a quotient of what is left does not overflow
        values = (values - values.max()).div_(temperature)
    return values.softmax(0)


def per_task(name: str, value: Tensor, losses: Tensor) -> Tensor:
    """An option [T] on the losses' device.

    Raises:
        ValueError: it has not one entry for each task.
    """
    if value.shape != losses.shape:
        raise ValueError(
            f"{name} must have one entry for each of the {losses.shape[0]} tasks, got {value.shape[0]}"
        )
    return value if value.device == losses.device else value.to(losses.device)


def optional(name: str, value: _options.Vector | None, *, negative: bool = False) -> Tensor | None:
    """An option with one entry a task, float64 [T]; None stays None."""
    return None if value is None else _options.vector(name, value, negative=negative)
