"""ExcessMTL."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options, _row_passes


class ExcessMTL(_row_passes.RowAverages):
    """Robust multi-task learning with excess risks (He et al., arXiv 2402.02009), as in LibMTL.

    A task's excess risk is estimated by e_i = sum_k g_ik^2 / sqrt(S_ik + eps), S the sum of the squared
    gradients so far. Its ratio to the first one moves the weights: w_i <- w_i exp(step e_i / e_i(first)),
    then to a sum of T; d = sum_i w_i g_i. The weights are 1 at the first call. Read: LibMTL's and TorchJD's
    code (C2), both after the authors'.

    A task without a sound gradient has weight 0 for the call and keeps its w, S and e(first), which is that
    of its first call with a gradient that is not zero. The tasks' own parameters get their unweighted
    gradient; in the authors' code they get the weighted one.

    Args:
        step: above 0, of the weights; LibMTL's (C2). TorchJD: 1.
        eps: above 0, absolute, of the squared gradients' size (C2).
        state_dtype: of S [T, P], float32 or float64: in half precision a sum would soon stop growing.
            None: that of the rows, float32 beside half precision.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "He et al., Robust multi-task learning with excess risks"
    arxiv = "2402.02009"
    year = 2024
    state = "sums of squares [T, P], w, first excess risks"
    _entry = "squares"
    _few = "weights_and_first"

    def __init__(
        self,
        *,
        step: float = 1e-2,
        eps: float = 1e-7,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype not in (None, *_check.SMALL_TYPES):
            raise TypeError(
                f"state_dtype must be torch.float32, float64 or None, got {state_dtype!r}"
            )
        super().__init__(state_dtype=state_dtype)
        self.step = _options.real("step", step, above=0)
        self.eps = _options.real("eps", eps, above=0)

    def _first_numbers(self, tasks: int) -> Tensor:
        return torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(1, tasks)

    def _state_for(self, jac: Tensor) -> tuple[Tensor, Tensor]:
        if self._held is None and self.state_dtype is None and jac.dtype in _check.HALF_TYPES:
            self._held = torch.zeros_like(jac, dtype=torch.float32)
        return super()._state_for(jac)

    def aggregate(
        self,
        jac: Tensor,
        out: Tensor,
        *,
        losses: Tensor | None = None,
        sound: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the update into ``out``; see ``RowMethod.aggregate``.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit.
        """
        counted, scale = _row_passes.checked(jac, out, sound, scale)
        weights, first = self._numbers_for(jac)
        excess = self._excess(jac, counted, scale)
        first = torch.where((first == 0) & counted, excess, first)
        ratio = torch.where(first > 0, excess / first, 0.0)
        weights = self._step(weights, ratio, counted)
        self._next_numbers = torch.stack([weights, first])
        weights = torch.where(counted, weights, 0.0)
        ops.combine(jac, weights, out)
        self._last = _row_passes.status(counted)
        return weights

    def _excess(self, jac: Tensor, counted: Tensor, scale: Tensor | None) -> Tensor:
        """float64 [T], sum_k g^2 / sqrt(S + eps), 0 for what does not count; S in its new place."""
        held, new = self._state_for(jac)
        wide = torch.promote_types(_row_passes.accumulate_in(jac), held.dtype)
        factor = None if scale is None else (1 / scale).to(wide)
        total = torch.zeros(jac.shape[0], dtype=torch.float64, device=jac.device)
        for block in _row_passes.columns(jac):
            rows = jac[:, block].to(wide).masked_fill(~counted.unsqueeze(1), 0.0)
            if factor is not None:
                rows.mul_(factor)
            sums = torch.addcmul(held[:, block].to(wide), rows, rows)
            new[:, block] = sums
            # the squared norm of g / (S + eps)^(1/4)
            total += ops.row_norms(rows.div_(sums.add_(self.eps).sqrt_().sqrt_())).square()
        return total

    def _step(self, weights: Tensor, ratio: Tensor, counted: Tensor) -> Tensor:
        """The weights [T] after a step of those that count, which together keep what they had."""
        tiny = torch.finfo(torch.float64).tiny  # a weight that has vanished must not become NaN
        power = weights.clamp(min=tiny).log() + (self.step * ratio).clamp(max=1e300)
        moved = torch.where(counted, power, -torch.inf).softmax(0)
        return torch.where(counted, moved * torch.where(counted, weights, 0.0).sum(), weights)
