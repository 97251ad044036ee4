"""PCGrad."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting._base import SolveStatus, Weighting

_TWIN = 0x5851F42D4C957F2D  # set apart from the first stream; any constant would do


class PCGrad(Weighting):
    """Gradient surgery (Yu et al., arXiv 2001.06782, Alg. 1), on coefficients.

    Each task's gradient is projected, in a random order of the other tasks, onto the normal plane of
    every gradient it conflicts with; the projected gradients are summed.

    Args:
        seed: of the random orders, drawn on the device (Philox); one draw a call.
        reduction: "sum" of the projected gradients (the paper's algorithm) or their "mean".
        order: int64 [T, T], fixed orders in place of random ones: row i lists the tasks in the order
            in which task i is projected on them (i itself is passed over).

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        reduction: Literal["sum", "mean"] = "sum",
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if order is not None:
            _check.tensor("order", order, (torch.int64,))
            tasks = order.shape[0] if order.dim() == 2 else -1
            row = torch.arange(tasks) if tasks > 0 else None
            if row is None or not torch.equal(order.cpu().sort(1).values, row.expand(tasks, tasks)):
                raise ValueError(f"order must be [T, T], a permutation a row, got {order}")
        self.seed = seed
        self.reduction = reduction
        self.order = order
        self._rng: Tensor | None = None  # int64 [2]: seed, step; on the Gram matrix's device

    def _first(self, device: torch.device | None = None) -> Tensor:
        """The start of the seed's stream: int64 [2], (seed, step 0)."""
        signed = (self.seed + 2**63) % 2**64 - 2**63
        return torch.tensor([signed, 0], dtype=torch.int64, device=device)

    def _draw(self, gram: Tensor) -> Tensor:
        batch, tasks, _ = gram.shape
        if self.order is not None:
            if self.order.shape[0] != tasks:
                raise ValueError(
                    f"gram must have {self.order.shape[0]} tasks, as order, got {tasks}"
                )
            self.order = self.order.to(gram.device)
            return self.order.expand(batch, tasks, tasks).contiguous()
        if self._rng is None:
            self._rng = self._first(gram.device)
        elif self._rng.device != gram.device:
            self._rng = self._rng.to(gram.device)
        return ops.draw_order_(self._rng, tasks, batch)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        weights, _, bits = ops.solve_pcgrad(gram, self._draw(gram))
        if self.reduction == "mean":
            weights = weights / gram.shape[1]
        return weights, SolveStatus(bits)

    def reset(self) -> None:
        """Back to the first draw of the seed."""
        self._rng = None

    def twin(self) -> PCGrad:
        """A copy with another random stream."""
        other = super().twin()
        other.seed = self.seed ^ _TWIN
        return other

    def state_dict(self) -> dict[str, Any]:
        """The random stream and its position."""
        return {"rng": self._first() if self._rng is None else self._rng.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved random stream.

        Raises:
            ValueError: ``state`` is not one of PCGrad's.
        """
        self._check_state(state, {"rng"})
        rng = state["rng"]
        if not isinstance(rng, Tensor) or rng.dtype != torch.int64 or rng.shape != (2,):
            raise ValueError(f"state['rng'] must be int64 [2], (seed, step), got {rng!r}")
        self._rng = rng.detach().clone()
