"""What a closure may return, brought to one form: a name, a graph output and a value for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

TaskName: TypeAlias = int | str
Losses: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class TaskLosses:
    """The losses of one pass.

    Attributes:
        names: the tasks' names: the mapping's keys, or 0..T-1.
        outputs: where each task's backward starts.
        values: the losses, detached, as they came (same type and order).
    """

    names: list[TaskName]
    outputs: list[Tensor | GradientEdge]
    values: Losses
    dtypes: list[torch.dtype]
    devices: list[torch.device]

    def in_order(self, names: list[TaskName]) -> TaskLosses:
        """The same losses, task by task in the order of ``names``, which must be the same ones."""
        if names == self.names:
            return self
        at = [self.names.index(name) for name in names]
        ordered = TaskLosses(
            list(names),
            [self.outputs[k] for k in at],
            self.values,
            [self.dtypes[k] for k in at],
            [self.devices[k] for k in at],
        )
        self.outputs.clear()  # one holder of the graphs, who lets them go
        return ordered

    def gradients(
        self, task: int, params: Sequence[Tensor], *, retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradient of one task's loss; None for a parameter that it does not reach."""
        seed = torch.ones((), dtype=self.dtypes[task], device=self.devices[task])
        return torch.autograd.grad(
            self.outputs[task],
            params,
            grad_outputs=seed,
            retain_graph=retain_graph,
            allow_unused=True,
        )


def _one(name: TaskName, loss: object) -> Tensor:
    label = f"losses[{name!r}]"
    if not isinstance(loss, Tensor):
        raise TypeError(f"{label} must be a Tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{label} must be a scalar, got shape {list(loss.shape)}")
    if not loss.is_floating_point():
        raise TypeError(f"{label} must be floating-point, got {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError(
            f"{label} must have a graph to go back through (requires_grad), got a loss without one"
        )
    return loss.reshape(())


def _vector(losses: Tensor) -> list[Tensor | GradientEdge]:
    """Where the backward of each entry of a 1-D tensor starts.

    For torch.stack([...]) that is the stacked scalar itself: going through the stack would send a
    zero gradient into every other task (wasted work, and 0 * inf = NaN). Other ways to make the vector
    cannot be seen through.
    """
    node = losses.grad_fn
    if node is not None and node.name() == "StackBackward0":
        edges = node.next_functions
        for i, (origin, _) in enumerate(edges):
            if origin is None:
                raise ValueError(
                    f"losses[{i}] must have a graph to go back through (requires_grad), got a loss "
                    "without one"
                )
        return [GradientEdge(origin, number) for origin, number in edges if origin is not None]
    return [_one(i, loss) for i, loss in enumerate(losses)]


def read_losses(losses: object) -> TaskLosses:
    """Checks what a closure returned.

    Args:
        losses: a sequence of scalar tensors, a mapping from task names to them, or a 1-D tensor.

    Raises:
        ValueError, TypeError: it is none of these, is empty, or an entry has no graph.
    """
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.numel() == 0:
            raise ValueError(
                f"losses must be a 1-D tensor with one entry a task, got shape {list(losses.shape)}"
            )
        if not losses.requires_grad:
            raise ValueError(
                "losses must have a graph to go back through (requires_grad), got none"
            )
        outputs = _vector(losses)
        return TaskLosses(
            list(range(len(outputs))),
            outputs,
            losses.detach(),
            [losses.dtype] * len(outputs),
            [losses.device] * len(outputs),
        )
    if isinstance(losses, Mapping):
        entries = {name: _one(name, loss) for name, loss in losses.items()}
        values: Losses = {name: loss.detach() for name, loss in losses.items()}
        names: list[TaskName] = list(entries)
        tensors = list(entries.values())
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        tensors = [_one(i, loss) for i, loss in enumerate(losses)]
        values = [loss.detach() for loss in losses]
        if isinstance(losses, tuple):
            values = tuple(values)
        names = list(range(len(tensors)))
    else:
        raise TypeError(
            "losses must be a sequence of scalars, a mapping from task names to scalars or a 1-D "
            f"tensor, got {type(losses).__name__}"
        )
    if not tensors:
        raise ValueError("losses must hold at least one task, got none")
    return TaskLosses(
        names, list(tensors), values, [t.dtype for t in tensors], [t.device for t in tensors]
    )
