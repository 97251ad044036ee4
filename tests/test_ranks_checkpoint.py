"""Checkpoints of several processes: saved on some ranks, taken up on as many or others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatmtl
from flatmtl import weighting
from flatmtl.distributed import Checkpoint

# name -> a weighting and whether with sharpness; one with a state of its own, one with learned parameters
KINDS = {
    "NashMTL": (weighting.NashMTL, False),
    "UncertaintyWeighting": (lambda: weighting.UncertaintyWeighting(2), True),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def made(world: int, kind: str, seed: int) -> tuple[Net, flatmtl.MultiTaskOptimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    net = Net()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(net.trunk[0], mesh=mesh)
    # the root's own parameters stay gathered after a forward pass
    fully_shard(net, mesh=mesh, ignored_params=set(net.heads.parameters()))
    method, sharp = KINDS[kind]
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.Adam(net.parameters(), lr=0.01),
        weighting=method(),
        sharpness=flatmtl.SAM(0.05) if sharp else None,
        model=net,
    )
    return net, optimizer


def train(
    net: Net, optimizer: flatmtl.MultiTaskOptimizer, batches: list[Tensor], rank: int, world: int
) -> None:
    for batch in batches:
        part = batch.chunk(world)[rank]

        def closure(tasks: Any = (0, 1), part: Tensor = part) -> list[Tensor | None]:  # noqa: ANN401
            out = net(part[:, :5])
            losses = [(o.squeeze(1) - part[:, 5 + t]).square().mean() for t, o in enumerate(out)]
            return [loss if t in tasks else None for t, loss in enumerate(losses)]

        optimizer.step(closure)


def evaluate(net: Net, batch: Tensor) -> None:
    with torch.no_grad():
        net(batch[:, :5])


def whole(net: Net) -> Tensor:
    params = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in params])


def save(rank: int, world: int, folder: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """Trains, saves half way; what the whole training came to."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for kind in KINDS:
        net, optimizer = made(world, kind, seed=1)
        train(net, optimizer, batches[:3], rank, world)
        evaluate(net, batches[0])
        dcp.save({"training": Checkpoint(net, optimizer)}, checkpoint_id=f"{folder}/{kind}")
        train(net, optimizer, batches[3:], rank, world)
        found[kind] = whole(net)
    return found


def load(rank: int, world: int, folder: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """What the training comes to that is taken up half way, by networks that began elsewhere."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for kind in KINDS:
        net, optimizer = made(world, kind, seed=2)
        evaluate(net, batches[0])
        dcp.load({"training": Checkpoint(net, optimizer)}, checkpoint_id=f"{folder}/{kind}")
        train(net, optimizer, batches[3:], rank, world)
        found[kind] = whole(net)
    return found


@pytest.mark.parametrize("other", [2, 4])
def test_on_as_many_ranks_bit_for_bit_and_on_others(ranks: Any, rng: Any, other: int) -> None:  # noqa: ANN401
    batches = [torch.from_numpy(rng.standard_normal((8, 7))).float() for _ in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        straight = ranks(2).run(save, 2, folder, batches)
        assert {path.name for path in Path(folder).iterdir()} == set(KINDS)
        resumed = ranks(other).run(load, other, folder, batches)
    for kind in KINDS:
        for one in resumed:
            if other == 2:
                assert torch.equal(one[kind], straight[0][kind]), kind
            torch.testing.assert_close(one[kind], straight[0][kind], rtol=1e-5, atol=1e-6)


def test_an_optimizer_of_another_kind_is_refused() -> None:
    net = Net()
    with pytest.raises(
        TypeError, match=r"optimizer must be a flatmtl\.MultiTaskOptimizer, got SGD"
    ):
        Checkpoint(net, torch.optim.SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]
