"""How far float32 Gram matrices are off, and whether they are the same bits at every call."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.gpu import sizes
from bench.gpu.bench import Bench
from flatmtl import ops

CHUNK = 1_000_000  # columns turned to float64 at once


def gram_accuracy(bench: Bench) -> None:
    """Records, for every T: the error of ``ops.gram``, that of the exact matrix rounded to float32."""
    p = sizes.QUICK_COLUMNS[0] if bench.quick else 10_000_000
    for t in sizes.tasks(bench.quick):
        jac = Inputs(t, p, torch.float32, bench.device).jac()
        exact = sum(_product(part.double()) for part in jac.split(CHUNK, dim=1))
        assert isinstance(exact, Tensor)
        first, second = ops.gram(jac), ops.gram(jac)
        size = exact.norm()
        bench.part.records.append(
            {
                "name": "gram",
                "kind": "accuracy",
                "tasks": t,
                "columns": p,
                "off": float((first - exact).norm() / size),
                "rounded_off": float((exact.float().double() - exact).norm() / size),
                "plain_off": float(((jac @ jac.T).double() - exact).norm() / size),
                "same_bits": torch.equal(first, second),
            }
        )
        del jac
        bench.release()


def _product(rows: Tensor) -> Tensor:
    return rows @ rows.T
