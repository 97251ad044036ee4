"""AffinityProbe where something else is going on: schedules, several probes, changes of the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from affinity_runs import close, optimizer, run, step
from oracle_affinity import Quadratics, flat, total
from torch import nn

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import FairGrad, PCGrad

BOTH = ["plain", "pcgrad"]


@pytest.mark.parametrize("kind", BOTH)
def test_a_schedule_that_begins_at_zero(kind, rng):
    """A warm-up's first step: nothing moves, and nothing can be divided by its learning rate."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.1)
    opt = optimizer(kind, problem.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: n / 2)
    for mode in ("exact", "first_order"):
        probe = AffinityProbe(opt, mode=mode, every=1)
        opt.param_groups[0]["lr"] = 0.0
        step(probe, opt, problem.losses)
        opt.param_groups[0]["lr"] = lr
        z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
        step(probe, opt, problem.losses)
        record = probe.record()
        close(record.matrix("affinity_per_lr"), z / lr, 1e-10 / lr)
        assert (record.counts("affinity_per_lr") == 1).all()
        assert np.isfinite(record.matrix()).all()
        probe.detach() if kind != "plain" else None
    assert schedule is not None


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_a_learning_rate_in_a_tensor(kind, mode, rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), torch.tensor(lr, dtype=torch.float64))
    probe = AffinityProbe(opt, mode=mode, every=1)
    z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
    step(probe, opt, problem.losses)
    close(probe.record().matrix(), z, 1e-11)
    close(probe.record().matrix("affinity_per_lr"), z / lr, 1e-11 / lr)


def test_several_probes_of_one_optimizer(rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.1)
    for sharpness in (None, SAM(0.05)):
        base = torch.optim.SGD(problem.parameters(), lr=lr)
        opt = MultiTaskOptimizer(base, weighting=PCGrad(), sharpness=sharpness)
        probes = [AffinityProbe(opt, every=2), AffinityProbe(opt, mode="first_order", every=1),
                  AffinityProbe(opt, every=3, lr=lr / 3, groups=[(0, 2)])]  # fmt: skip
        seen = run(
            problem,
            None,
            opt,
            lambda: (problem.exact(lr), problem.first_order(lr), problem.exact(lr / 3)),
            4,
        )
        for k, every in enumerate((2, 1, 3)):
            expected = np.mean([s[k] for s in seen[::every]], axis=0)
            close(probes[k].record().matrix(), expected, 1e-11)
        probes[0].detach()
        opt.step(problem.losses)
        assert [p.steps for p in probes] == [4, 5, 5]


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
def test_a_task_that_shares_nothing(kind, rng):
    """Only its own head: its step moves nothing that is shared, and no other step moves its loss."""
    problem = Quadratics(rng, 3)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    z = problem.exact(lr)
    z[2], z[:, 2] = 0, 0
    step(probe, opt, lambda: [*problem.losses()[:2], problem.heads[2].square().sum() + 1])
    record = probe.record()
    close(record.matrix(), z, 1e-11)
    assert (record.matrix()[2] == 0).all()
    assert (record.matrix()[:, 2] == 0).all()
    assert (record.counts("cosine")[:2, :2] == 1).all()


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_are_freed_and_frozen(kind, rng):
    """Steps are taken on what is trained at that moment."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.05)
    problem.shared[1].requires_grad_(False)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    first = problem.shared[0].numel()
    for k, count in enumerate((first, problem.size, 0)):
        problem.shared[1].requires_grad_(k > 0)
        problem.shared[0].requires_grad_(k < 2)
        moved = lr * problem.grads()
        moved[:, count or problem.size :] = 0
        moved[:, : first if count == 0 else 0] = 0
        before, z = flat(problem.shared), problem.affinity(moved)
        step(probe, opt, problem.losses)
        probe.end_epoch()
        close(probe.record().by_epoch()[k], z, 1e-11)
        frozen = slice(first, None) if k == 0 else slice(0, first if k == 2 else 0)
        assert (flat(problem.shared)[frozen] == before[frozen]).all()


class Replacing(nn.Module):
    """A buffer that every forward pass replaces, and one that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def losses(self, x):
        h = torch.tanh(self.trunk(x))
        self.count = self.count + 1
        self.mean.lerp_(h.detach().mean(0), 0.1)
        h = h * self.count  # a look-ahead counts as the clean pass did? it starts from its result
        return [(h - self.mean).square().mean() + 1, h.abs().mean() + 1]


@pytest.mark.parametrize("kind", BOTH)
def test_buffers_that_are_replaced(kind, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    model, x = Replacing(), torch.randn(5, 3)
    other = copy.deepcopy(model)
    for net, probing in ((model, True), (other, False)):
        opt = optimizer(kind, list(net.parameters()), 0.01, wrap={"model": net})
        probe = (
            AffinityProbe(opt, every=1, **({"model": net} if kind == "plain" else {}))
            if probing
            else None
        )
        for _ in range(3):
            step(probe or (lambda closure: closure()), opt, lambda net=net: net.losses(x))
    assert float(model.count) == 3
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


def test_between_two_solves_it_waits(rng):
    """weights_every: steps without gradients of single tasks are not measured; the next that has them is."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.03)
    for mode in ("exact", "first_order"):
        base = torch.optim.SGD(problem.parameters(), lr=lr)
        opt = MultiTaskOptimizer(base, weighting=FairGrad(), weights_every=3)
        probe = AffinityProbe(opt, mode=mode, every=2)
        look = problem.exact if mode == "exact" else problem.first_order
        seen = run(problem, None, opt, lambda: look(lr), 7)
        assert (probe.steps, probe.measured) == (7, 3)
        close(probe.record().matrix(), np.mean(seen[::3], axis=0), 1e-11)


def test_a_failing_clean_pass_counts_for_nothing(rng):
    problem = Quadratics(rng)
    opt = optimizer("plain", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, every=1)

    def fails():
        raise KeyError("data")

    with pytest.raises(KeyError):
        probe(fails)
    assert (probe.steps, probe.measured) == (0, 0)
    total(probe(problem.losses)).backward()
    assert (probe.record().counts() == 1).all()


STATES = [
    ({}, {"mode": "first_order"}),
    ({}, {"mode": "first_order", "momentum": True}),  # as many quantities
    ({}, {"look_ahead": "optimizer"}),
    ({"groups": [(0, 1)]}, {}),
    ({"groups": [(0, 1)]}, {"groups": [(1, 2)]}),
]


@pytest.mark.parametrize(("saved", "loading"), STATES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_state_of_another_kind_of_probe(saved, loading, swap, rng):
    """Taken up, it would go on under wrong names."""
    first, second = (loading, saved) if swap else (saved, loading)
    problem = Quadratics(rng)
    opt = optimizer("plain", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, every=1, **first)
    probe(problem.losses)
    with pytest.raises(ValueError, match="state"):
        AffinityProbe(opt, every=1, **second).load_state_dict(probe.state_dict())
