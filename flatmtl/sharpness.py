"""Sharpness: how far, and in which geometry, parameters are perturbed for the second gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass


def check_radius(name: str, value: object) -> float:
    """``value`` as a radius or a shift.

    Raises:
        TypeError, ValueError: it is no number, negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)


@dataclass(frozen=True)
class SAM:
    """Per-task sharpness-aware perturbation for FS-MTL (Phan et al., arXiv 2211.13723, Eq. 11).

    Task i's gradient is taken again at theta + eps_i, eps_i = rho g_i / ||g_i||, once over the shared
    parameters and once, with a norm of its own, over the task's own ones.

    Args:
        rho: radius, in the parameters' unit (0.05 is the usual start for SAM, Foret et al., arXiv
            2010.01412; too large a rho collapses training, see the README). The default of the
            parameter groups' ``"rho"``, which can be edited at any time.
        adaptive: ASAM's geometry (Kwon et al., arXiv 2102.11600), eps = rho (|theta| + eta)^2 g /
            || (|theta| + eta) g ||; rho is then 10 to 40 times larger for the same effect.
        eta: added to |theta| in the adaptive geometry. 0 is the widespread form without it.

    Raises:
        TypeError, ValueError: rho or eta is negative or no number.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_radius("rho", self.rho)
        check_radius("eta", self.eta)
