"""UPGrad."""

from __future__ import annotations

from flatmtl.weighting._dual_cone import DualCone


class UPGrad(DualCone):
    """Unconflicting projections of gradients (Quinton and Rey, arXiv 2406.16232): exact.

    Every gradient is projected on the cone of directions that conflict with none of them, and the
    projections are summed with the preference as weights. No task ascends to first order, and the update
    grows linearly with every gradient.

    Args:
        preference: [T], not negative; None: 1/T, as in the paper.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``preference`` is not a vector of finite numbers from 0 on; at a call, it
            has not one entry for each task.
    """

    paper = "Quinton and Rey, Jacobian descent for multi-objective optimization"
    arxiv = "2406.16232"
    year = 2024

    _each = True
