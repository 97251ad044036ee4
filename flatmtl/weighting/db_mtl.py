"""DB-MTL."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options, _row_passes


class DBMTL(_row_passes.RowAverages):
    """Dual-balancing multi-task learning (Lin et al., arXiv 2308.12029), as in LibMTL.

    The losses are balanced by their logarithms, whose gradients are g_i / (L_i + eps); the gradients by
    their lengths: y <- beta_t y + (1 - beta_t) g_i / (L_i + eps), beta_t = beta / t^beta_sigma at call t, and
    d = sum_i w_i y_i, w_i = max_j ||y_j|| / ||y_i||. A task's own parameters get the gradient of its
    logarithm too. Read: LibMTL's code (C2).

    A task without a sound gradient has weight 0 and keeps its y. The losses must be above 0.

    Args:
        beta: 0 to 1, 1 not included; of the averages (C2).
        beta_sigma: how fast it falls, at least 0 (C2).
        eps: at least 0, added to the losses; absolute, of their size (C2).
        state_dtype: of the averages [T, P]; None: that of the rows.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Lin et al., Dual-balancing for multi-task learning"
    arxiv = "2308.12029"
    year = 2023
    needs = "rows and losses"
    state = "averages [T, P], call count"
    _entry = "y"
    _few = "count"

    def __init__(
        self,
        *,
        beta: float = 0.9,
        beta_sigma: float = 0.0,
        eps: float = 1e-8,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype=state_dtype)
        self.beta = _options.real("beta", beta, at_least=0, below=1)
        self.beta_sigma = _options.real("beta_sigma", beta_sigma, at_least=0)
        self.eps = _options.real("eps", eps, at_least=0)
        self._inverse: Tensor | None = None  # float64 [T], 1 / (L + eps) of the last call

    def _first_numbers(self, tasks: int) -> Tensor:
        return torch.zeros(1, dtype=torch.float64)

    def aggregate(
        self,
        jac: Tensor,
        out: Tensor,
        *,
        losses: Tensor | None = None,
        sound: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Writes the update into ``out``; see ``RowMethod.aggregate``.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit, there are no ``losses``, or one of
                them is not above 0 (on the CPU; on CUDA its task does not count).
        """
        _, scale = _row_passes.checked(jac, out, sound, scale)
        given, counted, bits = _row_passes.losses_for(jac, losses, sound, type(self).__name__)
        numbers = self._numbers_for(jac)
        self._next_numbers = numbers + 1
        beta = self.beta / self._next_numbers[0] ** self.beta_sigma
        self._inverse = torch.where(counted, 1 / (given + self.eps), 0.0)
        size = self._inverse if scale is None else self._inverse / scale
        new = self._average(jac, counted, beta, (1 - beta) * size)
        norms = torch.where(counted, ops.row_norms(new), 0.0)
        weights = torch.where(norms > 0, norms.max() / norms, 0.0)
        _row_passes.combine(new, weights if scale is None else weights * scale, out)
        self._last = _row_passes.status(counted, bits)

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        return self._inverse
