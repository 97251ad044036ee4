"""Short training runs with a probe, in a plain loop and under MultiTaskOptimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from oracle_affinity import Quadratics, as_given, total
from torch import Tensor

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import MGDA, Mean, PCGrad

SAMS = [f"sam-{a}" for a in ("decomposed", "direct", "second", "each")]
KINDS = ["plain", "mean", "pcgrad", "mgda", "batched", *SAMS]


def optimizer(kind: str, params: Sequence[Tensor], lr: float, base: type = torch.optim.SGD,
              wrap: dict[str, Any] | None = None, **options: Any) -> torch.optim.Optimizer:  # fmt: skip
    made = base(params, lr=lr, **options)
    if kind == "plain":
        return made
    weighting = {"mean": Mean, "mgda": MGDA}.get(kind, PCGrad)()
    sharpness = SAM(0.05, aggregate=kind[4:]) if kind.startswith("sam-") else None
    wrap = {"jacobian": "batched", **(wrap or {})} if kind == "batched" else wrap or {}
    return MultiTaskOptimizer(made, weighting=weighting, sharpness=sharpness, **wrap)


def step(probe: Any, opt: torch.optim.Optimizer, closure: Any) -> Any:
    """One step of the user's; what a plain loop does, or MultiTaskOptimizer."""
    if isinstance(opt, MultiTaskOptimizer):
        return opt.step(closure)
    opt.zero_grad()
    losses = probe(closure)
    total(losses).backward()
    opt.step()
    return losses


def run(
    problem: Quadratics, probe: Any, opt: torch.optim.Optimizer, look: Callable[[], Any], steps: int = 3,
    form: str = "list", missing: Callable[[int], Sequence[int]] = lambda k: (),
) -> list[Any]:  # fmt: skip
    """What ``look`` sees before every step."""
    seen = []
    for k in range(steps):
        seen.append(look())
        step(probe, opt, lambda: as_given(form, problem.losses(missing(k))))
    return seen


def close(found: np.ndarray, expected: np.ndarray, atol: Any = 1e-12, rtol: float = 1e-9) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    lost = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), lost)
    bad = ~lost & ~(np.abs(found - expected) <= rtol * np.abs(expected) + np.nan_to_num(atol))
    assert not bad.any(), f"{found}\n{expected}\noff by\n{np.where(lost, 0, found - expected)}"
