"""Hundreds of heads: autograd is asked for what a task reaches and no more, with the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatmtl import SAM, MultiTaskOptimizer, jacobian
from flatmtl.weighting import PCGrad


class Net(nn.Module):
    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))
        self.x = torch.randn(12, 5)

    def losses(self, missing: int | None = None) -> list[torch.Tensor | None]:
        z = self.trunk(self.x)
        return [
            None if t == missing else (head(z) - t % 7).square().mean()
            for t, head in enumerate(self.heads)
        ]


def train(net: Net, sharpness: SAM | None) -> list[torch.Tensor]:
    base = torch.optim.Adam(net.parameters(), lr=0.01)
    optimizer = MultiTaskOptimizer(base, weighting=PCGrad(), model=net, sharpness=sharpness)
    for k in range(4):
        optimizer.step(lambda k=k: net.losses(1 if k == 2 else None))
    return list(net.state_dict().values())


@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_the_same_to_the_bit(sharpness, rng, monkeypatch):
    net, found = Net(4), []
    for many in (0, 10**9):
        monkeypatch.setattr(jacobian, "_MANY", many)
        found.append(train(copy.deepcopy(net), sharpness))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tasks", [3, 120])
def test_what_autograd_is_asked_for(tasks, rng, monkeypatch):
    net, asked, grad = Net(tasks), [], torch.autograd.grad

    def counting(outputs, inputs, *args, **options):
        asked.append(len(inputs))
        return grad(outputs, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    base = torch.optim.SGD(net.parameters(), lr=0.01)
    MultiTaskOptimizer(base, weighting=PCGrad(), model=net).step(net.losses)
    everything = len(list(net.parameters()))
    reached = len(list(net.trunk.parameters())) + 2
    assert asked == [everything if tasks == 3 else reached] * tasks


def test_a_head_that_another_task_takes_is_still_seen(rng, monkeypatch):
    monkeypatch.setattr(jacobian, "_MANY", 0)
    net = Net(3)
    base = torch.optim.SGD(net.parameters(), lr=0.01)
    optimizer = MultiTaskOptimizer(base, weighting=PCGrad(), model=net)
    optimizer.step(net.losses)

    def other():
        z = net.trunk(net.x)
        return [net.heads[t if t < 2 else 0](z).square().mean() for t in range(3)]

    with pytest.raises(ValueError, match="heads.0.weight' must keep one role"):
        optimizer.step(other)
    with pytest.raises(ValueError, match=r"losses\[1\] must depend on a trainable parameter"):
        fixed = torch.zeros(6, requires_grad=True)
        losses = net.losses()
        losses[1] = fixed.square().sum()
        optimizer.step(lambda: losses)
