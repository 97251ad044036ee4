"""FSDP2 with replicated parameters among the shared ones; means of no samples."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from ranks import counted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.scaling_model import of_fsdp, one_row_of_shards, row, shards
from flatmtl import SAM, MultiTaskOptimizer, weighting

TASKS, WIDTH, E = 3, 16, 8


class Net(nn.Module):
    """The first bias of the trunk and the heads are to be replicated."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z).squeeze(1) for head in self.heads]


def made(size: int, method: str, sharp: bool) -> tuple[Net, MultiTaskOptimizer]:
    torch.manual_seed(0)
    net = Net().double()
    if size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        whole = {net.trunk[0].bias, *net.heads.parameters()}
        for layer in (net.trunk[0], net.trunk[2]):
            fully_shard(layer, mesh=mesh, ignored_params=whole & set(layer.parameters()))
        fully_shard(net, mesh=mesh, ignored_params=whole)
    methods = {
        "uw": lambda: weighting.UncertaintyWeighting(TASKS),
        "mgda": weighting.MGDA,
        "nash": weighting.NashMTL,
    }
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05, foreach=False),
        weighting=methods[method](),
        sharpness=SAM(0.05, aggregate="direct" if method == "nash" else "decomposed")
        if sharp
        else None,
        model=net,
    )
    return net, optimizer


def train(rank: int, size: int, method: str, sharp: bool, x: Tensor) -> tuple[Tensor, Any]:
    net, optimizer = made(size, method, sharp)
    part = x.chunk(size)[rank]

    def closure(tasks: Any = (0, 1, 2)) -> list[Tensor | None]:
        out = net(part)
        # a bias moves a target by itself: its part of the Gram matrix is not small
        losses = [(o - 3 * t - part[:, t]).square().mean() for t, o in enumerate(out)]
        return [loss if t in tasks else None for t, loss in enumerate(losses)]

    for _ in range(3):
        optimizer.step(closure)
    calls: Any = None
    if size > 1:
        with counted() as calls:
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    params = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in params]), calls


@pytest.mark.parametrize(
    ("method", "sharp"),
    [("mgda", False), ("mgda", True), ("nash", False), ("nash", True), ("uw", False)],
)
def test_replicated_columns_count_once(ranks: Any, rng: Any, method: str, sharp: bool) -> None:
    x = torch.from_numpy(rng.standard_normal((8, WIDTH)))
    (first, calls), (second, _) = ranks(2).run(train, 2, method, sharp, x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train(0, 1, method, sharp, x)[0], rtol=1e-9, atol=1e-10)
    units = [WIDTH * WIDTH, WIDTH * WIDTH + WIDTH]
    R, Q = row(E, [WIDTH]), TASKS * row(E, [WIDTH, 1])
    if method == "uw":
        expected = of_fsdp(1, units, E, 2) + one_row_of_shards(TASKS, R, Q, 1 + TASKS, E)
    else:
        expected = of_fsdp(TASKS, units, E, 2, perturbed=sharp)
        expected += shards(TASKS, R, Q, E, perturbed=sharp)
    assert Counter(calls) == Counter(expected)


def of_nothing(rank: int, size: int, x: Tensor) -> Tensor:
    """The second rank has no sample of the last task: the mean over them is NaN."""
    torch.manual_seed(0)
    net = Net().double()
    model = DistributedDataParallel(net) if size > 1 else net
    method = weighting.UncertaintyWeighting(TASKS)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05), weighting=method, model=model
    )
    part = x.chunk(size)[rank]
    counts = [len(part), len(part), len(part) if size == 1 else len(part) * (1 - rank)]
    if size == 1:
        counts[2] = len(x) // 2

    def closure() -> list[Tensor]:
        out = model(part)
        found = []
        for t, o in enumerate(out):
            mask = (torch.arange(len(part)) < counts[t]).double()
            # with an empty mask 0 / 0, and so is every gradient, whatever it is multiplied by
            found.append((mask * (o - part[:, t]).square()).sum() / mask.sum())
        return found

    for _ in range(3):
        losses = optimizer.step(closure, samples=counts)
        assert losses is not None
        assert math.isnan(float(losses[2])) == (rank == 1)  # type: ignore[call-overload, index]
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def test_a_mean_of_nothing(ranks: Any, rng: Any) -> None:
    x = torch.from_numpy(rng.standard_normal((8, WIDTH)))
    first, second = ranks(2).run(of_nothing, 2, x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, of_nothing(0, 1, x), rtol=1e-9, atol=1e-10)
