"""DualProj."""

from __future__ import annotations

from flatmtl.weighting._dual_cone import DualCone


class DualProj(DualCone):
    """Projection of the preferred combination on the dual cone (Lopez-Paz and Ranzato, 1706.08840): exact.

    The nearest direction to sum_i u_i g_i that conflicts with no task's gradient.

    Args:
        preference: u, [T], not negative; None: 1/T.
        scaling: as for every weighting.
        max_norm: as for every weighting.

    Raises:
        ValueError, TypeError: ``preference`` is not a vector of finite numbers from 0 on; at a call, it
            has not one entry for each task.
    """

    paper = "Lopez-Paz and Ranzato, Gradient episodic memory"
    arxiv = "1706.08840"
    year = 2017

    _each = False
