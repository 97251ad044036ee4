"""AffinityProbe over batches that are not alike: missing tasks, useless losses, epochs, micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from affinity_runs import KINDS, close, optimizer, run, step
from oracle_affinity import Quadratics, Samples, as_given, total, without

from flatmtl import AffinityProbe

BOTH = ["plain", "pcgrad"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["list", "dict"])
def test_a_missing_task_has_neither_row_nor_column(kind, form, rng):
    problem = Quadratics(rng, 4)
    lr = problem.safe_lr(0.05)
    gone = [(), (1,), (0, 3), (2,), (1, 2)]
    opt = optimizer(kind, problem.parameters(), lr)
    names = [0, 1, 2, 3] if form == "list" else ["t0", "t1", "t2", "t3"]
    probe = AffinityProbe(opt, every=1, groups=[names[:2], names[2:]])
    looks = [lambda: problem.exact(lr), lambda: problem.first_order(lr), problem.cosine,
             lambda: problem.of_groups(lr, [(0, 1), (2, 3)]),
             lambda: problem.rounding(lr * problem.grads())]  # fmt: skip
    seen = run(problem, probe, opt, lambda: [f() for f in looks], 5, form, lambda k: gone[k])
    off = np.max([s[4] for s in seen], axis=0)
    record = probe.record()
    for quantity, q in (("affinity", 0), ("first_order", 1), ("cosine", 2)):
        expected = Samples([without(s[q], g, g) for s, g in zip(seen, gone)])
        close(record.matrix(quantity), expected.mean, 2 * off)
        np.testing.assert_array_equal(record.counts(quantity), expected.count)
        close(record.standard_error(quantity), expected.standard_error, 3 * off, rtol=1e-6)
    # a group that lacks one of its tasks is not the group
    lacks = [[k for k, group in enumerate([(0, 1), (2, 3)]) if set(group) & set(g)] for g in gone]
    groups = Samples([without(s[3], g, c) for s, g, c in zip(seen, gone, lacks)])
    close(record.group_matrix(), groups.mean, 2 * off.max())
    np.testing.assert_array_equal(record.group_count.sum(axis=0), groups.count)
    assert record.steps.tolist() == [5]


def test_a_task_that_comes_late(rng):
    """Missing from the first batches, so that no one knows yet what it shares."""
    problem = Quadratics(rng, 3)
    lr = problem.safe_lr(0.05)
    for kind in BOTH:
        opt = optimizer(kind, problem.parameters(), lr)
        probe = AffinityProbe(opt, every=1)
        gone = [(2,), (2,), ()]
        seen = run(problem, probe, opt, lambda: problem.exact(lr), 3, missing=lambda k: gone[k])
        expected = Samples([without(z, g, g) for z, g in zip(seen, gone)])
        close(probe.record().matrix(), expected.mean, 1e-11)
        np.testing.assert_array_equal(probe.record().counts(), expected.count)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_batches_of_one_task_each(kind, mode, rng):
    """Tasks in turns, as with a data set for each: training goes on; pairs of tasks are never measured."""
    problem = Quadratics(rng, 2)
    opt = optimizer(kind, problem.parameters(), problem.safe_lr(0.05))
    probe = AffinityProbe(opt, mode=mode, every=1)
    run(problem, probe, opt, lambda: None, 4, missing=lambda k: ((k + 1) % 2,))
    run(problem, probe, opt, lambda: None, 1)
    counts = probe.record().counts()
    assert counts[0, 1] == counts[1, 0] == 1
    assert counts.diagonal().min() >= 2


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", ["exact", "first_order"])
@pytest.mark.parametrize("value", [0.0, -1.0, -1e-3, -INF, INF, NAN])
def test_a_useless_loss_has_no_row(kind, mode, value, rng):
    """Its value says nothing, its gradient does: the column and all other rows are as ever."""
    problem = Quadratics(rng, 4)
    lr = problem.safe_lr()
    bad = int(rng.integers(4))
    opt = optimizer(kind, problem.parameters(), lr, wrap={"nonfinite": "mask"})
    probe = AffinityProbe(opt, mode=mode, every=1)
    useless = [False, True]

    def closure():
        losses = problem.losses()
        if now:  # this value, and the gradient that it had
            with torch.no_grad():
                shift = torch.tensor(value, dtype=torch.float64)
            losses[bad] = losses[bad] - losses[bad].detach() + shift
        return losses

    seen = []
    for now in useless:
        z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
        seen.append(without(z, [bad] if now else []))
        step(probe, opt, closure)
    record = probe.record()
    expected = Samples(seen)
    close(record.matrix(), expected.mean, 1e-11)
    np.testing.assert_array_equal(record.counts(), expected.count)
    assert (record.counts("cosine") == 2).all()
    if mode == "exact":
        np.testing.assert_array_equal(record.counts("first_order"), expected.count)
    if value <= 0:
        assert any(str(bad) in line and "positive" in line for line in record.caveats())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_that_ends_nowhere_after_a_step(kind, value, rng):
    """Finite before, not after a step of one task: that entry alone has no sample."""
    s = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    opt = optimizer(kind, [s], 0.1)
    probe = AffinityProbe(opt, every=1)

    def closure():
        a = 0.5 * (s[0] - 3).square() + 1 + 0 * s[1]  # moves s[0] alone
        b = 0.5 * (s[1] - 3).square() + 1 + 0 * s[0]
        wall = 0.0 if float(s[0].detach()) == 1.0 else value
        return [a, b + wall]

    step(probe, opt, closure)
    record = probe.record()
    # value INF is a loss as long as losses go: an infinite fall of affinity is no sample either
    np.testing.assert_array_equal(record.counts(), [[1, 1], [0, 1]])
    close(
        record.matrix(),
        np.array([[1 - (0.5 * 1.8**2 + 1) / 3, 0], [NAN, 1 - (0.5 * 1.8**2 + 1) / 3]]),
    )


@pytest.mark.parametrize("mode", ["exact", "first_order"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batched"])  # there, 0 * NaN
def test_a_gradient_that_is_not_finite(mode, value, kind, rng):
    """The source has no column; its loss is finite, so that exact look-aheads of others have its row."""
    problem = Quadratics(rng, 4)
    lr = problem.safe_lr()
    bad = int(rng.integers(4))
    opt = optimizer(kind, problem.parameters(), lr, wrap={"nonfinite": "mask"})
    probe = AffinityProbe(opt, mode=mode, every=1, groups=[(0, 1)] if mode == "exact" else ())
    z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)

    def closure():
        losses = problem.losses()
        if losses[bad].requires_grad:
            losses[bad].register_hook(lambda g: g * value)
        return losses

    if kind == "plain":
        total(probe(closure))
    else:
        step(probe, opt, closure)
    record = probe.record()
    expected = without(z, [bad] if mode == "first_order" else [], [bad])
    close(record.matrix(), expected, 1e-11)
    np.testing.assert_array_equal(record.counts(), np.isfinite(expected))
    np.testing.assert_array_equal(record.counts("cosine"), np.isfinite(without(z, [bad], [bad])))
    if mode == "exact" and bad < 2:
        assert not record.group_count.any()
    assert all(p.isfinite().all() for p in problem.parameters())


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "mgda"])
def test_a_zero_gradient_moves_nothing(kind, rng):
    problem = Quadratics(rng, 3)
    lr = problem.safe_lr()
    idle = int(rng.integers(3))
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    z = problem.exact(lr)
    z[:, idle] = 0

    def closure():
        losses = problem.losses()
        losses[idle] = losses[idle].detach() + 0 * losses[idle]
        return losses

    step(probe, opt, closure)
    record = probe.record()
    close(record.matrix(), z, 1e-11)
    assert (record.matrix()[:, idle] == 0).all()
    others = [k for k in range(3) if k != idle]
    assert np.isfinite(record.matrix("cosine")[np.ix_(others, others)]).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_micro_batches_are_one_batch(kind, mode, rng):
    """Losses and gradients are added up: L_j and the step are those of the sum."""
    parts = [Quadratics(rng, 3) for _ in range(3)]
    for other in parts[1:]:
        other.shared, other.heads = parts[0].shared, parts[0].heads
    lr = min(p.safe_lr(0.03) for p in parts)
    opt = optimizer(kind, parts[0].parameters(), lr)
    probe = AffinityProbe(opt, mode=mode, every=1)
    values = sum(p.values() for p in parts)
    g = sum(p.grads() for p in parts)
    z = lr * g @ g.T / values[:, None]
    if mode == "exact":
        z = sum(p.affinity(lr * g) * p.values()[:, None] for p in parts) / values[:, None]
    step(probe, opt, [lambda p=p: as_given("list", p.losses()) for p in parts])
    close(probe.record().matrix(), z, 1e-11)


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-each"])
def test_groups_take_the_step_of_their_sum(kind, rng):
    problem = Quadratics(rng, 5)
    lr = problem.safe_lr(0.05)
    names = ["v", "w", "x", "y", "z"]
    places = [(0, 1), (4, 2, 0), (3,), (0, 1, 2, 3, 4)]
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1, groups=[tuple(names[k] for k in p) for p in places])
    seen = []
    for _ in range(3):
        seen.append((problem.of_groups(lr, places), problem.exact(lr)))
        step(probe, opt, lambda: as_given("dict", problem.losses(), names))
    record = probe.record()
    assert [set(g) for g in record.groups] == [{names[k] for k in p} for p in places]
    found = Samples([g for g, _ in seen])
    close(record.group_matrix(), found.mean, 1e-11)
    close(record.group_standard_error(), found.standard_error, 1e-11, rtol=1e-6)
    assert (record.group_count == 3).all()
    close(record.matrix(), Samples([z for _, z in seen]).mean, 1e-11)
    close(record.group_matrix()[:, 2], record.matrix()[:, 3])  # a group of one


def test_only_these_parameters_move(rng):
    """shared= decides, in place of what tasks reach."""
    problem = Quadratics(rng, 3, ((3,), (2, 2)), head=0)
    lr = problem.safe_lr()
    for kind in BOTH:
        opt = optimizer(
            kind,
            problem.parameters(),
            lr,
            wrap={"shared": problem.shared} if kind != "plain" else None,
        )
        probe = AffinityProbe(opt, every=1, shared=problem.shared[:1] if kind == "plain" else None)
        steps = lr * problem.grads()
        if kind == "plain":
            steps[:, 3:] = 0
            expected = problem.affinity(steps)
            probe(problem.losses)
            close(probe.record().matrix(), expected, 1e-11)
            g = problem.grads()[:, :3]
            close(
                probe.record().matrix("first_order"),
                lr * g @ g.T / problem.values()[:, None],
                1e-11,
            )
        else:
            expected = problem.affinity(steps)
            step(probe, opt, problem.losses)
            close(probe.record().matrix(), expected, 1e-11)
