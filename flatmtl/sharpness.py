"""Sharpness: how far, and in which geometry, parameters are perturbed for the second gradient."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Aggregate = Literal["decomposed", "direct", "second", "each"]
_AGGREGATES = ("decomposed", "direct", "second", "each")


def check_radius(name: str, value: object) -> float:
    """``value`` as a radius or a shift.

    Raises:
        TypeError, ValueError: it is no number, negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return number


def check_whole(name: str, value: object, least: int) -> int:
    """``value`` as a count.

    Raises:
        TypeError, ValueError: it is no whole number, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_flag(name: str, value: object) -> None:
    """Raises TypeError if ``value`` is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class SAM:
    """Per-task sharpness-aware perturbation for FS-MTL (Phan et al., arXiv 2211.13723, Eq. 11).

    Task i's gradient is taken again at theta + eps_i, eps_i = rho g_i / ||g_i||, once over the shared
    parameters and once, with a norm of its own, over the task's own ones.

    Args:
        rho: radius, in the parameters' unit (0.05 is the usual start for SAM, Foret et al., arXiv
            2010.01412; too large a rho collapses training, see the README). The default of the
            parameter groups' ``"rho"``, which can be edited at any time.
        rho_task: radius of the tasks' own parameters, the default of the groups' ``"rho_task"``; None:
            as ``rho``. (The paper writes two radii, its code has one.)
        adaptive: ASAM's geometry (Kwon et al., arXiv 2102.11600), eps = rho T^2 g / ||T g||, T = |theta| +
            eta; rho is then 10 to 40 times larger for the same effect. ``SAM(2.0, adaptive=True)`` is
            the widespread form (davda54/sam, the FS-MTL code), ``SAM(0.5, adaptive=True, eta=0.01,
            exempt_bias=True)`` that of ASAM's authors.
        eta: added to |theta| in the adaptive geometry.
        joint_norm: one norm over a task's shared and own parameters together, as in the paper's
            Multi-MNIST code, in place of one for each.
        aggregate: how the gradients g_i and s_i (at the perturbed parameters) become one update, A being
            the weighting and f_i = s_i - g_i. "decomposed", the paper's: A(g) + A(f). "direct": A(s).
            "second": A over the pair A(g), A(f). "each": A over h_i = A over the pair g_i, f_i. For
            weightings whose update does not shrink with its rows (NashMTL, FairGrad, PIVRG, MoCo) take
            "direct": decomposed, the small flat parts count as much as the gradients, or more.
        every: the perturbed passes run at every ``every``-th step only; in between, the flat part A(f)
            of the last of them is added as it was (after LookSAM, Liu et al., arXiv 2203.02714, which
            reuses the part of it orthogonal to the gradient, rescaled). "decomposed" only.
        exempt_bias: T = 1 for biases (parameters whose last name component contains "bias"; needs the
            optimizer's ``model=``).
        warmup: the radii grow linearly over this many steps: rho (n + 1) / warmup at step n.

    Raises:
        TypeError, ValueError: an argument is out of range, or needs another one.
    """

    rho: float = 0.05
    rho_task: float | None = None
    adaptive: bool = False
    eta: float = 0.0
    joint_norm: bool = False
    aggregate: Aggregate = "decomposed"
    every: int = 1
    exempt_bias: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        check_radius("rho", self.rho)
        if self.rho_task is not None:
            check_radius("rho_task", self.rho_task)
        check_radius("eta", self.eta)
        for name in ("adaptive", "joint_norm", "exempt_bias"):
            check_flag(name, getattr(self, name))
        if self.aggregate not in _AGGREGATES:
            raise ValueError(
                f"aggregate must be one of {', '.join(_AGGREGATES)}, got {self.aggregate!r}"
            )
        check_whole("every", self.every, 1)
        check_whole("warmup", self.warmup, 0)
        if self.every > 1 and self.aggregate != "decomposed":
            raise ValueError(
                "every must be 1 unless aggregate is 'decomposed' (only there is the flat part apart), "
                f"got {self.every} with {self.aggregate!r}"
            )
        if not self.adaptive and (self.eta or self.exempt_bias):
            raise ValueError("adaptive must be True for eta and exempt_bias to mean anything")


@dataclass(frozen=True)
class SAMO:
    """One shared perturbation and zeroth-order terms per task (SAMO, arXiv 2507.07883): cheaper than SAM.

    Task i is perturbed along (1 - beta) g + beta ||g|| z_i/||z_i|| (tensor by tensor), g being the gradient
    of the mean loss and z_i a random direction in which two forward passes without gradient found task
    i's loss to rise (SPSA). The weighting is applied once, to the gradients s_i at the perturbed
    parameters; a task's own parameters are perturbed along their own gradient. A step is 1 forward and 1
    backward, 2T forwards without gradient, T forwards and T backwards. One task whose gradient is not
    finite spoils the mean gradient: with ``nonfinite="mask"`` the step then leaves all of them out.

    Args:
        rho: radius (1e-3 in the authors' scripts with FairGrad; 1e-5 for QM9). The default of the groups'
            ``"rho"``.
        rho_task: radius of the tasks' own parameters, as in ``SAM``.
        beta: share of the tasks' own directions (0.5 in the authors' scripts; 0.9 for QM9).
        spsa_eps: how far the two forward passes lie from the parameters, along a standard normal z.
        adaptive: ASAM's geometry, eps = rho theta^2 g / || |theta| g ||.
        warmup: as in ``SAM``.
        seed: of the random directions; the global generators are left alone.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    rho: float = 0.001
    rho_task: float | None = None
    beta: float = 0.5
    spsa_eps: float = 0.01
    adaptive: bool = False
    warmup: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_radius("rho", self.rho)
        if self.rho_task is not None:
            check_radius("rho_task", self.rho_task)
        if check_radius("beta", self.beta) > 1:
            raise ValueError(f"beta must be at most 1, got {self.beta}")
        if not check_radius("spsa_eps", self.spsa_eps):
            raise ValueError("spsa_eps must be above 0, got 0")
        check_flag("adaptive", self.adaptive)
        check_whole("warmup", self.warmup, 0)
        check_whole("seed", self.seed, 0)


Sharpness = SAM | SAMO


def default_radii(sharpness: Sharpness | None, group: dict[str, Any]) -> None:
    """Gives a parameter group the radii that it lacks."""
    if sharpness is not None:
        group.setdefault("rho", sharpness.rho)
        group.setdefault("rho_task", sharpness.rho_task)


class Radii:
    """The radii of one step, read from the parameter groups as they are now.

    Attributes:
        shared: id(parameter) -> its radius if it is shared.
        own: id(parameter) -> its radius if it belongs to one task.
    """

    def __init__(self, sharpness: Sharpness, groups: Iterable[dict[str, Any]], step: int) -> None:
        grown = min(1.0, (step + 1) / sharpness.warmup) if sharpness.warmup else 1.0
        self.shared: dict[int, float] = {}
        self.own: dict[int, float] = {}
        for group in groups:
            default_radii(sharpness, group)  # a group may have come through the base optimizer
            rho = check_radius("rho", group["rho"]) * grown
            task = group["rho_task"]
            task = rho if task is None else check_radius("rho_task", task) * grown
            for param in group["params"]:
                self.shared[id(param)] = rho
                self.own[id(param)] = task

    def __bool__(self) -> bool:
        """Whether any parameter moves."""
        return any(self.shared.values()) or any(self.own.values())


def exempt_from_scaling(sharpness: Sharpness | None, model: nn.Module | None) -> set[int]:
    """Ids of the parameters that ``exempt_bias`` leaves out of the adaptive scaling.

    Raises:
        ValueError: there is no model to tell the names.
    """
    if not isinstance(sharpness, SAM) or not sharpness.exempt_bias:
        return set()
    if model is None:
        raise ValueError("model must be given with exempt_bias: it has the parameters' names")
    return {id(p) for name, p in model.named_parameters() if "bias" in name.rsplit(".", 1)[-1]}
