"""Loss scaling: what torch.amp.GradScaler and the optimizer tell each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmtl import cuda_graphs


def scale_of(scaler: torch.amp.GradScaler | None, params: Sequence[Tensor]) -> Tensor | None:
    """The scaler's factor, float32 0-dim on the parameters' device; None where nothing is scaled.

    Raises:
        TypeError: ``scaler`` is none.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=params[0].device))
    return scale


def _check_begun(base: Optimizer) -> None:
    """A state that begins inside a CUDA graph would begin again at every replay."""
    for group in base.param_groups if base.state else ():
        for param in group["params"]:
            if param.grad is not None and param not in base.state:
                cuda_graphs.refuse(
                    "base_optimizer must have a state for every parameter with a gradient (a step with "
                    f"all tasks must have been made), got none for one of shape {list(param.shape)}"
                )


def step(base: Optimizer, told: Optimizer, ok: Tensor | None, *, on_host: bool) -> bool:
    """The base optimizer's step, unless gradients are not finite.

    Args:
        base: makes the update.
        told: the optimizer on which ``GradScaler.step`` leaves ``found_inf`` and ``grad_scale`` (None if the
            gradients are unscaled already).
        ok: bool 0-dim, whether a step may be made; None: it is made.
        on_host: the host must know, also of a fused optimizer, which would decide on the device.

    Returns:
        Whether it was made, as far as the host knows: a fused optimizer decides on the device.

    Raises:
        RuntimeError: ``backward`` did not know of the scaler.
    """
    if cuda_graphs.capturing():
        _check_begun(base)
    found_inf = getattr(told, "found_inf", None)
    scale = getattr(told, "grad_scale", None)
    if ok is None:
        if found_inf is not None:
            raise RuntimeError(
                "scaler must be given to backward(losses, scaler=scaler) for GradScaler.step: the weights "
                "of scaled gradients are not always those of the gradients"
            )
        base.step()
        return True
    if found_inf is None:
        found_inf = (~ok).to(torch.float32)
    fuses = getattr(base, "_step_supports_amp_scaling", False)
    on_device = isinstance(found_inf, Tensor) and found_inf.device.type != "cpu"
    # The read that GradScaler makes for optimizers that cannot decide.
    if on_host or not fuses or not on_device:
        cuda_graphs.refuse(
            "base_optimizer must be fused, and nothing counted or drawn on the host, where a step may be "
            'skipped (nonfinite="skip", a GradScaler)'
        )
        if bool(found_inf):
            return False
    if fuses:
        fused: dict[str, object] = {"found_inf": found_inf, "grad_scale": scale}
        for name, value in fused.items():
            setattr(base, name, value)
        try:
            base.step()
        finally:
            for name in fused:
                delattr(base, name)
        return True
    if scale is not None:
        on: dict[torch.device, list[Tensor]] = {}
        for group in base.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    on.setdefault(param.grad.device, []).append(param.grad)
        for device, grads in on.items():
            torch._foreach_mul_(grads, scale.to(device).reciprocal())
    base.step()
    return True
