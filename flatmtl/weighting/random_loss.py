"""Random loss weighting."""

from __future__ import annotations

from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.weighting._base import SolveStatus
from flatmtl.weighting._stream import Seeded


class RandomLossWeighting(Seeded):
    """Random loss weighting (Lin et al., arXiv 2111.10603): w = softmax of normal numbers, at every call.

    A task whose gradient is zero or not finite gets 0; the others keep theirs.

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

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        _check.gram("gram", gram)
        weights, bits = ops.solve_random_(gram, self._rng_on(gram.device))
        return weights, SolveStatus(bits)
