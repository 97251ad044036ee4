"""PyTorch Lightning: ``MultiTaskMixin`` makes the training step of a ``LightningModule``.

It imports neither ``lightning`` nor ``pytorch_lightning``, and works with the module class of either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flatmtl.integrations._micro import check_processes, divide, divided
from flatmtl.losses import Losses
from flatmtl.optimizer import MultiTaskOptimizer
from flatmtl.sharpness import check_whole

__all__ = ["MultiTaskMixin"]


class MultiTaskMixin:
    """The training step of a module whose optimizer is a ``MultiTaskOptimizer``.

    Put it before ``LightningModule`` and give the task losses in place of a ``training_step``::

        class Model(MultiTaskMixin, lightning.LightningModule):
            def multitask_losses(self, batch, tasks=("a", "b")):
                x, y = batch
                features = self.trunk(x)
                return {t: loss(self.heads[t](features), y[t]) for t in tasks}

            def configure_optimizers(self):
                base = torch.optim.Adam(self.parameters(), lr=1e-3)
                return flatmtl.MultiTaskOptimizer(base, weighting=..., sharpness=..., model=self)

    Lightning calls this manual optimization; clipping and accumulation, which its ``Trainer`` then
    refuses, are attributes here. Whatever the precision, ``backward`` runs outside autocast, and every
    forward pass within the precision's own context; with ``"16-mixed"`` its scaler is used. Optimizer
    steps are counted in ``trainer.global_step`` (those that the scaler skips too, as ever in Lightning).

    Learning rate schedulers must be attached to the ``MultiTaskOptimizer`` (Lightning checks it). They are
    stepped as configured: ``"interval": "step"`` (of the optimizer) or ``"epoch"``, with ``"frequency"``.
    ``ReduceLROnPlateau`` is left to you, as Lightning removes its ``"monitor"``: step it in
    ``on_validation_epoch_end``.

    With ``strategy="ddp"`` give the optimizer ``process_group=torch.distributed.group.WORLD``, which is None
    in one process: Lightning wraps the module after it was told of the optimizer. A step is then that of
    one process with the batches of all.

    Attributes:
        accumulate_grad_batches: batches a step. They are kept until the last of them has come, since
            every pass runs over all of them; their losses are divided by this number, as in Lightning.
            An epoch's last step may have fewer.
        gradient_clip_val: the largest norm (or value) of the gradients; None: no clipping.
        gradient_clip_algorithm: "norm" or "value".
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"

    # LightningModule's
    trainer: Any
    device: torch.device
    optimizers: Callable[[], Any]
    log_dict: Callable[..., None]
    lr_scheduler_step: Callable[..., None]

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**options)
        if cls.automatic_optimization is not MultiTaskMixin.automatic_optimization:
            raise TypeError(
                f"{cls.__name__} must name MultiTaskMixin before LightningModule among its bases"
            )

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **options)
        self._kept: list[Any] = []  # the batches of a step that is not complete yet

    @property
    def automatic_optimization(self) -> bool:
        """False: the training step steps the optimizer itself."""
        return False

    def multitask_losses(self, batch: Any) -> Losses:  # noqa: ANN401
        """The task losses of a batch, as a closure of ``MultiTaskOptimizer.step`` returns them.

        Yours may take ``tasks=``, with a default that means all of them: with sharpness it is then asked
        for one task at a time. It runs several times a step with sharpness, so log and update metrics in
        ``on_losses`` rather than here.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define multitask_losses(batch) or multitask_losses(batch, tasks=...)"
        )

    def on_losses(self, losses: Losses) -> None:
        """Logs the clean losses of a step, detached: ``train_loss/<task>``. Override it to do otherwise.

        Args:
            losses: as ``multitask_losses`` returned them, the mean over the batches of the step.
        """
        named = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
        self.log_dict({f"train_loss/{name}": loss for name, loss in named if loss is not None})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # noqa: ANN401
        """One batch: a step of the optimizer, if it completes one.

        Returns:
            The sum of the losses, detached; None without a step.
        """
        if batch_idx == 0:
            self._kept.clear()
        self._kept.append(batch)
        last = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        total = None
        if last or len(self._kept) >= self.accumulate_grad_batches:
            batches, self._kept = self._kept, []
            total = self._step(batches)
            self._schedule("step", self.trainer.global_step)
        if last:
            self._schedule("epoch", self.trainer.current_epoch + 1)
        return total

    def _step(self, batches: list[Any]) -> Tensor:
        wrapped = self.optimizers()
        optimizer = getattr(wrapped, "optimizer", None)
        if not isinstance(optimizer, MultiTaskOptimizer):
            got = "several" if isinstance(wrapped, list) else type(optimizer).__name__
            raise TypeError(
                f"configure_optimizers must return one flatmtl.MultiTaskOptimizer, got {got}"
            )
        check_processes(optimizer, self.trainer.world_size, self.trainer.model)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        by = check_whole("accumulate_grad_batches", self.accumulate_grad_batches, 1)
        closures = [divided(self._closure(batch), by) for batch in batches]
        # Lightning runs this step under autocast, which is for forward passes only.
        with torch.autocast(self.device.type, enabled=False):
            optimizer.zero_grad()
            losses = optimizer.backward(closures, scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
            hook = optimizer.register_step_pre_hook(self._before_step)
            try:
                wrapped.step()  # through Lightning, which counts it
            finally:
                hook.remove()
        losses = divide(losses, len(batches) / by)
        self.on_losses(losses)
        values = losses.values() if isinstance(losses, Mapping) else losses
        return torch.stack([loss for loss in values if loss is not None]).sum()

    def _closure(self, batch: Any) -> Callable[..., Losses]:  # noqa: ANN401
        """The batch's losses, in the context of the Trainer's precision."""
        losses = functools.partial(self.multitask_losses, batch)

        @functools.wraps(losses)
        def run(**asked: object) -> Losses:
            with self.trainer.precision_plugin.train_step_context():
                return losses(**asked)

        return run

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Lightning's closure computes nothing, it calls on_before_optimizer_step: run it, then clip."""
        closure = kwargs.pop("closure", None)
        if closure is not None:
            closure()
        if self.gradient_clip_val is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if self.gradient_clip_algorithm == "norm":
                torch.nn.utils.clip_grad_norm_(params, self.gradient_clip_val)
            elif self.gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(params, self.gradient_clip_val)
            else:
                raise ValueError(
                    "gradient_clip_algorithm must be 'norm' or 'value', got "
                    f"{self.gradient_clip_algorithm!r}"
                )
        return args, kwargs

    def _schedule(self, interval: str, count: int) -> None:
        """Steps the schedulers of an interval, of which ``count`` have passed."""
        for config in self.trainer.lr_scheduler_configs:
            plateau = isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            if config.interval == interval and not plateau and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)
