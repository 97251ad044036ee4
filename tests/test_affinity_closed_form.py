"""AffinityProbe on quadratics: what it measures is what the formulas say, row = recipient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from affinity_runs import KINDS, close, optimizer, run, step
from oracle_affinity import (
    Quadratics,
    Samples,
    as_given,
    flat,
    momentum_buffer,
    real_steps,
    sgd_steps,
)  # fmt: skip

from flatmtl import AffinityProbe, MultiTaskOptimizer

SHAPES = [((5,),), ((3,), (2, 2)), ((1, 3), (), (2, 1, 2), (4,))]


def see(problem: Quadratics, lr: float):
    """Everything of a plain SGD look-ahead, and what rounding may do to it."""
    steps = lr * problem.grads()
    return problem.exact(lr), problem.first_order(lr), problem.cosine(), problem.rounding(steps)


def check_all(record, seen, lr: float, count: int) -> None:
    z, first, cos = (Samples([s[k] for s in seen]) for k in range(3))
    off = np.max([s[3] for s in seen], axis=0)
    scale = np.max([np.abs(s[1]) / np.maximum(np.abs(s[2]), 1e-300) for s in seen], axis=0)
    close(record.matrix(), z.mean, off)
    close(record.matrix("affinity_per_lr"), z.mean / lr, off / lr)
    close(record.matrix("first_order"), first.mean, 1e-12 * scale)
    close(record.matrix("cosine"), cos.mean, 1e-12)
    for quantity in ("affinity", "affinity_per_lr", "first_order", "cosine"):
        assert (record.counts(quantity) == count).all()
    close(record.standard_error(), z.standard_error, 3 * off, rtol=1e-6)
    close(record.standard_error("first_order"), first.standard_error, 1e-11 * scale, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [2, 4])
def test_exact_equals_the_closed_form(kind, tasks, rng):
    problem = Quadratics(rng, tasks, SHAPES[rng.integers(3)], head=int(rng.integers(0, 3)))
    lr = problem.safe_lr(0.1)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    seen = run(problem, probe, opt, lambda: see(problem, lr), steps=4)
    assert (probe.steps, probe.measured) == (4, 4)
    check_all(probe.record(), seen, lr, 4)


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
@pytest.mark.parametrize("tasks", [1, 2, 5, 12])
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda s: f"{len(s)}tensors")
def test_any_number_of_tasks_and_tensors(kind, tasks, shapes, rng):
    problem = Quadratics(rng, tasks, shapes, head=0 if tasks == 1 else 2)
    lr = problem.safe_lr(0.2)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    seen = run(problem, probe, opt, lambda: see(problem, lr), steps=2)
    check_all(probe.record(), seen, lr, 2)


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("form", ["tuple", "dict", "stack"])
def test_losses_come_in_any_form(kind, form, rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    seen = run(problem, probe, opt, lambda: see(problem, lr), form=form)
    record = probe.record()
    assert record.tasks == (["t0", "t1", "t2"] if form == "dict" else [0, 1, 2])
    check_all(record, seen, lr, 3)


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
def test_names_and_not_places_tell_tasks_apart(kind, rng):
    problem = Quadratics(rng, 4)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    names, seen, calls = ["d", "a", "c", "b"], [], []

    def closure():
        calls.append(None)
        losses = dict(zip(names, problem.losses()))
        # another order at every call, also of look-aheads, after the first
        return {n: losses[n] for n in (rng.permutation(names) if len(calls) > 1 else names)}

    for _ in range(3):
        seen.append(see(problem, lr))
        step(probe, opt, closure)
    record = probe.record()
    assert record.tasks == names
    check_all(record, seen, lr, 3)


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
@pytest.mark.parametrize("reach", [3, 8])
def test_scales_of_losses_and_gradients(kind, reach, rng):
    """A task of tiny losses beside one of huge ones: only the ratio of the same task counts."""
    problem = Quadratics(rng, 5, scale=10.0 ** rng.uniform(-reach, reach, 5))
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    seen = run(problem, probe, opt, lambda: see(problem, lr), steps=1)
    record = probe.record()
    close(record.matrix(), seen[0][0], seen[0][3])
    close(record.matrix("cosine"), seen[0][2], 1e-11)
    size = np.abs(seen[0][1] / seen[0][2])
    close(record.matrix("first_order"), seen[0][1], 1e-11 * size)


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
def test_float32_to_its_rounding(kind, rng):
    problem = Quadratics(rng, 4, dtype=torch.float32)
    lr = float(np.float32(problem.safe_lr()))
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    seen = run(problem, probe, opt, lambda: see(problem, lr), steps=1)
    close(probe.record().matrix(), seen[0][0], 6e8 * seen[0][3], rtol=1e-5)
    assert probe.record().matrix().dtype == np.float64


def test_orientation_by_hand():
    """s = 1; L_0 = (s - 3)²/2 + 6, L_1 = 2 (s - 2)²: g = -2, -4; a step of 0.1 leads to 1.2 or 1.4."""
    s = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    for kind in ("plain", "mean"):
        opt = optimizer(kind, [s], 0.1)
        probe = AffinityProbe(opt, every=1, groups=[(1, 0)])
        with torch.no_grad():
            s.fill_(1)
        step(probe, opt, lambda: [0.5 * (s - 3).square() + 6, 2 * (s - 2).square()])
        record = probe.record()
        expected = np.array([[0.0475, 0.09], [0.36, 0.64]])  # row: whose loss
        close(record.matrix(), expected)
        # first order: lr g_j g_i / L_j, L = 8 and 2
        close(record.matrix("first_order"), np.array([[0.4 / 8, 0.8 / 8], [0.8 / 2, 1.6 / 2]]))
        # the sum: s = 1.6, L = 6.98 and 0.32
        close(record.group_matrix(), np.array([[1 - 6.98 / 8], [1 - 0.32 / 2]]))
        assert not np.allclose(record.matrix().T, expected)  # the trap
        probe.detach() if kind == "mean" else None


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "decay": (torch.optim.SGD, {"weight_decay": 0.3}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "dampened": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.2}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.2}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_real_optimizers_step(kind, name, rng):
    """Heads stay, and the state is that of before the step, at the first step and later."""
    problem = Quadratics(rng)
    base, options = OPTIMIZERS[name]
    lr = problem.safe_lr(0.02)
    opt = optimizer(kind, problem.parameters(), lr, base, **options)
    probe = AffinityProbe(opt, every=1, look_ahead="optimizer", groups=[(0, 2)])
    inner = opt.base_optimizer if isinstance(opt, MultiTaskOptimizer) else opt

    def look():
        g = problem.grads()
        g = np.concatenate([g, [g[0] + g[2], 0 * g[0]]])
        steps = real_steps(inner, problem.shared, g)
        if base is torch.optim.SGD:  # written out, it is the same
            buf = momentum_buffer(inner, problem.shared)
            written = sgd_steps(g, flat(problem.shared), buf, lr=lr, **options)
            np.testing.assert_allclose(steps, written, rtol=1e-9, atol=1e-13)
        return problem.affinity(steps), problem.rounding(steps)

    seen = run(problem, probe, opt, look, steps=4)
    z, off = Samples([z for z, _ in seen]), np.max([off for _, off in seen], axis=0)
    record = probe.record()
    close(record.matrix(), z.mean[:, :3], 2 * off[:, :3])
    close(record.group_matrix(), z.mean[:, 3:4], 2 * off[:, 3:4])
    close(record.matrix("affinity_per_lr"), z.mean[:, :3] / lr, 2 * off[:, :3] / lr)
    if name == "momentum":  # beyond what a step without any gradient would have done
        beyond = Samples([z[:, :3] - z[:, 4:] for z, _ in seen])
        close(record.matrix("beyond_momentum"), beyond.mean, 4 * off[:, :3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("etap", [False, True])
def test_first_order_mode(kind, momentum, etap, rng):
    problem = Quadratics(rng, 4)
    lr = problem.safe_lr(0.05)
    opt = optimizer(kind, problem.parameters(), lr, momentum=momentum)
    probe = AffinityProbe(opt, mode="first_order", every=1, momentum=etap)

    def look():
        buf = momentum_buffer(opt, problem.shared) if etap else None
        plain = problem.first_order(lr)
        return problem.first_order(lr, momentum, buf), plain, problem.cosine()

    seen = run(problem, probe, opt, look, steps=4)
    record = probe.record()
    found, plain, cos = (Samples([s[k] for s in seen]) for k in range(3))
    scale = 1e-11 * np.max([np.abs(s[1] / s[2]) for s in seen])
    close(record.matrix(), found.mean, scale)
    close(record.matrix("affinity_per_lr"), found.mean / lr, scale / lr)
    close(record.standard_error(), found.standard_error, scale, rtol=1e-6)
    close(record.matrix("cosine"), cos.mean, 1e-12)
    if etap:
        close(record.matrix("beyond_momentum"), plain.mean, 2 * scale)
    assert (record.counts() == 4).all()


def test_first_order_approaches_exact_with_order_one(rng):
    """On a network: the relative difference is proportional to the learning rate."""
    torch.manual_seed(int(rng.integers(2**31)))
    trunk = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh()).double()
    heads = [torch.nn.Linear(8, 1).double() for _ in range(3)]
    x, y = torch.randn(16, 5).double(), torch.randn(16, 3).double()
    params = [p for m in (trunk, *heads) for p in m.parameters()]

    def closure():
        h = trunk(x)
        return [(head(h)[:, 0] - y[:, k]).square().mean() for k, head in enumerate(heads)]

    # the largest curvature that a loss shows along any of the gradients sets the scale
    rates, gaps = 2.0 ** -np.arange(6, 13), []
    for lr in rates:
        opt = torch.optim.SGD(params, lr=float(lr))
        found = {}
        for mode in ("exact", "first_order"):
            probe = AffinityProbe(opt, mode=mode, every=1)
            probe(closure)
            found[mode] = probe.record()
        first = found["first_order"].matrix()
        close(found["exact"].matrix("first_order"), first, 1e-13)
        gap = np.linalg.norm(found["exact"].matrix() - first) / np.linalg.norm(first)
        gaps.append(gap)
    slope = np.polyfit(np.log(rates), np.log(gaps), 1)[0]
    assert 0.9 < slope < 1.1, gaps
    assert gaps[-1] < 0.02


def test_given_learning_rate_and_one_of_the_heads_group(rng):
    """lr= wins; and the heads' own rate says nothing."""
    problem = Quadratics(rng)
    rate = problem.safe_lr()
    for lr in (None, rate / 7):
        groups = [
            {"params": problem.shared, "lr": rate},
            {"params": problem.heads, "lr": 2.5 * rate},
        ]
        opt = torch.optim.SGD(groups, lr=1.0)
        probe = AffinityProbe(opt, every=1, lr=lr)
        used = lr or rate
        z, _, _, off = see(problem, used)
        probe(lambda: as_given("list", problem.losses()))
        record = probe.record()
        close(record.matrix(), z, off)
        close(record.matrix("affinity_per_lr"), z / used, off / used)
        assert {record.metadata["lr"][0], record.metadata["lr"][-1]} == {used}
