"""Which steps AffinityProbe measures, and into which epoch they go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from affinity_runs import close, optimizer, run, step
from oracle_affinity import Quadratics, Samples

from flatmtl import AffinityProbe, MultiTaskOptimizer

BOTH = ["plain", "pcgrad"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
def test_every_nth_step_from_the_first(kind, every, rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.05)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=every)
    seen = run(problem, probe, opt, lambda: problem.exact(lr), steps=11)
    assert (probe.steps, probe.measured) == (11, -(-11 // every))
    record = probe.record()
    close(record.matrix(), Samples(seen[::every]).mean, 1e-11)
    assert record.metadata["every"] == every
    assert record.steps.sum() == probe.measured


@pytest.mark.parametrize("kind", BOTH)
def test_epochs_and_a_schedule(kind, rng):
    """Each epoch has its means; each step its learning rate, by which it is divided."""
    problem = Quadratics(rng)
    start = problem.safe_lr(0.1)
    opt = optimizer(kind, problem.parameters(), start)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    probe = AffinityProbe(opt, every=2)
    lengths, rates, epochs = [4, 1, 3, 2, 1], [], []
    for epoch, length in enumerate(lengths):
        seen = []
        for _ in range(length):
            lr = opt.param_groups[0]["lr"]
            if probe.steps % 2 == 0:
                seen.append((problem.exact(lr), problem.exact(lr) / lr))
                rates.append(lr)
            step(probe, opt, problem.losses)
            schedule.step()
        epochs.append(seen)
        if epoch + 1 < len(lengths):
            probe.end_epoch()
    record = probe.record()
    assert record.steps.tolist() == [len(seen) for seen in epochs] == [2, 1, 1, 1, 1]
    off = 1e-11 / start
    for e, seen in enumerate(epochs):
        close(record.by_epoch("affinity")[e], Samples([a for a, _ in seen]).mean, off)
        close(record.by_epoch("affinity_per_lr")[e], Samples([b for _, b in seen]).mean, off)
        so_far = [a for part in epochs[: e + 1] for a, _ in part]
        close(record.running("affinity")[e], Samples(so_far).mean, off)
        close(record.matrix(epochs=e), Samples([a for a, _ in seen]).mean, off)
    tail = Samples([b for part in epochs[1:3] for _, b in part])
    close(record.matrix("affinity_per_lr", epochs=slice(1, 3)), tail.mean, off)
    np.testing.assert_allclose(record.metadata["lr"], [rates[0], rates[-1]], rtol=1e-12)


def test_an_epoch_without_a_measured_step(rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.1)
    opt = optimizer("plain", problem.parameters(), lr)
    probe = AffinityProbe(opt, every=4)
    for length in (1, 2, 2):  # steps 0 | 1 2 | 3 4
        run(problem, probe, opt, lambda: None, steps=length)
        probe.end_epoch()
    record = probe.record()
    assert record.steps.tolist() == [1, 0, 1]
    assert np.isnan(record.by_epoch("affinity")[1]).all()
    assert np.isfinite(record.matrix()).all()


def test_state_goes_through_a_checkpoint(rng):
    """Saved in the middle of an epoch and loaded by a fresh probe: the record is that of one run."""
    import io

    problem = Quadratics(rng)
    lr = problem.safe_lr(0.05)
    for kind in BOTH:
        opt = optimizer(kind, problem.parameters(), lr)
        probe = AffinityProbe(opt, every=2, groups=[(0, 1)])
        seen = run(problem, probe, opt, lambda: problem.exact(lr), steps=3)
        probe.end_epoch()
        seen += run(problem, probe, opt, lambda: problem.exact(lr), steps=2)
        file = io.BytesIO()
        torch.save(probe.state_dict(), file)
        file.seek(0)
        if isinstance(opt, MultiTaskOptimizer):
            probe.detach()
        probe = AffinityProbe(opt, every=2, groups=[(0, 1)])
        probe.load_state_dict(torch.load(file, weights_only=True))
        assert (probe.steps, probe.measured) == (5, 3)
        seen += run(problem, probe, opt, lambda: problem.exact(lr), steps=3)
        record = probe.record()
        assert record.steps.tolist() == [2, 2]
        close(record.matrix(), Samples(seen[::2]).mean, 1e-11)
        close(record.by_epoch("affinity")[1], Samples([seen[4], seen[6]]).mean, 1e-11)
        if isinstance(opt, MultiTaskOptimizer):
            probe.detach()
