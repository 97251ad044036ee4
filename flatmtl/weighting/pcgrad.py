"""PCGrad."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._stream import Ordered


class PCGrad(Ordered):
    """Gradient surgery (Yu et al., arXiv 2001.06782, Alg. 1), on coefficients.

    Each task's gradient is projected, in a random order of the other tasks, onto the normal plane of
    every gradient it conflicts with; the projected gradients are summed.

    Args:
        seed: of the random orders, drawn on the device (Philox); one draw a call.
        reduction: "sum" of the projected gradients (the paper's algorithm) or their "mean".
        order: int64 [T, T], fixed orders in place of random ones: row i lists the tasks in the order
            in which task i is projected on them (i itself is passed over).
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Yu et al., Gradient surgery for multi-task learning"
    arxiv = "2001.06782"
    year = 2020
    state = "random stream"

    def __init__(
        self,
        *,
        seed: int = 0,
        reduction: Literal["sum", "mean"] = "sum",
        order: Tensor | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(order=order, seed=seed, scaling=scaling, max_norm=max_norm)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        _check.gram("gram", gram)
        if self.order is None:
            weights, _, bits = ops.solve_pcgrad_drawn_(gram, self._rng_on(gram.device))
        else:
            weights, _, bits = ops.solve_pcgrad(gram, self._order_for(gram))
        if self.reduction == "mean":
            weights = weights / gram.shape[-1]
        return weights, SolveStatus(bits)
