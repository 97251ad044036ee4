"""What a closure may return, brought to one form: a name, a graph output and a value for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from flatmtl.shards import any_sharded, local_of

TaskName: TypeAlias = int | str
Losses: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]
Output: TypeAlias = Tensor | GradientEdge


@dataclass(frozen=True)
class TaskLosses:
    """The losses of one pass.

    Attributes:
        names: the tasks' names: the mapping's keys, or 0..T-1.
        outputs: where each task's backward starts; None for a task that is missing from the batch.
        detached: each task's loss without its graph; None if missing.
        values: the losses, detached, as they came (same type and order).
        together: whether the losses are entries of one tensor, whose backward passes through all tasks.
    """

    names: list[TaskName]
    outputs: list[Output | None]
    detached: list[Tensor | None]
    values: Losses
    together: bool = False

    def in_order(self, names: list[TaskName]) -> TaskLosses:
        """The same losses, task by task in the order of ``names``, which must be the same ones."""
        if names == self.names:
            return self
        at = [self.names.index(name) for name in names]
        ordered = TaskLosses(
            list(names),
            [self.outputs[k] for k in at],
            [self.detached[k] for k in at],
            self.values,
            self.together,
        )
        self.outputs.clear()  # one holder of the graphs, who lets them go
        return ordered

    @property
    def present(self) -> list[int]:
        """The positions of the tasks that have a loss in this batch."""
        return [task for task, loss in enumerate(self.detached) if loss is not None]

    def output(self, task: int) -> Output:
        """Where the backward of a task that is present starts."""
        output = self.outputs[task]
        assert output is not None
        return output

    def seed(self, task: int, scale: Tensor | None) -> Tensor:
        """What the backward of a present task starts with: 1, or the loss scale (0-dim)."""
        loss = self.detached[task]
        assert loss is not None
        if scale is None:
            return torch.ones((), dtype=loss.dtype, device=loss.device)
        return scale.to(device=loss.device, dtype=loss.dtype, non_blocking=True)

    def gradients(
        self, task: int, params: Sequence[Tensor], *, retain_graph: bool, scale: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient of one task's loss; None for a parameter that it does not reach."""
        return self.backward([task], params, [self.seed(task, scale)], retain_graph=retain_graph)

    def backward(
        self,
        tasks: Sequence[int],
        params: Sequence[Tensor],
        seeds: Sequence[Tensor],
        *,
        retain_graph: bool,
        lanes: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """One backward pass of several tasks at once.

        Args:
            tasks: which are present.
            params: what the gradients are for.
            seeds: what each task's backward starts with, 0-dim; with ``lanes`` [lanes].
            retain_graph: for another pass.
            lanes: vectorised, a gradient for each lane.

        Returns:
            The gradients; None for a parameter that no task reaches.

        Raises:
            RuntimeError: the graph is gone.
        """
        outputs = [self.output(task) for task in tasks]
        try:
            if any_sharded(params):
                return _through_grad(outputs, params, seeds, retain_graph)
            return torch.autograd.grad(
                outputs,  # type: ignore[arg-type]
                params,
                grad_outputs=seeds,
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=lanes,
            )
        except RuntimeError as failure:
            if "through the graph a second time" in str(failure):
                names = ", ".join(f"losses[{self.names[task]!r}]" for task in tasks)
                raise RuntimeError(
                    f"{names} must come with its graph: the closure must not call backward(), which the "
                    "optimizer does, and losses must not be used twice"
                ) from failure
            raise


def _through_grad(
    outputs: Sequence[Output],
    params: Sequence[Tensor],
    seeds: Sequence[Tensor],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """What this process holds of the gradients of parameters that FSDP2 shards.

    The graph holds other tensors in their place, gathered for a pass; the gradients, averaged over the
    processes, come back to ``.grad`` only.
    """
    for param in params:
        param.grad = None
    try:
        torch.autograd.backward(
            outputs,  # type: ignore[arg-type]
            grad_tensors=list(seeds),
            retain_graph=retain_graph,
        )
        return tuple(None if p.grad is None else local_of(p.grad) for p in params)
    finally:
        for param in params:
            param.grad = None


def _one(name: TaskName, loss: object, graph: bool) -> Tensor | None:
    if loss is None:
        return None
    label = f"losses[{name!r}]"
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{label} must be a Tensor, or None for a task without data in this batch, got "
            f"{type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(f"{label} must be a scalar, got shape {list(loss.shape)}")
    if not loss.is_floating_point():
        raise TypeError(f"{label} must be floating-point, got {loss.dtype}")
    if graph and not loss.requires_grad:
        raise ValueError(
            f"{label} must have a graph to go back through (requires_grad), got a loss without one"
        )
    return loss.reshape(())


def _vector(losses: Tensor) -> list[Output | None]:
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
    return [_one(i, loss, True) for i, loss in enumerate(losses)]


def read_losses(losses: object, *, graph: bool = True, partial: bool = False) -> TaskLosses:
    """Checks what a closure returned.

    Args:
        losses: a sequence of scalar tensors, a mapping from task names to them (None in either for a
            task that is missing from the batch), or a 1-D tensor.
        graph: False: only the values are wanted.
        partial: other processes have losses too: all may be None here.

    Raises:
        ValueError, TypeError: it is none of these, is empty, or an entry has no graph.
    """
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.numel() == 0:
            raise ValueError(
                f"losses must be a 1-D tensor with one entry a task, got shape {list(losses.shape)}"
            )
        if graph and not losses.requires_grad:
            raise ValueError(
                "losses must have a graph to go back through (requires_grad), got none"
            )
        outputs = _vector(losses) if graph else [None] * len(losses)
        plain = losses.detach()
        together = any(isinstance(output, Tensor) for output in outputs)
        names: list[TaskName] = list(range(len(outputs)))
        return TaskLosses(names, outputs, list(plain.unbind()), plain, together)
    if isinstance(losses, Mapping):
        entries = {name: _one(name, loss, graph) for name, loss in losses.items()}
        values: Losses = {name: _detached(loss) for name, loss in losses.items()}
        names = list(entries)
        tensors = list(entries.values())
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        tensors = [_one(i, loss, graph) for i, loss in enumerate(losses)]
        values = [_detached(loss) for loss in losses]
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
    if not partial and all(t is None for t in tensors):
        raise ValueError("losses must hold at least one task that has a loss, got only None")
    given = list(losses.values()) if isinstance(losses, Mapping) else list(losses)
    together = any(map(_is_entry, given))
    return TaskLosses(names, list(tensors), [_detached(t) for t in tensors], values, together)


_TAKES_OUT = ("SelectBackward0", "UnbindBackward0", "SplitBackward0", "SplitWithSizesBackward0")


def _is_entry(loss: Tensor | None) -> bool:
    """Whether the loss was taken out of a larger tensor."""
    node = None if loss is None else loss.grad_fn
    if node is None or node.name() not in _TAKES_OUT:
        return False
    sizes = getattr(node, "_saved_self_sym_sizes", None)  # of a select
    return sizes is None or any(size != 1 for size in sizes)


def _detached(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else loss.detach()


def added_loss(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """One task's losses of two micro-batches; None where it is missing from both."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def added_entries(
    total: Sequence[Tensor | None], more: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Two micro-batches' losses added task by task (None: missing); ``more`` if there was none before."""
    if not total:
        return list(more)
    return [added_loss(a, b) for a, b in zip(total, more, strict=True)]


def added(total: Losses | None, more: Losses) -> Losses:
    """The losses of two micro-batches added task by task, in the form of the first."""
    if total is None:
        return more
    if isinstance(total, Tensor) and isinstance(more, Tensor):
        return total + more
    if isinstance(total, Mapping) and isinstance(more, Mapping):
        return {name: added_loss(loss, more[name]) for name, loss in total.items()}
    entries = list(more.values()) if isinstance(more, Mapping) else list(more)
    kept = list(total.values()) if isinstance(total, Mapping) else list(total)
    sums = added_entries(kept, entries)
    return tuple(sums) if isinstance(total, tuple) else sums


def loss_vector(losses: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """float64 [T] from 0-dim tensors; NaN where a task is missing."""
    first = losses[0]
    if first is not None and all(
        one is not None and one.dtype == first.dtype and one.device == first.device
        for one in losses
    ):
        return torch.stack(losses).to(device, torch.float64)  # type: ignore[arg-type]
    missing = torch.full((), torch.nan, dtype=torch.float64, device=device)
    there = [missing if one is None else one.to(device, missing.dtype) for one in losses]
    return torch.stack(there)
