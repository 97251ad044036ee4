"""What loops over several processes do besides: passes of their own, unlike batches, late failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import MultiTaskOptimizer, weighting

Loop = tuple[nn.Module, MultiTaskOptimizer]


def loop(size: int, method: str, *, norm: bool = False) -> Loop:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)]
    net = nn.Sequential(*(layers[:1] + [nn.BatchNorm1d(6)] + layers[1:] if norm else layers))
    net = net.double()
    model = DistributedDataParallel(net) if size > 1 else net
    method_of = weighting.UncertaintyWeighting(2) if method == "uw" else weighting.PCGrad()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return model, MultiTaskOptimizer(base, weighting=method_of, model=model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def given(rank: int, size: int, x: Tensor) -> list[Tensor]:
    """Losses whose forward pass the caller has made, through DDP and BatchNorm."""
    found = []
    for training in (True, False):
        model, optimizer = loop(size, "pcgrad", norm=True)
        model.train(training)
        for _ in range(3):
            out = model(x.chunk(size)[rank])
            optimizer.backward([out[:, 0].square().mean(), (out[:, 1] - 1).square().mean()])
            optimizer.step()
        found.append(flat(model))
    return found


def test_losses_of_passes_that_are_over(ranks: Any, rng: Any) -> None:
    x = torch.from_numpy(rng.standard_normal((8, 4)))
    first, second = ranks(2).run(given, 2, x)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    # without batch statistics a step is that of one process
    torch.testing.assert_close(first[1], given(0, 1, x)[1])


def unlike(rank: int, size: int, x: Tensor, first: bool) -> tuple[str, Tensor, Tensor]:
    model, optimizer = loop(size, "uw")

    def closure() -> list[Tensor]:
        out = model(x.chunk(size)[rank])
        return [out[:, 0].square().mean(), (out[:, 1] - 1).square().mean()]

    if not first:
        optimizer.step([closure])
    before = flat(model)
    text = ""
    try:
        optimizer.step([closure] * (1 + rank))
    except ValueError as error:
        text = str(error)
    same = flat(model)
    assert torch.equal(before, same)
    optimizer.step([closure])
    return text, same, flat(model)


@pytest.mark.parametrize("first", [True, False])
def test_unlike_numbers_of_micro_batches(ranks: Any, rng: Any, first: bool) -> None:
    x = torch.from_numpy(rng.standard_normal((8, 4)))
    found = ranks(2).run(unlike, 2, x, first, timeout=30)
    for rank, (text, before, after) in enumerate(found):
        assert "as many micro-batches on every rank where a step is one backward pass" in text
        assert f"got {1 + rank} on rank {rank}" in text
        assert not torch.equal(before, after)
    assert torch.equal(found[0][2], found[1][2])


def behind(rank: int, size: int, x: Tensor) -> list[str]:
    """Rank 1's base optimizer fails once, when nothing goes between the ranks any more."""
    model, optimizer = loop(size, "pcgrad")

    def closure() -> list[Tensor]:
        out = model(x.chunk(size)[rank])
        return [out[:, 0].square().mean(), (out[:, 1] - 1).square().mean()]

    step, texts = optimizer.base_optimizer.step, []
    for k in range(4):

        def fails() -> None:
            raise MemoryError("no room")

        optimizer.base_optimizer.step = fails if (rank, k) == (1, 1) else step  # type: ignore[method-assign]
        try:
            optimizer.step(closure)
            texts.append("")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_a_rank_that_fails_behind_its_last_message(ranks: Any, rng: Any) -> None:
    x = torch.from_numpy(rng.standard_normal((8, 4)))
    first, second = ranks(2).run(behind, 2, x, timeout=30)
    assert first[0] == second[0] == first[1] == ""
    assert second[1] == "MemoryError: no room"
    assert second[2].startswith(
        "RuntimeError: every rank must make every step: rank 1 failed in the last one"
    )
    assert (
        first[2].startswith("RankFailedError: the step was made on no rank")
        and "no room" in first[2]
    )
    assert first[3] == second[3] == ""  # the caller has been told


@pytest.mark.parametrize(
    ("samples", "kind", "text"),
    [
        (-1, ValueError, "samples must be finite and at least 0, got -1"),
        ("8", TypeError, "samples must be a number, got str"),
        ([8], ValueError, "samples must have one entry for each of 2 tasks, got 1"),
        ({"z": 3}, ValueError, "samples must have the tasks [0, 1], got ['z']"),
    ],
)
def test_samples_of_one_process_are_checked(samples: Any, kind: type, text: str) -> None:
    model, optimizer = loop(1, "pcgrad")
    x = torch.randn(8, 4, dtype=torch.float64)

    def closure() -> list[Tensor]:
        out = model(x)
        return [out[:, 0].square().mean(), (out[:, 1] - 1).square().mean()]

    before = flat(model)
    with pytest.raises(kind) as raised:
        optimizer.step(closure, samples=samples)
    assert str(raised.value) == text
    assert torch.equal(flat(model), before)
    optimizer.step(closure, samples=8)
    assert not torch.equal(flat(model), before)
