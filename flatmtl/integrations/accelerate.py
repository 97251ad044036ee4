"""Hugging Face Accelerate: what takes the place of ``accelerator.backward(loss)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flatmtl.integrations._micro import check_processes, divide, divided
from flatmtl.losses import Losses
from flatmtl.optimizer import MultiTaskOptimizer

__all__ = ["Backward"]


class Backward:
    """``accelerator.backward`` for task losses; the rest of an Accelerate loop stays as it is.

    ::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        backward = flatmtl.integrations.accelerate.Backward(accelerator, optimizer, model)
        for batch in loader:
            with accelerator.accumulate(model):
                losses = backward(task_losses, model, batch)  # task_losses(model, batch, tasks=...)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    As ``accelerator.backward`` does, it divides the losses by ``gradient_accumulation_steps`` and uses the
    accelerator's scaler. It also lets ``accelerator.optimizer_step_was_skipped`` (and with it the schedulers)
    see a step that the scaler skipped: Accelerate by itself only notices optimizers that are then
    not called at all.

    With several processes give the ``MultiTaskOptimizer``, made before ``prepare`` wraps the model,
    ``process_group=torch.distributed.group.WORLD``, which is None in one process. A step is then that of one
    process with the batches of all; batches that are accumulated are kept as with sharpness.

    Args:
        accelerator: the ``accelerate.Accelerator``.
        optimizer: what ``accelerator.prepare`` made of a ``MultiTaskOptimizer``.
        model: what it made of the model; where several processes train.

    Raises:
        TypeError: it was not made of one.
        ValueError: there are several processes, and ``process_group`` is not that of all of them, or
            ``model`` is missing.
    """

    def __init__(
        self,
        accelerator: Any,  # noqa: ANN401
        optimizer: Any,  # noqa: ANN401
        model: torch.nn.Module | None = None,
    ) -> None:
        multitask = getattr(optimizer, "optimizer", None)
        if not isinstance(multitask, MultiTaskOptimizer):
            raise TypeError(
                "optimizer must be what accelerator.prepare made of a flatmtl.MultiTaskOptimizer, got "
                + type(optimizer).__name__
            )
        check_processes(multitask, accelerator.num_processes, model)
        self._keeps = accelerator.num_processes > 1
        self._accelerator, self._accelerated, self._optimizer = accelerator, optimizer, multitask
        self._kept: list[Callable[..., Losses]] = []  # of a step that is not complete yet
        multitask.register_step_post_hook(self._after_step)

    def __call__(
        self,
        losses: Losses | Callable[..., Losses],
        *args: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> Losses | None:
        """Takes the gradients of a batch's losses.

        With sharpness, or an exact ``AffinityProbe``, passes run over all batches of a step again, so that
        these are kept until the last one has come, and computed then; so they are where several processes
        train, which take a step together.

        Args:
            losses: the losses of this batch, or a function that computes them (with sharpness or an
                exact probe, always, and where several processes accumulate batches); it may take
                ``tasks=``, as a closure of ``MultiTaskOptimizer.step`` does.
            *args: what the function is called with. They are bound here and now: a function that finds
                the batch in a name of the loop would find a later one.
            **options: the same.

        Returns:
            The losses, detached, before the division (the mean over the step's batches where those were
            kept); None while they are kept.

        Raises:
            ValueError: batches are kept, and losses come, or a function without arguments.
        """
        by = self._accelerator.gradient_accumulation_steps
        scaler = self._accelerator.scaler
        keeping = self._keeps or self._optimizer.runs_again
        if not callable(losses) or isinstance(losses, torch.Tensor):
            if by > 1 and self._keeps:
                raise ValueError(
                    "losses must be given as a function and its arguments, as backward(task_losses, "
                    "model, batch), where several processes accumulate batches"
                )
            found = self._optimizer.backward(divide(losses, by), scaler=scaler)
            return divide(found, 1 / by)
        if args or options:
            losses = partial(losses, *args, **options)
        elif by > 1 and keeping and not isinstance(losses, partial):
            raise ValueError(
                "losses must be given with their batch, as backward(task_losses, model, batch), when "
                "batches are accumulated with sharpness, an exact probe or several processes: it is run "
                "when later ones have come"
            )
        closure = divided(losses, by)
        if not keeping:
            return divide(self._optimizer.backward(closure, scaler=scaler), 1 / by)
        self._kept.append(closure)
        if not self._accelerator.sync_gradients:
            return None
        closures, self._kept = self._kept, []
        found = self._optimizer.backward(closures, scaler=scaler)
        return divide(found, len(closures) / by)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        found_inf = getattr(optimizer, "found_inf", None)  # there while GradScaler.step runs
        if found_inf is not None and bool(found_inf):
            self._accelerated._accelerate_step_called = False
