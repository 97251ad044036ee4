"""Random loss weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting._base import Scaling, SolveStatus
from flatmtl.weighting._stream import Seeded


class RandomLossWeighting(Seeded):
    """Random loss weighting (Lin et al., arXiv 2111.10603): w = softmax of normal numbers, at every call.

    A task whose gradient is zero or not finite gets 0; the others keep theirs. It needs no task gradients: an
    optimizer's step is one backward pass of sum_i w_i L_i, which the tasks' own parameters take part in. With
    ``max_norm`` it does need them, and a step is as with the methods of the Gram matrix.

    Args:
        seed: of the numbers, drawn on the device (Philox); one draw a call.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    diagonal_only = True
    paper = "Lin et al., Reasonable effectiveness of random weighting"
    arxiv = "2111.10603"
    year = 2022
    needs = "nothing"
    state = "random stream"
    one_pass = True

    def __init__(
        self, *, seed: int = 0, scaling: Scaling = "raw", max_norm: float | None = None
    ) -> None:
        super().__init__(seed=seed, scaling=scaling, max_norm=max_norm)
        self.one_pass = max_norm is None  # the update's norm is the Gram matrix's to tell

    def _at_step(self, gram: Tensor | None, losses: Tensor | None, there: Tensor | None) -> Tensor:
        if gram is not None:
            return self(gram)
        assert losses is not None
        here = torch.ones_like(losses) if there is None else there.to(torch.float64)
        return self(here.diag())

    def _own_weights(self, weights: Tensor | None) -> Tensor | None:
        return weights if self.one_pass else None

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        _check.gram("gram", gram)
        weights, bits = ops.solve_random_(gram, self._rng_on(gram.device))
        return weights, SolveStatus(bits)
