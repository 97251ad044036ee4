"""What the solvers share: ranks, active tasks, validity, the cosine form, ridges, the fallback.

csrc/solvers/problem.h is the same for the compiled bodies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatmtl.ops._status import (
    FALLBACK,
    INACTIVE_TASK,
    INVALID_GRAM,
    NO_ACTIVE_TASK,
    NOT_CONVERGED,
    RIDGE_RAISED,
)

LARGEST_RIDGE = 1e-6  # above the noise of a Gram matrix of float32 products
TOLERANCE = 1e-9  # a residual up to this is a solved problem
USELESS = 1e-2  # one above this is not worth using


def either_rank(*lifted: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets a solver of [B, T, T] take one [T, T] too.

    Args:
        *lifted: positions of the other arguments that have a leading B if the Gram matrix has one.
            They are passed on as views, so that a state is written in place.
    """

    def wrap(solve: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solve)
        def either(gram: Tensor, *rest: Any) -> Any:  # noqa: ANN401
            if gram.dim() == 3:
                return solve(gram.double(), *rest)
            batched = [x.unsqueeze(0) if k in lifted else x for k, x in enumerate(rest, 1)]
            result = solve(gram.double().unsqueeze(0), *batched)
            return tuple(x[0] for x in result) if isinstance(result, tuple) else result[0]

        return either

    return wrap


def settled(done: Tensor) -> bool:
    """Whether a loop may end early: asked of CPU tensors only, where reading does not wait."""
    return done.device.type == "cpu" and bool(done.all())


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where ``below`` is 0."""
    sound = below != 0
    return torch.where(sound, above / below.where(sound, torch.ones_like(below)), 0.0)


def mapped(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B, T, T], [B, T] -> [B, T]."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def pairs(active: Tensor) -> Tensor:
    """bool [B, T] -> [B, T, T]: both tasks take part."""
    return active.unsqueeze(2) & active.unsqueeze(1)


def find_active(gram: Tensor) -> Tensor:
    """gram [B, T, T] -> bool [B, T]: gradient neither zero nor non-finite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    alone = diagonal.isfinite() & (diagonal > 0)
    sound = gram.isfinite() & gram.mT.isfinite()
    return alone & (sound | ~alone.unsqueeze(1)).all(2)


def activity_bits(active: Tensor) -> Tensor:
    """bool [B, T] -> int64 [B]."""
    none, some = ~active.any(1), ~active.all(1)
    return none.long() * NO_ACTIVE_TASK + some.long() * INACTIVE_TASK


@dataclass(frozen=True)
class Problem:
    """Gram matrices opened for solving. In an invalid one no task is active.

    Attributes:
        gram: [B, T, T], as given; 0 in the rows and columns of inactive tasks.
        active: bool [B, T].
        norm: [B, T], 0 for an inactive task.
        inverse: [B, T], 1 / norm, 0 for an inactive task.
        cosine: [B, T, T], symmetric, 1 on the diagonal; an inactive task has the identity's row.
        bits: int64 [B], activity and validity.
    """

    gram: Tensor
    active: Tensor
    norm: Tensor
    inverse: Tensor
    cosine: Tensor
    bits: Tensor

    @property
    def tasks(self) -> int:
        """T."""
        return self.gram.shape[1]

    @property
    def valid(self) -> Tensor:
        """bool [B]."""
        return (self.bits & INVALID_GRAM) == 0

    @property
    def symmetric(self) -> Tensor:
        """The Gram matrix without what rounding made of its symmetry, [B, T, T]."""
        return 0.5 * (self.gram + self.gram.mT)

    def ridged(self, ridge: float) -> Tensor:
        """The cosine matrix with 1 + ridge on its diagonal, [B, T, T]."""
        eye = torch.eye(self.tasks, dtype=torch.float64, device=self.gram.device)
        return self.cosine + ridge * eye

    def equal_contributions(self) -> Tensor:
        """The fallback: w_i = (1/n_i) / sum_j (1/n_j), [B, T]."""
        share = ratio(self.inverse, self.inverse.amax(1, keepdim=True))
        return ratio(share, share.sum(1, keepdim=True))


def open_gram(gram: Tensor) -> Problem:
    """gram [B, T, T], float64.

    Raises:
        ValueError: it is on the CPU and not symmetric positive semi-definite. (On another device its
            problem gets the status bit.)
    """
    tasks = gram.shape[1]
    active = find_active(gram)
    bits = activity_bits(active)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    zero = gram.new_zeros(())
    gram = torch.where(pairs(active), gram, zero)
    norm = torch.where(active, diagonal, zero).sqrt()
    inverse = ratio(torch.ones_like(norm), norm)
    # scaled by one norm at a time: a product of two tiny norms could underflow
    scaled = gram * inverse.unsqueeze(2) * inverse.unsqueeze(1)
    eye = torch.eye(tasks, dtype=torch.float64, device=gram.device)
    cosine = (0.5 * (scaled + scaled.mT)).clamp(-1, 1) * (1 - eye) + eye

    # What rounding cannot do to a Gram matrix.
    negative = (diagonal < 0) & diagonal.isfinite()
    skew = (scaled - scaled.mT).abs() > 1e-4
    large = scaled.abs() > 1.01
    indefinite = torch.linalg.cholesky_ex(cosine + 1e-2 * eye).info != 0
    invalid = negative.any(1) | (skew | large).flatten(1).any(1) | indefinite
    if gram.device.type == "cpu" and bool(invalid.any()):
        raise ValueError(
            "gram must be symmetric and positive semi-definite, as one of gradients' products is; "
            f"problem {int(invalid.long().argmax())} of the batch is not"
        )
    keep = ~invalid.unsqueeze(1)
    return Problem(
        gram=torch.where(keep.unsqueeze(2), gram, zero),
        active=active & keep,
        norm=norm * keep,
        inverse=inverse * keep,
        cosine=torch.where(keep.unsqueeze(2), cosine, eye),
        bits=bits + invalid.long() * INVALID_GRAM,
    )


class Attempt(NamedTuple):
    """What a solve with one ridge came to.

    Attributes:
        solution: [B, T].
        residual: [B], the largest backward error of its equations.
        sound: bool [B]; where False, a larger ridge is tried.
    """

    solution: Tensor
    residual: Tensor
    sound: Tensor


def with_rising_ridge(attempt: Callable[[float], Attempt], ridge: float) -> tuple[Attempt, Tensor]:
    """The attempt with the smallest ridge that is sound, and status bits [B].

    A Gram matrix of rounded products can be indefinite by more than a small ridge. The ridge then
    grows a hundredfold, up to ``LARGEST_RIDGE``: tried on every problem, kept where it was needed.
    """
    best = attempt(ridge)
    raised = torch.zeros_like(best.sound)
    while ridge < LARGEST_RIDGE and not settled(best.sound):
        ridge = min(100 * ridge, LARGEST_RIDGE) if ridge > 1e-12 else 1e-10
        again = attempt(ridge)
        raised = raised | ~best.sound
        best = Attempt(
            torch.where(best.sound.unsqueeze(1), best.solution, again.solution),
            torch.where(best.sound, best.residual, again.residual),
            best.sound | again.sound,
        )
    return best, raised.long() * RIDGE_RAISED + (~best.sound).long() * NOT_CONVERGED


def backward_error(total: Tensor, magnitude: Tensor) -> Tensor:
    """|sum of terms| / sum of |terms|; 0 / 0 is 0."""
    return ratio(total.abs(), magnitude)


def largest(values: Tensor) -> Tensor:
    """[B, T] -> [B]; NaN if there is one."""
    return values.amax(1)


def conclude(
    problem: Problem, weights: Tensor, bits: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, T], bits [B] and residual [B] of a solve -> what the operator returns.

    Inactive tasks get 0; weights of no use give way to the fallback.
    """
    some = problem.active.any(1)
    residual = torch.where(some, residual, 0.0)
    weights = torch.where(problem.active, weights, 0.0)
    broken = ~weights.isfinite().all(1) | ~(residual <= USELESS)
    bits = torch.where(residual <= TOLERANCE, bits, bits | NOT_CONVERGED)
    bits = torch.where(broken, bits | NOT_CONVERGED | FALLBACK, bits)
    weights = torch.where(broken.unsqueeze(1), problem.equal_contributions(), weights)
    return weights, problem.bits | torch.where(some, bits, 0), residual


def limit_norm(gram: Tensor, weights: Tensor, max_norm: float) -> Tensor:
    """gram [B, T, T], weights [B, T] -> weights with ||d|| at most ``max_norm``; 0: no bound."""
    if max_norm <= 0:
        return weights
    used = weights != 0  # the other rows may hold NaN
    gram = torch.where(pairs(used), gram, 0.0)
    norm = (weights * mapped(gram, weights)).sum(1, keepdim=True).clamp(min=0).sqrt()
    return weights * torch.where(norm > max_norm, max_norm / norm, 1.0)
