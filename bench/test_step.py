"""Whole training steps: what flatmtl adds to the forward and backward passes that it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import flatmtl
from bench import peers
from bench.contests import Call, Contest

LR = 1e-4


class Network(nn.Module):
    """A trunk and a linear head a task."""

    def __init__(self, trunk: nn.Module, features: int, tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, 10) for _ in range(tasks))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def mlp() -> tuple[Network, Tensor, Tensor]:
    """A trunk of 1.05 M parameters, 8 tasks, batch 64."""
    trunk = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
    return Network(trunk, 512, 8), torch.randn(64, 512), torch.randint(10, (8, 64))


def resnet() -> tuple[Network, Tensor, Tensor]:
    """A trunk of 0.16 M parameters with BatchNorm, 3 tasks, batch 32 of 3 x 32 x 32."""
    trunk = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), Residual(32),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
    )  # fmt: skip
    return Network(trunk, 64, 3), torch.randn(32, 3, 32, 32), torch.randint(10, (3, 32))


class Training:
    """One copy of the network with its own SGD; the steps of the contest are its methods."""

    def __init__(self, network: Network, x: Tensor, y: Tensor) -> None:
        self.network, self.x, self.y = copy.deepcopy(network), x, y
        self.params = list(self.network.parameters())
        self.base = torch.optim.SGD(self.params, lr=LR)

    def losses(self, tasks: Sequence[int] | None = None) -> list[Tensor]:
        features = self.network.trunk(self.x)
        return [
            nn.functional.cross_entropy(self.network.heads[i](features), self.y[i])
            for i in (range(len(self.y)) if tasks is None else tasks)
        ]

    def gradients(self, loss: Tensor, *, retain: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, self.params, retain_graph=retain, allow_unused=True)

    def flatmtl_step(
        self, weighting: flatmtl.weighting.Weighting, sharpness: flatmtl.SAM | None
    ) -> Call:
        optimizer = flatmtl.MultiTaskOptimizer(
            self.base, weighting=weighting, sharpness=sharpness, model=self.network
        )
        return lambda: optimizer.step(self.losses)

    def summed(self) -> None:
        """Plain training on the summed loss: one backward pass."""
        self.base.zero_grad()
        torch.stack(self.losses()).sum().backward()
        self.base.step()

    def passes_alone(self) -> None:
        """One forward and T backward passes and the update; nothing is done with the gradients."""
        losses = self.losses()
        for task, loss in enumerate(losses):
            grads = self.gradients(loss, retain=task + 1 < len(losses))
        self._update(grads)

    def sharp_passes_alone(self) -> None:
        """1 + T forward and 2T backward passes and the update, as FS-MTL needs them."""
        losses = self.losses()
        for task, loss in enumerate(losses):
            self.gradients(loss, retain=task + 1 < len(losses))
        for task in range(len(losses)):
            grads = self.gradients(self.losses([task])[0], retain=False)
        self._update(grads)

    def _update(self, grads: tuple[Tensor | None, ...]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = torch.zeros_like(param) if grad is None else grad
        self.base.step()

    def torchjd_pcgrad(self) -> Call:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = PCGrad()

        def step() -> None:
            self.base.zero_grad()
            features = self.network.trunk(self.x)
            losses = [
                nn.functional.cross_entropy(head(features), y)
                for head, y in zip(self.network.heads, self.y, strict=True)
            ]
            # one backward pass at a time, like the others: vmap has no rule for BatchNorm in place
            mtl_backward(losses, features, parallel_chunk_size=1)
            jac_to_grad(self.network.trunk.parameters(), aggregator)
            self.base.step()

        return step


METHODS: dict[str, tuple[Callable[[], flatmtl.weighting.Weighting], flatmtl.SAM | None]] = {
    "Mean": (flatmtl.weighting.Mean, None),
    "PCGrad": (flatmtl.weighting.PCGrad, None),
    "FS-MTL (PCGrad)": (flatmtl.weighting.PCGrad, flatmtl.SAM(0.05)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [mlp, resnet])
def test_step(make, method, measure):
    torch.manual_seed(0)
    network, x, y = make()
    weighting, sharpness = METHODS[method]
    ours = Training(network, x, y).flatmtl_step(weighting(), sharpness)
    rival = Training(network, x, y)
    others: dict[str, Call] = {
        "summed loss": Training(network, x, y).summed,
        "passes alone": rival.sharp_passes_alone if sharpness else rival.passes_alone,
    }
    if method == "PCGrad" and peers.torchjd is not None:
        others["TorchJD"] = Training(network, x, y).torchjd_pcgrad()
    contest = Contest(method, 0, ours, others)
    shared = sum(p.numel() for p in network.trunk.parameters())
    measure(
        contest, kind="step", effort=4, least=7, model=make.__name__, tasks=len(y), columns=shared
    )
