"""Several processes on CUDA, over NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import SAM, MultiTaskOptimizer, weighting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
METHODS: list[tuple[Callable[[], weighting.Weighting], SAM | None]] = [
    (weighting.PCGrad, None),
    (weighting.NashMTL, SAM(0.05, aggregate="direct")),
    (lambda: weighting.UncertaintyWeighting(2), None),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def trained(
    number: int, wrap: Callable[[nn.Module], nn.Module], rank: int, size: int, **options: Any
) -> Tensor:
    method, sharp = METHODS[number]
    torch.manual_seed(0)
    net = Net().cuda()
    model = wrap(net)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05),
        weighting=method(),
        sharpness=sharp,
        model=model,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, y = torch.randn(8, 5, generator=generator), torch.randn(2, 8, 1, generator=generator)
        x, y = x.chunk(size)[rank].cuda(), y.chunk(size, 1)[rank].cuda()

        def closure(tasks: Any = (0, 1), x: Tensor = x, y: Tensor = y) -> list[Tensor | None]:
            losses = [(o - t).square().mean() for o, t in zip(model(x), y, strict=True)]
            return [loss if t in tasks else None for t, loss in enumerate(losses)]

        optimizer.step(closure)
    params = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in params]).cpu()


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A group of one."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_sharded_parameters_of_one_rank(alone: None, number: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(net: nn.Module) -> nn.Module:
        return fully_shard(net, mesh=init_device_mesh("cuda", (1,)))

    found = trained(number, shard, 0, 1)
    torch.testing.assert_close(found, trained(number, lambda net: net, 0, 1, process_group=None))


def on_a_rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    os.environ["NCCL_ASYNC_ERROR_HANDLING"] = "1"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "nccl", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )

    def wrap(net: nn.Module) -> nn.Module:
        return DistributedDataParallel(net, device_ids=[rank])

    found = [
        trained(number, wrap, rank, 2, shard_rows=sharded)
        for number in range(len(METHODS))
        for sharded in (False, True)
    ]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_ranks_make_the_steps_of_one_process(tmp_path: Any) -> None:
    mp.spawn(on_a_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for k, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other)
        single = trained(k // 2, lambda net: net, 0, 1)
        torch.testing.assert_close(one, single, rtol=1e-4, atol=1e-5)
