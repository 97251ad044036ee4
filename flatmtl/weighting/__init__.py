"""Weightings: from the Gram matrix of the task gradients to one weight a task."""

from __future__ import annotations

from typing import Any

from flatmtl.weighting._base import SolveStatus, Weighting
from flatmtl.weighting.mean import Mean, Sum
from flatmtl.weighting.mgda import MGDA
from flatmtl.weighting.pcgrad import PCGrad

__all__ = ["METHODS", "MGDA", "Mean", "PCGrad", "SolveStatus", "Sum", "Weighting", "by_name"]

#: name -> class
METHODS: dict[str, type[Weighting]] = {"mean": Mean, "sum": Sum, "pcgrad": PCGrad, "mgda": MGDA}


def by_name(name: str, **options: Any) -> Weighting:  # noqa: ANN401
    """A weighting by its name, as in ``by_name("pcgrad", seed=3)``.

    Args:
        name: one of ``METHODS``; upper and lower case are the same.
        **options: the method's own.

    Raises:
        TypeError, ValueError: no method has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    method = METHODS.get(name.lower())
    if method is None:
        raise ValueError(f"name must be one of {', '.join(sorted(METHODS))}, got {name!r}")
    return method(**options)
