"""What AffinityProbe costs, counted: forward and backward passes, reads on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from affinity_runs import SAMS, optimizer, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatmtl import AffinityProbe, MultiTaskOptimizer


class Counter(torch.autograd.Function):
    """Identity that counts the passes through it."""

    @staticmethod
    def forward(ctx, x, passes):
        ctx.passes = passes
        passes["forward"] += 1
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.passes["backward"] += 1
        return grad, None


class Net(nn.Module):
    """A trunk whose passes are counted."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.trunk, self.heads = (
            nn.Linear(3, 4),
            nn.ModuleList([nn.Linear(4, 1) for _ in range(tasks)]),
        )
        self.passes = {"forward": 0, "backward": 0}
        self.x, self.y = torch.randn(6, 3), torch.randn(6, tasks)

    def losses(self, missing: tuple[int, ...] = ()) -> list[Tensor | None]:
        h = Counter.apply(torch.tanh(self.trunk(self.x)), self.passes)
        return [None if k in missing else (head(h)[:, 0] - self.y[:, k]).square().mean()
                for k, head in enumerate(self.heads)]  # fmt: skip

    def counted(self) -> tuple[int, int]:
        """Passes since the last call."""
        found = self.passes["forward"], self.passes["backward"]
        self.passes.update(forward=0, backward=0)
        return found


def passes_of(
    kind: str, net: Net, probing: bool, missing: tuple[int, ...] = (), **how: Any
) -> list[tuple[int, int]]:
    opt = optimizer(kind, list(net.parameters()), 0.01)
    probe: Any = AffinityProbe(opt, every=2, **how) if probing else lambda closure: closure()
    found = []
    for k in range(4):
        net.counted()
        # all tasks at the first step, so that everything has its role
        step(probe, opt, lambda: net.losses(missing if k else ()))
        found.append(net.counted())
    return found


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("kind", ["plain", "mean", "pcgrad", *SAMS])
def test_passes_of_exact_mode(kind, tasks, rng):
    """T forwards more at a measured step (and, in a plain loop, T backwards); nothing at the others."""
    net = Net(tasks)
    usual = passes_of(kind, net, False)
    found = passes_of(kind, net, True)
    backwards = tasks if kind == "plain" else 0
    for k, ((f0, b0), (f1, b1)) in enumerate(zip(usual, found)):
        more = (tasks, backwards) if k % 2 == 0 else (0, 0)
        assert (f1 - f0, b1 - b0) == more, k


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("look_ahead", ["sgd", "optimizer"])
def test_passes_of_groups_and_missing_tasks(kind, look_ahead, rng):
    """(With momentum there is one more, the step without any gradient; SGD here has none.)"""
    net = Net(5)
    groups = [(0, 1), (2, 3, 4), (3, 4)]
    found = passes_of(kind, net, True, (1,), look_ahead=look_ahead, groups=groups)
    usual = passes_of(kind, net, False, (1,))
    assert found[0][0] - usual[0][0] == 5 + 3
    assert found[2][0] - usual[2][0] == 4 + 2  # no look-ahead for who is not there
    assert found[2][1] - usual[2][1] == (4 if kind == "plain" else 0)
    assert found[1] == usual[1]
    assert found[3] == usual[3]


@pytest.mark.parametrize("kind", ["plain", "mean", "pcgrad", *SAMS])
@pytest.mark.parametrize("momentum", [False, True])
def test_passes_of_first_order_mode(kind, momentum, rng):
    """No forward more; no backward more either where a step takes every task's gradient anyway."""
    net = Net(3)
    usual = passes_of(kind, net, False)
    found = passes_of(kind, net, True, mode="first_order", momentum=momentum)
    for k, ((f0, b0), (f1, b1)) in enumerate(zip(usual, found)):
        assert (f1, b1 - b0) == (f0, 3 if kind == "plain" and k % 2 == 0 else 0)


class Reads(TorchDispatchMode):
    """Counts values that go from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(
            part in name
            for part in ("_local_scalar_dense", "aten::item", "is_nonzero", "aten::equal")
        ):
            self.count += 1
        # sizes that depend on values: a device must be waited for
        if any(part in name for part in ("aten::nonzero", "masked_select", "unique")):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """A mode that counts reads, those that pass by the dispatcher too."""
    mode = Reads()
    for name in ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def wrapped(self, *args, _original=original, **kwargs):
            mode.count += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, wrapped)
    return mode


HOW: dict[str, dict[str, Any]] = {
    "exact": {"groups": [(0, 1)]},
    "optimizer": {"look_ahead": "optimizer"},
    "first_order": {"mode": "first_order"},
    "etap": {"mode": "first_order", "momentum": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
def test_nothing_is_read_on_the_host(how, kind, reads, rng):
    """As many reads with a probe as without one, at measured steps and at others, with a task missing too.

    (torch's SGD makes none; and MultiTaskOptimizer none with nonfinite="mask".)
    """
    counts = []
    for probing in (False, True):
        net = Net(3)
        opt = optimizer(
            kind, list(net.parameters()), 0.01, momentum=0.9, wrap={"nonfinite": "mask"}
        )
        probe: Any = (
            AffinityProbe(opt, every=2, **HOW[how]) if probing else lambda closure: closure()
        )
        found = []
        for k in range(6):
            before = reads.count
            with reads:
                step(probe, opt, lambda: net.losses((1,) if k >= 4 else ()))
            found.append(reads.count - before)
        if probing:
            probe.end_epoch()
            before = reads.count
            assert np.isfinite(probe.record().matrix()).all()
            assert reads.count > before  # that is where it is read: the counter counts
        counts.append(found)
    assert counts[1] == counts[0]
    if kind != "sam-decomposed":  # which watches for a radius that is too large
        assert counts[0] == [0] * 6


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
def test_an_unmeasured_step_keeps_nothing(kind, rng):
    """No copies of parameters or gradients are held through the steps in between."""
    net = Net(3)
    opt = optimizer(kind, list(net.parameters()), 0.01)
    probe = AffinityProbe(opt, every=5)
    if isinstance(opt, MultiTaskOptimizer):
        returned = [opt.step(net.losses) for _ in range(2)]
        assert all(not loss.requires_grad for losses in returned for loss in losses)
        return
    for k in range(3):
        made: list[Any] = []

        def closure():
            made.append(net.losses())
            return made[-1]

        losses = probe(closure)
        assert all(loss.requires_grad for loss in losses)
        assert all(a is b for a, b in zip(losses, made[0]))  # the user's own, at measured steps too
        assert len(made) == (4 if k == 0 else 1)
        assert not any(loss.requires_grad for later in made[1:] for loss in later)
