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

SCHEMAS: dict[str, str] = {
    "row_norms": "(Tensor jac) -> Tensor",
    "gram": "(Tensor jac) -> Tensor",
    "gram_difference": "(Tensor sam, Tensor jac) -> Tensor",
    "combine": "(Tensor jac, Tensor weights, Tensor(a!) out) -> ()",
    "combine_flat": "(Tensor jac, Tensor a, Tensor sam, Tensor b, Tensor(a!) out) -> ()",
    "project": "(Tensor jac, Tensor coefficients, Tensor(a!) out) -> ()",
    "affinity": "(Tensor gram, Tensor losses, float lr) -> Tensor",
    "pack_row_": "(Tensor(a!) row, Tensor[] grads, int[] offsets) -> Tensor",
    "adaptive_sq_norm": "(Tensor saved, Tensor row, float eta) -> Tensor",
    "perturb_": (
        "(Tensor(a!)[] params, Tensor saved, Tensor row, Tensor sq_norm, int[] offsets, float[] rho,"
        " bool adaptive, float eta) -> ()"
    ),
    "restore_": "(Tensor(a!)[] params, Tensor saved, int[] offsets) -> ()",
    "draw_order_": "(Tensor(a!) rng, int tasks, int batch) -> Tensor",
    "solve_pcgrad": "(Tensor gram, Tensor order) -> (Tensor weights, Tensor coefficients, Tensor status)",
    "solve_mgda": "(Tensor gram, float ridge) -> (Tensor weights, Tensor status, Tensor residual)",
}


def _double(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def _fake_square(jac: Tensor) -> Tensor:
    return _double(jac, jac.shape[0], jac.shape[0])


def _fake_solve_pcgrad(gram: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tasks, _ = gram.shape
    return (
        _double(gram, batch, tasks),
        _double(gram, batch, tasks, tasks),
        gram.new_empty((batch,), dtype=torch.int64),
    )


def _fake_solve_mgda(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, tasks, _ = gram.shape
    return (
        _double(gram, batch, tasks),
        gram.new_empty((batch,), dtype=torch.int64),
        _double(gram, batch),
    )


def _fake_nothing(*_: object) -> None:
    return None


def _fake_pack_row(row: Tensor, grads: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    return _double(row)


FAKES: dict[str, Callable[..., object]] = {
    "row_norms": lambda jac: _double(jac, jac.shape[0]),
    "gram": _fake_square,
    "gram_difference": lambda sam, jac: _fake_square(jac),
    "combine": _fake_nothing,
    "combine_flat": _fake_nothing,
    "project": _fake_nothing,
    "affinity": lambda gram, losses, lr: _fake_square(gram),
    "pack_row_": _fake_pack_row,
    "adaptive_sq_norm": lambda saved, row, eta: _double(row),
    "perturb_": _fake_nothing,
    "restore_": _fake_nothing,
    "draw_order_": lambda rng, tasks, batch: rng.new_empty((batch, tasks, tasks)),
    "solve_pcgrad": _fake_solve_pcgrad,
    "solve_mgda": _fake_solve_mgda,
}

# Kept alive for the life of the process: a Library that is collected takes its operators with it.
LIBRARY = torch.library.Library("flatmtl", "DEF")

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flatmtl::{_name}", FAKES[_name], lib=LIBRARY)
