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
from bench.networks import Network, mlp, resnet

LR = 1e-4


class Training:
    """One copy of the network with its own SGD; the steps of the contest are its methods."""

    def __init__(self, network: Network, x: Tensor, y: Tensor) -> None:
        self.network, self.x, self.y = copy.deepcopy(network), x, y
        self.params = list(self.network.parameters())
        self.base = torch.optim.SGD(self.params, lr=LR)

    def losses(self, tasks: Sequence[int] | None = None) -> list[Tensor]:
        return self.network.losses(self.x, self.y, tasks)

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
