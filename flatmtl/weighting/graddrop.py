"""GradDrop."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.weighting import _options, _row_passes
from flatmtl.weighting._rows import RowMethod
from flatmtl.weighting._stream import Seeded


class GradDrop(RowMethod, Seeded):
    """Gradient sign dropout (Chen et al., arXiv 2010.06808, Alg. 1, lines 10 to 15).

    For every element of the update one sign is drawn: positive with probability P = 0.5 (1 + sum g /
    sum |g|), and the entries of that sign are summed. The paper does so on the gradients of features,
    times the sign of the input; this is its form on the gradients of parameters, as in other libraries.
    Read: other code (C2). Without an eps, see ``flatmtl.ops.graddrop_``.

    Args:
        leak: 0 to 1, one for all tasks or one a task: the part of a task's dropped entries that is
            added all the same. None: 0, as in TorchJD and LibMTL (C2).
        seed: of the uniform numbers, drawn on the device (Philox); one draw a call.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Chen et al., Just pick a sign"
    arxiv = "2010.06808"
    year = 2020
    state = "random stream"

    def __init__(self, *, leak: float | _options.Vector | None = None, seed: int = 0) -> None:
        super().__init__()
        self.seed = _options.whole("seed", seed)
        self.leak = None if leak is None else _leak(leak)

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
            ValueError, TypeError: shapes, dtypes or devices do not fit, or ``leak`` has another number
                of tasks.
        """
        counted, _ = _row_passes.checked(jac, out, sound, scale)
        leak = self.leak
        if leak is not None:
            if leak.dim() == 1 and leak.shape[0] != jac.shape[0]:
                raise ValueError(f"jac must have {leak.shape[0]} rows, as leak, got {jac.shape[0]}")
            if leak.device != jac.device:
                self.leak = leak = leak.to(jac.device)
            leak = leak.expand(jac.shape[0])
        ops.graddrop_(jac, self._rng_on(jac.device), leak=leak, there=sound, out=out)
        self._last = _row_passes.status(counted)


def _leak(value: float | _options.Vector) -> Tensor:
    """``value`` as float64, 0-dim or [T], within 0 and 1."""
    if isinstance(value, (int, float)):
        return torch.tensor(
            _options.real("leak", value, at_least=0, at_most=1), dtype=torch.float64
        )
    leak = _options.vector("leak", value)
    if bool((leak > 1).any()):
        raise ValueError(f"leak must be at most 1, got {leak.tolist()}")
    return leak
