"""MoCo."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options, _row_passes


class MoCo(_row_passes.RowAverages):
    """Multi-objective gradient correction (Fernando et al., ICLR 2023), as in LibMTL.

    At call t, with beta_t = beta / t^beta_sigma and gamma_t = gamma / t^gamma_sigma: y <- y - beta_t (y -
    h), lambda <- softmax(lambda - gamma_t (Y Y^T + rho I) lambda), d = sum_i lambda_i y_i. The rows are h_i =
    L_i g_i / ||g_i||, or the gradients themselves. Read: LibMTL's code (C2), which has the authors' for its
    source. The paper projects lambda on the simplex in place of the softmax (M, not re-checked).

    A task without a sound gradient has weight 0 and keeps its y and its lambda.

    Args:
        beta: above 0, to 1; of the averages of the rows (C2).
        beta_sigma: how fast it falls, at least 0 (C2).
        gamma: above 0; the weights' step (C2).
        gamma_sigma: how fast it falls, at least 0 (C2).
        rho: at least 0, the weights' regularisation (C2).
        normalize: rows of length L_i in place of the gradients; LibMTL's, for which ``gamma`` is. The
            losses must then be above 0. False: the weights depend on the gradients' scale.
        state_dtype: of the averages [T, P]; None: that of the rows.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Fernando et al., Mitigating gradient bias in multi-objective learning"
    arxiv = "2210.12624"
    year = 2023
    needs = "rows and losses"
    state = "averages [T, P], lambda, call count"
    _entry = "y"
    _few = "lambda_and_count"

    def __init__(
        self,
        *,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        normalize: bool = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype=state_dtype)
        self.beta = _options.real("beta", beta, above=0, at_most=1)
        self.beta_sigma = _options.real("beta_sigma", beta_sigma, at_least=0)
        self.gamma = _options.real("gamma", gamma, above=0)
        self.gamma_sigma = _options.real("gamma_sigma", gamma_sigma, at_least=0)
        self.rho = _options.real("rho", rho, at_least=0)
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(normalize).__name__}")
        self.normalize = normalize

    def _first_numbers(self, tasks: int) -> Tensor:
        numbers = torch.full((tasks + 1,), 1 / tasks, dtype=torch.float64)
        numbers[-1] = 0
        return numbers

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
            ValueError, TypeError: shapes, dtypes or devices do not fit, ``losses`` are wanted and not
                given, or one of them is not above 0 (on the CPU; on CUDA its task does not count).
        """
        counted, scale = _row_passes.checked(jac, out, sound, scale)
        bits = None
        if self.normalize:
            given, counted, bits = _row_passes.losses_for(jac, losses, sound, type(self).__name__)
            norms = ops.row_norms(jac)
            size = torch.where(norms > 0, given / norms, 0.0)
        else:
            size = torch.ones(jac.shape[0], dtype=torch.float64, device=jac.device)
            size = size if scale is None else size / scale
        numbers = self._numbers_for(jac)
        weights, count = numbers[:-1], numbers[-1] + 1
        beta = self.beta / count**self.beta_sigma
        new = self._average(jac, counted, 1 - beta, beta * size)
        weights = self._step(new, weights, counted, self.gamma / count**self.gamma_sigma)
        self._next_numbers = torch.cat([weights, count.view(1)])
        used = torch.where(counted, weights, 0.0)
        _row_passes.combine(new, used if scale is None else used * scale, out)
        self._last = _row_passes.status(counted, bits)

    def _step(self, rows: Tensor, weights: Tensor, counted: Tensor, gamma: Tensor) -> Tensor:
        """The weights [T] after a step of those that count, which together keep what they had."""
        used = torch.where(counted, weights, 0.0)
        slope = ops.gram(rows) @ used + self.rho * used
        moved = torch.where(counted, used - gamma * slope, -torch.inf).softmax(0)
        return torch.where(counted, moved * used.sum(), weights)
