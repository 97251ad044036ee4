"""SDMGrad."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._cross import TwoBatches


class SDMGrad(TwoBatches):
    """Direction-oriented multi-objective learning (Xiao et al., arXiv 2305.18409).

    Call it with the products J1 J2' of the gradients of two batches. One batch's Gram matrix is taken
    too; the descent on the weights is then biased.

    Args:
        lr: step size of the descent on the weights; 10 is the official code's.
        momentum: its momentum, 0.5.
        steps: its steps at a call, 20.
        lambda_: pull to the target direction, 0.3.
        preference: the target direction, [T], not negative; None: 1/T.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an option is out of range; at a call, ``preference`` has not one entry
            for each task.
    """

    paper = "Xiao et al., Direction-oriented multi-objective learning"
    arxiv = "2305.18409"
    year = 2023

    def __init__(
        self,
        *,
        lr: float = 10.0,
        momentum: float = 0.5,
        steps: int = 20,
        lambda_: float = 0.3,
        preference: _options.Vector | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.lr = _options.real("lr", lr, above=0)
        self.momentum = _options.real("momentum", momentum, at_least=0, below=1)
        self.steps = _options.whole("steps", steps, at_least=1)
        self.lambda_ = _options.real("lambda_", lambda_, at_least=0)
        self.preference = None if preference is None else _options.vector("preference", preference)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        held = self._state_for(_check.gram("gram", gram))
        self.preference = _options.placed("preference", self.preference, gram)
        weights, bits = ops.solve_sdmgrad_(
            gram, held, self.preference, self.lr, self.momentum, self.steps, self.lambda_
        )
        return weights, SolveStatus(bits)
