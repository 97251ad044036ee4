"""Steps of single tasks on the shared parameters, made to look at the losses there and then undone.

Parameters are written in their own storage and come back bit for bit, so autograd is not told of it: a
graph that was built before can still be gone through afterwards.

Floor of a plain step, in elements of P: read 2 P, write P (``perturb_``); one more read and write of P to
save and to restore, once for all tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmtl.block import Block


class LookAhead(Protocol):
    """A way to step."""

    def begin(self, lr: float | Tensor) -> None:
        """Keeps the shared parameters as they are now.

        Args:
            lr: the step size of a plain step; a 0-dim tensor is not read on the host.
        """

    def move(self, row: Tensor, reached: Sequence[bool], inverse: Tensor) -> None:
        """Shared parameters <- those after a step on one gradient.

        Args:
            row: [P], the gradient.
            reached: for each parameter of the block, whether it takes part.
            inverse: float64 0-dim: the gradient is ``row`` times this; not finite: no step is made.
        """

    def restore(self) -> None:
        """Shared parameters <- as they were, bit for bit."""


class PlainStep:
    """theta - lr * g (Fifty et al., arXiv 2109.04617, Eq. 1): no momentum, no weight decay.

    Args:
        block: the shared parameters.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._lr: float | Tensor = 0.0
        self._saved = block.empty()

    def begin(self, lr: float | Tensor) -> None:
        """As in ``LookAhead``."""
        self._lr = lr
        self._block.copy_to(self._saved)

    def move(self, row: Tensor, reached: Sequence[bool], inverse: Tensor) -> None:
        """As in ``LookAhead``; what is not reached has a gradient of zero and stays."""
        lr = self._lr
        factor = inverse * lr.to(inverse) if isinstance(lr, Tensor) else inverse
        step = -1.0 if isinstance(lr, Tensor) else -lr
        # perturb_ divides by the root of a squared norm; it moves nothing where that is not finite
        self._block.shift(self._saved, row, factor.square().reciprocal(), step)

    def restore(self) -> None:
        """As in ``LookAhead``."""
        self._block.put_back(self._saved)


class OptimizerStep:
    """The step that the optimizer itself would make, with its momentum and weight decay.

    It is made by a copy of the optimizer on copies of the parameters and of its state: the optimizer, its
    hooks and its schedulers see nothing.

    Args:
        block: the shared parameters.
        optimizer: the optimizer.
    """

    def __init__(self, block: Block, optimizer: Optimizer) -> None:
        self._block = block
        self._optimizer = optimizer
        self._saved, self._at, self._grad = block.empty(), block.empty(), block.empty()
        # the copies of the parameters
        self._params = [view.detach().requires_grad_() for view in block.views(self._at)]

    def begin(self, lr: float | Tensor) -> None:
        """As in ``LookAhead``; the optimizer has its own ``lr``."""
        self._block.copy_to(self._saved)

    def move(self, row: Tensor, reached: Sequence[bool], inverse: Tensor) -> None:
        """As in ``LookAhead``; what is not reached has no gradient, as in a real step."""
        self._at.copy_(self._saved)
        torch.mul(row, inverse.to(self._grad.dtype), out=self._grad)
        for param, view, hit in zip(
            self._params, self._block.views(self._grad), reached, strict=True
        ):
            param.grad = view if hit else None
        other = shadow(self._optimizer, dict(zip(self._block.params, self._params, strict=True)))
        step = type(other).step
        # torch wraps it to call hooks, those registered for all optimizers among them
        step = step.__wrapped__ if hasattr(step, "hooked") else step  # type: ignore[attr-defined]
        step(other)
        # a closure may not bear parameters of NaN
        self._block.put_back(torch.where(inverse.isfinite(), self._at, self._saved))

    def restore(self) -> None:
        """As in ``LookAhead``."""
        self._block.put_back(self._saved)


def shadow(optimizer: Optimizer, copies: dict[Tensor, Tensor]) -> Optimizer:
    """An optimizer of the same kind and state for copies of some of its parameters; without its hooks.

    Args:
        optimizer: stays as it is.
        copies: a parameter -> its copy. Others are left out.
    """
    other: Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(p): q for p, q in copies.items()}
    # what a subclass keeps beside torch's own things; step, where a scheduler has wrapped it, is the
    # original's bound method
    own = {"defaults", "state", "param_groups", "step"}
    for name, value in vars(optimizer).items():
        if name not in own and "hooks" not in name:
            other.__dict__[name] = copy.deepcopy(value, memo)
    groups = []
    for group in optimizer.param_groups:
        params = [copies[p] for p in group["params"] if p in copies]
        if params:
            groups.append({**copy.copy(group), "params": params})
    Optimizer.__init__(other, groups, optimizer.defaults)
    for param, twin in copies.items():
        if param in optimizer.state:
            other.state[twin] = copy.deepcopy(optimizer.state[param], memo)
    return other


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps go on in the direction of earlier ones."""
    return any(
        group.get("momentum") or any(map(bool, group.get("betas", ())[:1]))
        for group in optimizer.param_groups
    )
