"""Checks of the weightings' options: each names the option, what it must be, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmtl.ops import _check

Vector = Tensor | Sequence[float]


def real(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a finite float within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    bounds = []
    sound = math.isfinite(value)
    if at_least is not None:
        bounds.append(f"at least {at_least}")
        sound = sound and value >= at_least
    if above is not None:
        bounds.append(f"above {above}")
        sound = sound and value > above
    if at_most is not None:
        bounds.append(f"at most {at_most}")
        sound = sound and value <= at_most
    if below is not None:
        bounds.append(f"below {below}")
        sound = sound and value < below
    if not sound:
        raise ValueError(f"{name} must be finite, {' and '.join(bounds)}, got {value}")
    return float(value)


def whole(name: str, value: object, *, at_least: int | None = None) -> int:
    """``value`` as an int from ``at_least`` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def vector(name: str, value: Vector, *, negative: bool = False) -> Tensor:
    """``value`` as a float64 tensor [T] of finite numbers, its own copy; ``negative`` ones are allowed."""
    try:
        if not isinstance(value, Tensor):  # a list of floats would be rounded to the default dtype
            value = torch.as_tensor(value, dtype=torch.float64)
        result = value.detach().to(torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, one a task, got {value!r}") from error
    if result.dim() != 1 or result.shape[0] < 1:
        raise ValueError(f"{name} must have shape [T], got {list(result.shape)}")
    if not bool(result.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {result.tolist()}")
    if not negative and bool((result < 0).any()):
        raise ValueError(f"{name} must not be negative, got {result.tolist()}")
    return result


def placed(name: str, value: Tensor | None, gram: Tensor) -> Tensor | None:
    """An option [T] on the Gram matrix's device; None stays None."""
    if value is None:
        return None
    tasks = _check.gram("gram", gram).shape[-1]
    if value.shape[0] != tasks:
        raise ValueError(
            f"{name} must have one entry for each of the {tasks} tasks, got {value.shape[0]}"
        )
    return value if value.device == gram.device else value.to(gram.device)
