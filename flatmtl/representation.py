"""Per-task gradients at a feature tensor in place of the trunk's parameters (MGDA-UB style)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flatmtl import graph
from flatmtl.block import Block
from flatmtl.losses import Output


class Representation:
    """Task gradients are taken at the output of a module; one backward pass then runs through the trunk.

    The weighting sees the gradients of the losses with respect to the features z = module(...), as in
    MGDA-UB (Sener and Koltun, arXiv 1810.04650, sec. 3.3), and the trunk receives sum_i w_i dL_i/dz. For a
    weighting that does not look at the gradients (Mean, Sum, ...) that is the ordinary step; for the
    others it is an approximation of it, T times cheaper in the trunk's backward. J has as many columns
    as z has elements. Not with sharpness, which needs every task's own gradient in the trunk.

    Args:
        module: the part of the network whose output the tasks' heads start from. What stands before
            it is shared; what follows must belong to one task each.

    Raises:
        TypeError: ``module`` is no module.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self._recorder()

    def _recorder(self) -> Recorder:
        # looked up, not kept: a copied module has a copied recorder
        for hook in self.module._forward_hooks.values():
            if isinstance(hook, Recorder):
                return hook
        recorder = Recorder()
        handle = self.module.register_forward_hook(recorder)
        weakref.finalize(self, handle.remove)  # or the module would go on noting graphs
        return recorder

    def take(self, losses: Sequence[Output]) -> list[Tensor]:
        """The module's outputs since the last call that these losses depend on.

        Raises:
            RuntimeError: there are none.
        """
        recorder = self._recorder()
        outputs, recorder.outputs = recorder.outputs, []
        outputs = graph.leading_to(losses, outputs)
        if not outputs:
            raise RuntimeError(
                "jacobian's module must run in the forward pass, with gradients, and has not: "
                f"{type(self.module).__name__}"
            )
        return outputs

    def forget(self) -> None:
        """Drops the outputs since the last call: a step does without them."""
        self._recorder().outputs = []

    def __repr__(self) -> str:
        return f"Representation({type(self.module).__name__})"


class Recorder:
    """A forward hook that notes a module's outputs; a copy or pickle of it is empty."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        """Notes the tensors of one output that have a graph."""
        self.outputs += [
            t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.outputs = []


class Features:
    """The features of one forward pass, and the tasks' gradients at them as rows."""

    def __init__(self, tensors: Sequence[Tensor], tasks: int) -> None:
        self.tensors = list(tensors)
        self._tasks = tasks

    @cached_property
    def block(self) -> Block:
        """[T, F] rows; there is none where no task has a loss."""
        plain = [t.detach() for t in self.tensors]
        return Block(
            [t if t.is_contiguous() else t.contiguous() for t in plain],
            lambda k: f"output {k} of jacobian's module",
            self._tasks,
        )

    def backward(self, row: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient of ``params`` when the features receive ``row`` [F]."""
        return torch.autograd.grad(
            self.tensors, params, grad_outputs=self.block.views(row), allow_unused=True
        )
