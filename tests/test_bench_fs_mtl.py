"""The FS-MTL steps that bench/ times against each other are the same step, in the same passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import fs_mtl_steps, memory, own_time
from bench.fs_mtl_steps import FOREACH, LOOPS, OURS, Entrant
from bench.networks import Network, Residual, resnet18
from bench.own_time import BACKWARD, FORWARD, UPDATE, OwnTime

RIVALS = [FOREACH, LOOPS]
BATCH = 8


def mlp(tasks: int) -> Network:
    return Network(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 9)), 9, tasks)


def conv(tasks: int) -> Network:
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), Residual(8), nn.Flatten(), nn.Linear(8 * 16, 9)
    )
    return Network(trunk, 9, tasks)


SHAPES = {mlp: (BATCH, 12), conv: (BATCH, 3, 8, 8)}


def problem(make, tasks: int, rng, dtype=torch.float32):
    """(network, x, y) and PCGrad's orders for both families."""
    network = make(tasks).to(dtype)
    x = torch.randn(SHAPES[make], dtype=dtype)
    y = torch.from_numpy(rng.integers(10, size=(tasks, BATCH)))
    orders = tuple(torch.stack([torch.randperm(tasks) for _ in range(tasks)]) for _ in range(2))
    return (network, x, y), orders


def outcome(entrant: Entrant, steps: int) -> dict[str, torch.Tensor]:
    """What a few steps leave: gradients and change of the parameters, and the buffers."""
    before = [p.detach().clone() for p in entrant.network.parameters()]
    for _ in range(steps):
        losses = entrant.step(entrant.losses)
    params = list(entrant.network.parameters())
    trunk = list(entrant.network.trunk.parameters())
    flat = {
        "losses": losses,
        "shared": [p.grad for p in trunk],
        "own": [p.grad for p in params[len(trunk) :]],
        "change": [p.detach() - b for p, b in zip(params, before)],
        "buffers": [b for b in entrant.network.buffers() if b.is_floating_point()],
    }
    return {k: torch.cat([t.reshape(-1) for t in v]) for k, v in flat.items() if v}


def errors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {k: float((a[k] - b[k]).norm() / b[k].norm()) for k in b}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("rho", [None, 0.05])
@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("make", SHAPES)
def test_the_same_step(make, tasks, rho, rival, rng):
    data, orders = problem(make, tasks, rng)
    ours, theirs = (
        outcome(Entrant(name, *data, rho=rho, orders=orders), steps=1) for name in (OURS, rival)
    )
    found = errors(theirs, ours)
    found.pop("change")  # float32 cannot show it: the rate is 1e-4
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("make", SHAPES)
def test_the_same_steps_in_float64(make, rival, rng):
    data, orders = problem(make, 3, rng, torch.float64)
    ours, theirs = (outcome(Entrant(name, *data, orders=orders), 3) for name in (OURS, rival))
    found = errors(theirs, ours)
    assert max(found.values()) <= 1e-9, found


@pytest.mark.parametrize("rival", RIVALS)
def test_the_comparison_sees_a_difference(rival, rng):
    """A radius 1 % larger, no sharpness: neither passes for the same step."""
    data, orders = problem(conv, 5, rng)
    ours = outcome(Entrant(OURS, *data, orders=orders), steps=1)
    others = {
        "rho": Entrant(rival, *data, rho=1.01 * fs_mtl_steps.RHO, orders=orders),
        "plain": Entrant(rival, *data, rho=None, orders=orders),
    }
    for what, entrant in others.items():
        found = errors(outcome(entrant, steps=1), ours)
        assert found["shared"] > 1e-5, (what, found)
        assert found["own"] > 1e-5, (what, found)


@pytest.mark.parametrize("name", [OURS, *RIVALS])
@pytest.mark.parametrize("tasks", [2, 5])
def test_passes(name, tasks, rng):
    """(1+T) forward and 2T backward passes, one update; 1 and T without sharpness."""
    data, _ = problem(conv, tasks, rng)
    for rho, forwards, backwards in ((0.05, 1 + tasks, 2 * tasks), (None, 1, tasks)):
        entrant = Entrant(name, *data, rho=rho)
        meter = OwnTime(entrant.base, entrant.losses)
        for _ in range(2):
            split = meter.measure(entrant.step)
            assert split.calls == {FORWARD: forwards, BACKWARD: backwards, UPDATE: 1}


def test_own_time_is_what_is_left(monkeypatch):
    """On a clock that only moves where time is said to be spent: each is found where it was spent."""
    now = [0]

    def spend(nanoseconds: int) -> None:
        now[0] += nanoseconds

    monkeypatch.setattr(own_time.time, "perf_counter_ns", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            spend(1_000)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            spend(20_000)
            return grad

    network = mlp(1)
    base = torch.optim.SGD(network.parameters(), lr=0.1)
    base.register_step_pre_hook(lambda *_: spend(300_000))

    def closure():
        spend(4_000)
        loss = network.losses(torch.ones(BATCH, 12), torch.zeros(1, BATCH).long())[0]
        torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        return Slow.apply(loss)

    def step(closure):
        loss = closure()
        spend(5_000_000)
        loss.backward(retain_graph=True)
        loss.backward()
        spend(60_000_000)
        base.step()

    split = own_time.OwnTime(base, closure).measure(step)
    spent = {FORWARD: 5e-6, BACKWARD: 40e-6, UPDATE: 300e-6}
    assert split.seconds == pytest.approx(spent, rel=1e-9)
    assert split.calls == {FORWARD: 1, BACKWARD: 2, UPDATE: 1}
    assert split.own == pytest.approx(65e-3, rel=1e-9)
    assert split.total == pytest.approx(65e-3 + sum(spent.values()), rel=1e-9)


def test_memory_counts_what_is_there(rng):
    """A step that keeps 2 buffers of the shared size and makes 3 more on the way."""
    (network, x, y), _ = problem(mlp, 2, rng)
    shared = sum(p.numel() for p in network.trunk.parameters())
    kept = []

    def make() -> Entrant:
        entrant = Entrant(FOREACH, network, x, y)
        params = list(entrant.network.parameters())

        def step(closure):
            grads = torch.autograd.grad(sum(closure()), params)
            if not kept:
                kept.append(torch.empty(2, shared))
            torch.empty(3, shared)
            for p in params:  # a new tensor in the place of the old one is no more memory
                p.data = p.data.clone()
            entrant.base.step()
            del grads

        entrant.__dict__["step"] = step
        return entrant

    model = 4 * sum(p.numel() for p in network.parameters())
    for found in memory.footprints(make, steps=2):
        assert found.buffers == 5
        assert found.own == 5 * 4 * shared
        assert found.kept == 2 * 4 * shared
        assert found.gradients == model


@pytest.mark.parametrize("rho", [None, 0.05])
def test_buffers_of_flatmtl(rho):
    """2T + 2 buffers of the shared size with sharpness, T + 1 without; next to nothing beside them."""
    tasks = 3
    network, x, y = resnet18(batch=1)
    x = x[..., :8, :8].repeat(2, 1, 1, 1)
    y = y.repeat(1, 2)
    limit = tasks + 1 if rho is None else 2 * tasks + 2
    for found in memory.footprints(lambda: Entrant(OURS, network, x, y, rho=rho), steps=3):
        assert found.buffers == limit
        assert memory.in_models(found.own, network) <= limit + 0.01
