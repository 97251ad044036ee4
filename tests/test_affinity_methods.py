"""AffinityProbe beside every weighting and kind of step: it measures, and changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from affinity_nets import differences, frozen
from affinity_runs import close
from methods import ALL, make
from oracle_affinity import Quadratics

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import PCGrad

STEPS = {
    "plain": {},
    "batched": {"jacobian": "batched"},
    "sam": {"sharpness": SAM(0.05)},
    "sam in turns": {"sharpness": SAM(0.05, every=2, warmup=3)},
    "asam": {"sharpness": SAM(0.5, adaptive=True, joint_norm=True)},
    "direct": {"sharpness": SAM(0.05, aggregate="direct")},
    "second": {"sharpness": SAM(0.05, aggregate="second")},
    "each": {"sharpness": SAM(0.05, aggregate="each")},
    "in between": {"weights_every": 2},
    "history": {"history": 2, "nonfinite": "mask"},
}


def compare(start: Quadratics, weighting, options: dict, rng, tasks: int) -> None:
    """Two probes on four steps; every other run is without one."""
    lr = start.safe_lr(0.02)
    pictures, seen = [], []
    seed = int(rng.integers(2**31))
    for probing in (False, True):
        problem = copy.deepcopy(start)
        torch.manual_seed(seed)
        base = torch.optim.SGD(problem.parameters(), lr=lr, momentum=0.5)
        opt = MultiTaskOptimizer(base, weighting=copy.deepcopy(weighting), **options)
        probes = []
        if probing:
            probes = [AffinityProbe(opt, every=1), AffinityProbe(opt, mode="first_order", every=2)]
        for _ in range(4):
            if probing:
                seen.append((problem.exact(lr), problem.first_order(lr)))
            opt.step(problem.losses)
        state = opt.state_dict()
        pictures.append(frozen([problem.parameters(), [p.grad for p in problem.parameters()],
                                state, torch.get_rng_state()]))  # fmt: skip
    assert not differences({"": pictures[0]}, {"": pictures[1]})
    solving = [s for k, s in enumerate(seen) if k % options.get("weights_every", 1) == 0]
    every = 2 // options.get("weights_every", 1)
    size = max(np.abs(f).max() for _, f in seen)
    close(probes[0].record().matrix(), np.mean([z for z, _ in solving], axis=0), 1e-10 * (1 + size))
    first = np.mean([f for _, f in solving[::every]], axis=0)
    close(probes[1].record().matrix(), first, 1e-10 * size)
    cos = probes[1].record().matrix("cosine")
    close(cos, probes[1].record().matrix("cosine").T, 1e-12)
    close(np.diag(cos), np.ones(tasks), 1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["plain", "sam", "each"])
def test_every_weighting(name, how, rng):
    if name in ("constant", "rlw") and how == "each":
        how = "direct"  # weights of four tasks, not of a pair; one that looks at no Gram matrix
    compare(Quadratics(rng, 4), make(name, 4), STEPS[how], rng, 4)


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_every_kind_of_step(how, tasks, rng):
    # one task shares all of its parameters
    problem = Quadratics(rng, tasks, head=2 if tasks > 1 else 0)
    compare(problem, PCGrad(), STEPS[how], rng, tasks)


def test_backward_without_a_step_is_not_counted(rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr()
    base = torch.optim.SGD(problem.parameters(), lr=lr)
    opt = MultiTaskOptimizer(base, weighting=PCGrad())
    probe = AffinityProbe(opt, every=1)
    opt.backward(problem.losses)
    opt.zero_grad()
    assert (probe.steps, probe.measured) == (0, 0)
    with torch.no_grad():
        problem.shared[0].add_(1)
    z = problem.exact(lr)
    opt.backward(problem.losses)
    opt.step()
    assert (probe.steps, probe.measured) == (1, 1)
    close(probe.record().matrix(), z, 1e-11)


def test_a_copied_optimizer_goes_its_own_way(rng):
    problem = Quadratics(rng)
    base = torch.optim.SGD(problem.parameters(), lr=problem.safe_lr())
    opt = MultiTaskOptimizer(base, weighting=PCGrad())
    probe = AffinityProbe(opt, every=1)
    opt.step(problem.losses)
    other, twin = copy.deepcopy((problem, opt))
    twin.step(other.losses)
    assert (probe.steps, probe.measured) == (1, 1)
    opt.step(problem.losses)
    assert probe.measured == 2


@pytest.mark.parametrize("kind", ["plain", "multi"])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_tasks_that_share_nothing_at_all(kind, mode, rng):
    heads = [torch.nn.Parameter(torch.randn(2)) for _ in range(2)]
    base = torch.optim.SGD(heads, lr=0.1)
    opt = MultiTaskOptimizer(base, weighting=PCGrad()) if kind == "multi" else base
    probe = AffinityProbe(opt, mode=mode, every=1)
    before = [h.detach().clone() for h in heads]

    def closure():
        return [head.square().sum() for head in heads]

    with pytest.raises(ValueError, match="shared"):
        opt.step(closure) if kind == "multi" else probe(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, heads))
