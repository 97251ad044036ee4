"""PIVRG."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting


class PIVRG(Weighting):
    """Performance-driven variance reduction (Qin et al., CVPR 2025): FairGrad with task scores.

    (G w)_i = (c_i / w_i)^(1/2), c = T softmax(scores / temperature), temperature = max((largest - least
    score) / ln ``bound``, ``min_temperature``): a task with a higher score weighs more, by at most the
    factor ``bound`` in c.

    Set ``scores`` to one number a task, such as how far its validation performance falls short, whenever
    there are new ones; None: all equal, which is FairGrad with alpha = 2. A ``twin()`` keeps them, and a
    saved state has them.

    Args:
        bound: above 1; 2 is the official code's.
        min_temperature: above 0; 10 is the official code's.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an option is out of range; the scores are not finite numbers, or at a
            call not one for each task.
    """

    paper = "Qin et al., Revisiting fairness in multitask learning"
    year = 2025
    state = "scores [T], set by you"

    def __init__(
        self,
        *,
        bound: float = 2.0,
        min_temperature: float = 10.0,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.bound = _options.real("bound", bound, above=1)
        self.min_temperature = _options.real("min_temperature", min_temperature, above=0)
        self.scores = None

    @property
    def scores(self) -> Tensor | None:
        """One number a task, float64 [T]; None: all equal."""
        return self._scores

    @scores.setter
    def scores(self, value: _options.Vector | None) -> None:
        self._scores: Tensor | None = None
        self._share: Tensor | None = None  # c
        if value is not None:
            scores = _options.vector("scores", value, negative=True)
            spread = (scores.max() - scores.min()) / math.log(self.bound)
            temperature = spread.clamp(min=self.min_temperature)
            self._scores = scores
            self._share = scores.shape[0] * (scores / temperature).softmax(0)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        self._share = _options.placed("scores", self._share, gram)
        weights, bits, residual = ops.solve_alpha_fair(gram, 2.0, self._share)
        return weights, SolveStatus(bits, residual)

    def state_dict(self) -> dict[str, Any]:
        """The scores."""
        return {"scores": None if self._scores is None else self._scores.clone()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        scores = state["scores"]
        if scores is not None and not (isinstance(scores, Tensor) and scores.dim() == 1):
            raise ValueError(f"state['scores'] must be None or a tensor [T], got {scores!r}")

    def _take_entries(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"]
