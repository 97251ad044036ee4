"""Small valid arguments for every op, in the order of its schema."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmtl import ops

TASKS, SIZE = 3, 37


# What takes rows in half precision beside float32 gradients, parameters and updates.
MIXED = ("combine", "combine_flat", "graddrop_", "pack_row_", "adaptive_sq_norm", "perturb_")


def arguments(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int = 1,
    beside: torch.dtype | None = None,
    accumulate: bool = False,
) -> dict[str, tuple]:
    """dtype: of the rows; beside: of gradients, parameters and updates, the rows' own without."""

    def rows(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(kind).to(device)

    def update(*shape: int) -> Tensor:
        return rows(*shape, kind=beside or dtype)

    def small(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device)

    jac, sam, saved, row = rows(TASKS, SIZE), rows(TASKS, SIZE), update(SIZE), rows(SIZE)
    half = small(batch, TASKS, TASKS + 2)
    gram = half @ half.mT
    cross = half @ small(batch, TASKS + 2, TASKS)
    simplex = torch.full((batch, TASKS), 1 / TASKS, dtype=torch.float64, device=device)
    order = torch.stack([torch.randperm(TASKS) for _ in range(batch * TASKS)])
    order = order.view(batch, TASKS, TASKS).to(device)
    params, offsets = [update(4, 3), update(20)], [1, 16]
    one = torch.tensor(2.0, dtype=torch.float64, device=device)
    return {
        "row_norms": (jac,),
        "gram": (jac,),
        "gram_difference": (sam, jac),
        "gram_pair": (sam, jac),
        "combine": (jac, small(TASKS), update(SIZE)),
        "combine_flat": (jac, small(TASKS), sam, small(TASKS), update(SIZE)),
        "project": (jac, small(2, TASKS), rows(2, SIZE)),
        "graddrop_": (
            jac,
            small(TASKS).sigmoid(),
            torch.tensor([True, False, True], device=device),
            torch.tensor([5, 6], device=device),
            update(SIZE),
        ),
        "affinity": (gram[0], small(TASKS).abs(), 0.1),
        "pack_row_": (row, [p.clone() for p in params], offsets, accumulate),
        "adaptive_sq_norm": (saved, row, 0.01),
        "perturb_": (params, saved, row, one, offsets, [0.1, 0.2], True, 0.01),
        "restore_": (params, saved, offsets),
        "draw_order_": (torch.tensor([5, 6], device=device), TASKS, batch),
        "solve_pcgrad": (gram, order),
        "solve_random_": (gram, torch.tensor([5, 6], device=device)),
        "solve_pcgrad_drawn_": (gram, torch.tensor([5, 6], device=device)),
        "solve_gradvac_drawn_": (
            gram,
            torch.tensor([5, 6], device=device),
            torch.zeros_like(gram),
            0.3,
            1e-8,
        ),
        "scale_weights": (gram, small(batch, TASKS).abs(), 2, 0.5),
        "solve_constant": (gram, small(TASKS), 0.5),
        "solve_mgda": (gram, 1e-10),
        "solve_gradvac": (gram, order, 0.1 * small(batch, TASKS, TASKS).tanh(), 0.3, 1e-8),
        "solve_dual_cone": (gram, small(TASKS).abs(), True, 1e-10),
        "solve_cagrad": (gram, 0.4, 1, 1e-10),
        "solve_alpha_fair": (gram, 2.0, small(TASKS).exp(), 1e-10),
        "solve_nash_": (gram, torch.zeros_like(small(batch, TASKS + 1)), 1, 0.5, 1e-10),
        "solve_imtl_g": (gram, 1e-10),
        "solve_config": (gram, None, 1e-10),
        "solve_aligned": (gram, None, 0, 2.0**-23),
        "solve_pcd_": (gram, small(batch, TASKS + 1).abs(), 0.02, 0.9, 1e-8, 1e-10),
        "solve_krum": (gram, 0, 1),
        "solve_sdmgrad_": (cross, simplex, None, 0.5, 0.5, 4, 0.3),
        "solve_modo_": (cross, simplex.clone(), 0.1, 0.1),
    }


def call_public(name: str, args: tuple):
    """The documented function, where accumulate, adaptive, eta, leak and there are by keyword."""
    function = getattr(ops, name)
    if name == "perturb_":
        return function(*args[:6], adaptive=args[6], eta=args[7])
    if name == "graddrop_":
        return function(args[0], args[3], leak=args[1], there=args[2], out=args[4])
    if name == "pack_row_":
        return function(*args[:3], accumulate=args[3])
    return function(*args)


def copied(args: tuple) -> tuple:
    """The same arguments in fresh tensors: ops write into theirs."""

    def one(a):
        if isinstance(a, Tensor):
            return a.clone()
        return [one(x) for x in a] if isinstance(a, list) else a

    return tuple(one(a) for a in args)


def tensors(value) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []
