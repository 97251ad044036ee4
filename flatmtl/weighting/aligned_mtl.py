"""Aligned-MTL."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, SolveStatus, Weighting

_SCALE_MODES = ("min", "median", "rmse")  # the operator's numbers


class AlignedMTL(Weighting):
    """Aligned-MTL (Senushkin et al., arXiv 2305.19000): the principal components made equally long.

    Args:
        scale_mode: their common length: of the shortest ("min", the paper's), the median one or the root
            mean square ("rmse"). Components below float32 rounding do not count.
        preference: [T], not negative; None: ones, as in the official code (1/T in TorchJD).
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above; at a call, ``preference`` has not one
            entry for each task.
    """

    paper = "Senushkin et al., Independent component alignment for multi-task learning"
    arxiv = "2305.19000"
    year = 2023

    def __init__(
        self,
        *,
        scale_mode: Literal["min", "median", "rmse"] = "min",
        preference: _options.Vector | None = None,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        if scale_mode not in _SCALE_MODES:
            raise ValueError(
                f"scale_mode must be one of {', '.join(_SCALE_MODES)}, got {scale_mode!r}"
            )
        self.scale_mode = scale_mode
        self.preference = None if preference is None else _options.vector("preference", preference)

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        self.preference = _options.placed("preference", self.preference, gram)
        mode = _SCALE_MODES.index(self.scale_mode)
        weights, bits, residual = ops.solve_aligned(gram, self.preference, mode)
        return weights, SolveStatus(bits, residual)
