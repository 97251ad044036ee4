"""The methods that are no plain Gram weightings, each in whole trainings: resume, copies, skipped and
dropped steps, loss scaling, sharpness, probes. What each computes is tested elsewhere."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from methods import BOTH, LOSS, ROWS, make
from torch import Tensor, nn

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer

NEW = [*LOSS, *BOTH, *ROWS, "rlw"]
every_method = pytest.mark.parametrize("name", NEW)
TASKS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()
        )
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(TASKS)])
        self.double()

    def losses(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [0.3 + head(h).sub(k).square().mean() for k, head in enumerate(self.heads)]


def batches(rng, count: int) -> list[Tensor]:
    return [torch.from_numpy(rng.standard_normal((8, 5))) for _ in range(count)]


def fresh(name: str, **options) -> tuple[Net, MultiTaskOptimizer]:
    net = Net()
    base = torch.optim.Adam(net.parameters(), lr=0.02)
    return net, MultiTaskOptimizer(base, weighting=make(name, TASKS), model=net, **options)


def run(net: Net, opt: MultiTaskOptimizer, xs: list[Tensor]) -> None:
    for x in xs:
        opt.step(lambda x=x: net.losses(x))


def everything(net: Net, opt: MultiTaskOptimizer) -> list[Tensor]:
    """All that a training consists of, to the bit."""
    found = [*net.state_dict().values()]

    def gather(value) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                gather(part)
        elif isinstance(value, list):
            for part in value:
                gather(part)
        elif isinstance(value, float):
            found.append(torch.tensor(value, dtype=torch.float64))

    gather(opt.state_dict())
    return [t.detach().clone() for t in found]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


@every_method
@pytest.mark.parametrize("sharpness", [None, SAM(0.05), SAM(0.05, aggregate="direct", every=1)])
def test_resume(name, sharpness, rng):
    xs = batches(rng, 6)
    net, opt = fresh(name, sharpness=sharpness)
    run(net, opt, xs)
    assert all(p.isfinite().all() for p in net.parameters())
    first, opt_a = fresh(name, sharpness=sharpness)
    run(first, opt_a, xs[:3])
    memory = io.BytesIO()
    torch.save({"net": first.state_dict(), "opt": opt_a.state_dict()}, memory)
    memory.seek(0)
    saved = torch.load(memory)
    second, opt_b = fresh(name, sharpness=sharpness)
    second.load_state_dict(saved["net"])
    opt_b.load_state_dict(saved["opt"])
    run(second, opt_b, xs[3:])
    assert_same(everything(net, opt), everything(second, opt_b))


@every_method
def test_a_copy_goes_on_as_the_original_does(name, rng):
    xs = batches(rng, 4)
    net, opt = fresh(name)
    run(net, opt, xs[:2])
    other, opt_b = copy.deepcopy((net, opt))
    run(net, opt, xs[2:])
    run(other, opt_b, xs[2:])
    assert_same(everything(net, opt), everything(other, opt_b))


@every_method
def test_a_step_that_is_dropped_or_fails_leaves_the_state(name, rng):
    xs = batches(rng, 3)
    runs = []
    for disturbed in (False, True):
        net, opt = fresh(name)
        run(net, opt, xs[:1])
        if disturbed:
            buffers = copy.deepcopy(dict(net.named_buffers()))
            opt.backward(lambda net=net: net.losses(xs[2]))
            opt.zero_grad()

            def fails(net=net):
                net.losses(xs[2])
                raise KeyError("data")

            with pytest.raises(KeyError):
                opt.step(fails)
            with torch.no_grad():
                for key, value in net.named_buffers():
                    value.copy_(buffers[key])
        run(net, opt, xs[1:])
        runs.append(everything(net, opt))
    assert_same(*runs)


@every_method
def test_a_skipped_step_leaves_everything(name, rng):
    xs = batches(rng, 2)
    net, opt = fresh(name, nonfinite="skip")
    run(net, opt, xs)
    before = everything(net, opt)
    opt.step(lambda: [net.losses(xs[0])[0] * math.nan, *net.losses(xs[0])[1:]])
    assert_same(before, everything(net, opt))


@every_method
def test_a_missing_task(name, rng):
    xs = batches(rng, 4)
    net, opt = fresh(name)
    run(net, opt, xs[:2])
    kept = [p.detach().clone() for p in net.heads[1].parameters()]

    def without():
        a, _, c = net.losses(xs[2])
        return [a, None, c]

    opt.step(without)
    assert all(map(torch.equal, kept, net.heads[1].parameters()))
    run(net, opt, xs[3:])
    assert all(p.isfinite().all() for p in net.parameters())


@every_method
def test_loss_scaling_changes_rounding_only(name, rng):
    if name == "rlw":
        pytest.skip("draws do not depend on what is scaled")
    xs = batches(rng, 3)
    grads = []
    for scaled in (False, True):
        net, opt = fresh(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1, enabled=scaled)
        for x in xs:
            opt.backward(lambda net=net, x=x: net.losses(x), scaler=scaler)
            if scaled:
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
        grads.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)


@every_method
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)])
def test_a_probe_changes_nothing(name, sharpness, rng):
    xs = batches(rng, 4)
    runs = []
    for probed in (False, True):
        net, opt = fresh(name, sharpness=sharpness)
        if probed:
            probe = AffinityProbe(opt, every=2)
        run(net, opt, xs)
        runs.append(everything(net, opt))
    assert_same(*runs)
    assert probe.record().counts().max() == 2


@every_method
def test_micro_batches_and_history(name, rng):
    xs = batches(rng, 2)
    net, opt = fresh(name, history=4)
    opt.step([lambda x=x: net.losses(x) for x in xs])
    opt.step(lambda: net.losses(xs[0]))
    seen = opt.history.arrays()
    assert seen["losses"].shape == (2, TASKS)
    assert all(p.isfinite().all() for p in net.parameters())
