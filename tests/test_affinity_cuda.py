"""The probe on a CUDA device: as on the CPU, and without a wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import PCGrad

pytestmark = pytest.mark.gpu
HOW = {
    "exact": {"groups": [(0, 1), (0, 1, 2)]},
    "optimizer": {"look_ahead": "optimizer"},
    "first order": {"mode": "first_order"},
    "etap": {"mode": "first_order", "momentum": True},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def losses(self, x: torch.Tensor, missing: int | None) -> list[torch.Tensor | None]:
        z = self.trunk(x)
        return [
            None if t == missing else (h(z) - t).square().mean() for t, h in enumerate(self.heads)
        ]


def train(device: str, kind: str, how: str | None, quiet: bool = False):
    """Six steps; parameters, buffers, and the probe."""
    torch.manual_seed(5)
    net, x = Net(), torch.randn(32, 6)
    net, x = net.to(device), x.to(device)
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = base
    if kind != "plain":
        sharpness = SAM(0.05) if kind == "sam" else None
        optimizer = MultiTaskOptimizer(
            base, weighting=PCGrad(), model=net, sharpness=sharpness, nonfinite="mask"
        )
    model = {"model": net} if kind == "plain" else {}
    probe = None if how is None else AffinityProbe(optimizer, every=2, **HOW[how], **model)
    for k in range(6):
        if quiet and k == 4:  # by then buffers and masks are made
            torch.cuda.set_sync_debug_mode("error")
        try:
            closure = lambda: net.losses(x, 1 if k in (2, 4) else None)  # noqa: E731
            if kind == "plain":
                losses = closure() if probe is None else probe(closure)
                base.zero_grad()
                torch.stack([loss for loss in losses if loss is not None]).sum().backward()
                base.step()
            else:
                optimizer.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())], probe


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam"])
@pytest.mark.parametrize("how", HOW)
def test_as_on_the_cpu(kind, how):
    here, there = (train(device, kind, how)[1].record() for device in ("cuda", "cpu"))
    for quantity in there.quantities:
        np.testing.assert_allclose(
            here.matrix(quantity), there.matrix(quantity), rtol=2e-3, atol=2e-5
        )
        np.testing.assert_array_equal(here.counts(quantity), there.counts(quantity))


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam"])
@pytest.mark.parametrize("how", HOW)
def test_training_is_the_same_to_the_bit(kind, how):
    without, _ = train("cuda", kind, None)
    probed, _ = train("cuda", kind, how)
    assert all(torch.equal(a, b) for a, b in zip(without, probed))


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam"])
@pytest.mark.parametrize("how", HOW)
def test_no_wait(kind, how):
    train("cuda", kind, how, quiet=True)
