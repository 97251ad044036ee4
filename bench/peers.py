"""The aggregation methods as others compute them: TorchJD where installed, and published descriptions."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from flatmtl.ops import reference

try:
    import torchjd
    from torchjd import aggregation as _torchjd
except ImportError:  # an optional rival: its columns stay empty
    torchjd = None


def torchjd_aggregator(name: str) -> Callable[[Tensor], Tensor] | None:
    """TorchJD's aggregator for J; None without TorchJD."""
    if torchjd is None:
        return None
    return {"mean": _torchjd.Mean, "pcgrad": _torchjd.PCGrad, "mgda": _torchjd.MGDA}[name]()


def torchjd_weighting(name: str) -> Callable[[Tensor], Tensor] | None:
    """TorchJD's weighting for a Gram matrix; None without TorchJD."""
    if torchjd is None:
        return None
    return {"pcgrad": _torchjd.PCGradWeighting, "mgda": _torchjd.MGDAWeighting}[name]()


def torchjd_jac_to_grad(jac: Tensor, offsets: list[int]) -> Callable[[], None]:
    """TorchJD's PCGrad from ``.jac`` fields, those of J [T, P] cut at ``offsets``, to ``.grad``."""
    from torchjd.autojac import jac_to_grad

    params = []
    for begin, end in zip(offsets, [*offsets[1:], jac.shape[1]], strict=True):
        param = torch.zeros(end - begin, dtype=jac.dtype, device=jac.device, requires_grad=True)
        param.jac = jac[:, begin:end].contiguous()  # [T, elements]
        params.append(param)
    aggregator = _torchjd.PCGrad()

    def call() -> None:
        for param in params:
            param.grad = None  # it adds to what is there
        jac_to_grad(params, aggregator, retain_jac=True)

    return call


def plain_torch(name: str) -> Callable[[Tensor], Tensor] | None:
    """The method in a few lines of torch: Gram matrix, weights, ``w @ J``."""
    if name == "mean":
        return lambda jac: jac.mean(0)
    if name == "pcgrad":
        return lambda jac: pcgrad_weights(jac @ jac.T).to(jac.dtype) @ jac
    return None


def pcgrad_weights(gram: Tensor) -> Tensor:
    """PCGrad's weights (sum form), [T, T] -> [T]: flatmtl's reference operator."""
    tasks = gram.shape[0]
    order = torch.rand(tasks, tasks, device=gram.device).argsort(1)
    return reference.solve_pcgrad(gram[None], order[None])[0][0]


def pcgrad_on_gradients(jac: Tensor) -> Tensor:
    """PCGrad as published and as trainer frameworks run it (LibMTL): on the gradients themselves.

    Every task's gradient is copied, held against every other one at full length, and projected at
    full length; the projected gradients are added up in Python (Yu et al., arXiv 2001.06782, Alg. 1).
    """
    rows = list(jac.unbind())
    projected = [row.clone() for row in rows]
    for i, own in enumerate(projected):
        for j in random.sample(range(len(rows)), len(rows)):
            if j == i:
                continue
            dot = own @ rows[j]
            if dot < 0:
                own -= dot / rows[j].norm().square() * rows[j]
    return sum(projected)
