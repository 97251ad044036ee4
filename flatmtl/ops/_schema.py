"""The operators' schemas and fake kernels: what torch needs to know before any body runs.

Every operator has three bodies: ``reference.py`` (plain torch, the default on every device), the C++
CPU library and the CUDA library, which take over for their device when they are loaded
(``_library.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatmtl.ops import reference

_SOLVED = " -> (Tensor weights, Tensor status, Tensor residual)"

SCHEMAS: dict[str, str] = {
    "row_norms": "(Tensor jac) -> Tensor",
    "gram": "(Tensor jac) -> Tensor",
    "gram_difference": "(Tensor sam, Tensor jac) -> Tensor",
    "gram_pair": "(Tensor sam, Tensor jac) -> (Tensor gram, Tensor difference)",
    "combine": "(Tensor jac, Tensor weights, Tensor(a!) out) -> ()",
    "combine_flat": "(Tensor jac, Tensor a, Tensor sam, Tensor b, Tensor(a!) out) -> ()",
    "project": "(Tensor jac, Tensor coefficients, Tensor(a!) out) -> ()",
    "graddrop_": (
        "(Tensor jac, Tensor? leak, Tensor? there, Tensor(a!) rng, Tensor(b!) out) -> ()"
    ),
    "affinity": "(Tensor gram, Tensor losses, float lr) -> Tensor",
    "pack_row_": (
        "(Tensor(a!) row, Tensor[] grads, int[] offsets, bool accumulate=False) -> Tensor"
    ),
    "adaptive_sq_norm": "(Tensor saved, Tensor row, float eta) -> Tensor",
    "perturb_": (
        "(Tensor(a!)[] params, Tensor saved, Tensor row, Tensor sq_norm, int[] offsets, float[] rho,"
        " bool adaptive, float eta) -> ()"
    ),
    "restore_": "(Tensor(a!)[] params, Tensor saved, int[] offsets) -> ()",
    "draw_order_": "(Tensor(a!) rng, int tasks, int batch) -> Tensor",
    # Solvers: gram, cross [T, T] or [B, T, T], and a leading B in every result if it has one.
    "solve_constant": (
        "(Tensor gram, Tensor? preference, float value) -> (Tensor weights, Tensor status)"
    ),
    "solve_pcgrad": "(Tensor gram, Tensor order) -> (Tensor weights, Tensor coefficients, Tensor status)",
    "solve_pcgrad_drawn_": (
        "(Tensor gram, Tensor(a!) rng) -> (Tensor weights, Tensor coefficients, Tensor status)"
    ),
    "solve_random_": "(Tensor gram, Tensor(a!) rng) -> (Tensor weights, Tensor status)",
    "solve_gradvac": (
        "(Tensor gram, Tensor order, Tensor(a!) target, float beta, float eps)"
        " -> (Tensor weights, Tensor status)"
    ),
    "solve_gradvac_drawn_": (
        "(Tensor gram, Tensor(a!) rng, Tensor(b!) target, float beta, float eps)"
        " -> (Tensor weights, Tensor status)"
    ),
    "solve_mgda": "(Tensor gram, float ridge)" + _SOLVED,
    "solve_dual_cone": "(Tensor gram, Tensor? preference, bool each, float ridge)" + _SOLVED,
    "solve_cagrad": "(Tensor gram, float c, int rescale, float ridge)" + _SOLVED,
    "solve_alpha_fair": "(Tensor gram, float alpha, Tensor? preference, float ridge)" + _SOLVED,
    "solve_nash_": (
        "(Tensor gram, Tensor(a!) last, int every, float max_norm, float ridge)" + _SOLVED
    ),
    "solve_imtl_g": "(Tensor gram, float ridge)" + _SOLVED,
    "solve_config": "(Tensor gram, Tensor? preference, float ridge)" + _SOLVED,
    "solve_aligned": (
        "(Tensor gram, Tensor? preference, int scale_mode, float rank_tolerance)" + _SOLVED
    ),
    "solve_pcd_": (
        "(Tensor gram, Tensor(a!) state, float tau, float beta, float eps, float ridge)" + _SOLVED
    ),
    "solve_krum": "(Tensor gram, int byzantine, int selected) -> (Tensor weights, Tensor status)",
    "solve_sdmgrad_": (
        "(Tensor cross, Tensor(a!) state, Tensor? preference, float lr, float momentum, int steps,"
        " float lambda_) -> (Tensor weights, Tensor status)"
    ),
    "solve_modo_": (
        "(Tensor cross, Tensor(a!) state, float gamma, float rho)"
        " -> (Tensor weights, Tensor status)"
    ),
    "scale_weights": "(Tensor gram, Tensor weights, int scaling, float max_norm) -> Tensor",
}


def _double(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def _fake_square(jac: Tensor) -> Tensor:
    return _double(jac, jac.shape[0], jac.shape[0])


def _fake_weights(gram: Tensor, *_: object) -> Tensor:
    return _double(gram, *gram.shape[:-1])


def _fake_pair(gram: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_weights(gram), gram.new_empty(gram.shape[:-2], dtype=torch.int64)


def _fake_solved(gram: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_pair(gram), _double(gram, *gram.shape[:-2])


def _fake_solve_pcgrad(gram: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, status = _fake_pair(gram)
    return weights, _double(gram, *gram.shape), status


def _fake_nothing(*_: object) -> None:
    return None


def _fake_pack_row(
    row: Tensor, grads: Sequence[Tensor], offsets: Sequence[int], accumulate: bool = False
) -> Tensor:
    return _double(row)


FAKES: dict[str, Callable[..., object]] = {
    "row_norms": lambda jac: _double(jac, jac.shape[0]),
    "gram": _fake_square,
    "gram_difference": lambda sam, jac: _fake_square(jac),
    "gram_pair": lambda sam, jac: (_fake_square(jac), _fake_square(jac)),
    "combine": _fake_nothing,
    "combine_flat": _fake_nothing,
    "project": _fake_nothing,
    "graddrop_": _fake_nothing,
    "affinity": lambda gram, losses, lr: _fake_square(gram),
    "pack_row_": _fake_pack_row,
    "adaptive_sq_norm": lambda saved, row, eta: _double(row),
    "perturb_": _fake_nothing,
    "restore_": _fake_nothing,
    "draw_order_": lambda rng, tasks, batch: rng.new_empty((batch, tasks, tasks)),
    "solve_constant": _fake_pair,
    "solve_pcgrad": _fake_solve_pcgrad,
    "solve_pcgrad_drawn_": _fake_solve_pcgrad,
    "solve_random_": _fake_pair,
    "solve_gradvac": _fake_pair,
    "solve_gradvac_drawn_": _fake_pair,
    "solve_mgda": _fake_solved,
    "solve_dual_cone": _fake_solved,
    "solve_cagrad": _fake_solved,
    "solve_alpha_fair": _fake_solved,
    "solve_nash_": _fake_solved,
    "solve_imtl_g": _fake_solved,
    "solve_config": _fake_solved,
    "solve_aligned": _fake_solved,
    "solve_pcd_": _fake_solved,
    "solve_krum": _fake_pair,
    "solve_sdmgrad_": _fake_pair,
    "solve_modo_": _fake_pair,
    "scale_weights": _fake_weights,
}

# Kept alive for the life of the process: a Library that is collected takes its operators with it.
LIBRARY = torch.library.Library("flatmtl", "DEF")

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flatmtl::{_name}", FAKES[_name], lib=LIBRARY)
