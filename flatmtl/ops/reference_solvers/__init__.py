"""The solvers in plain batched torch, float64: what the C++ and CUDA bodies must equal.

Each takes [T, T] or [B, T, T] (csrc/solvers has the same maths, one problem at a time). Nothing here
reads a tensor's value on the host, but for CPU tensors: a Gram matrix that is none raises ValueError,
and loops end when every problem is done (where reading would stall a device, they run to their limit).
"""

from flatmtl.ops.reference_solvers.alpha_fair import solve_alpha_fair, solve_nash_
from flatmtl.ops.reference_solvers.cagrad import solve_cagrad
from flatmtl.ops.reference_solvers.closed import (
    scale_weights,
    solve_aligned,
    solve_config,
    solve_constant,
    solve_imtl_g,
    solve_krum,
)
from flatmtl.ops.reference_solvers.cone import solve_dual_cone, solve_mgda, solve_pcd_
from flatmtl.ops.reference_solvers.cross import solve_modo_, solve_sdmgrad_
from flatmtl.ops.reference_solvers.projections import (
    solve_gradvac,
    solve_gradvac_drawn_,
    solve_pcgrad,
    solve_pcgrad_drawn_,
)
from flatmtl.ops.reference_solvers.random import draw_order_, solve_random_

__all__ = [
    "draw_order_",
    "scale_weights",
    "solve_aligned",
    "solve_alpha_fair",
    "solve_cagrad",
    "solve_config",
    "solve_constant",
    "solve_dual_cone",
    "solve_gradvac",
    "solve_gradvac_drawn_",
    "solve_imtl_g",
    "solve_krum",
    "solve_mgda",
    "solve_modo_",
    "solve_nash_",
    "solve_pcd_",
    "solve_pcgrad",
    "solve_pcgrad_drawn_",
    "solve_random_",
    "solve_sdmgrad_",
]
