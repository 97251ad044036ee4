"""A step on another device than the host's, which the meta device stands for: nothing crosses over.

A CUDA step may neither read numbers nor bring some: both wait for the device, and neither can be in a
CUDA graph. On meta tensors there are no numbers to read, and an operator that takes tensors of two
devices is seen. What is on the host's side of a step by ``device.type`` is left out here, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from methods import make
from step_options import KINDS, SHARP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatmtl import MAML, SAM, MultiTaskOptimizer
from flatmtl.ops import _check
from flatmtl.weighting import PCGrad, methods

TASKS = 3
ALL = tuple(range(TASKS))
OPTIONS = {
    **SHARP,
    "every": {"sharpness": SAM(0.05, every=2)},
    "weights_every": {"sharpness": SAM(0.05), "weights_every": 2},
    "mask": {"nonfinite": "mask"},
    "by layer": {"sharpness": SAM(0.05), "weights_per": "layer"},
    "maml": {"sharpness": MAML(lr=0.05)},
}


class OneDevice(TorchDispatchMode):
    """Raises at an operator with tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        found = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if len(found) > 1:
            raise AssertionError(f"from device to device: {func}")
        return result


@contextmanager
def one_device() -> Iterator[None]:
    """Inside, no operator takes tensors of two devices, and none is made from Python's numbers."""

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("from the host to the device: a tensor made from numbers")

    with pytest.MonkeyPatch.context() as patch, OneDevice():
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, refuse)
        patch.setattr(Tensor, "new_tensor", refuse)
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5)
        )
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(TASKS))

    def losses(self, x: Tensor, tasks=ALL, missing: int | None = None) -> list[Tensor | None]:
        z = self.trunk(x)
        found = [0.3 + (self.heads[t](z) - t).square().mean() for t in tasks]
        return [None if t == missing else loss for t, loss in zip(tasks, found)]


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    # flags go to pinned memory on CUDA alone; and no meta tensor has an address
    monkeypatch.setattr("flatmtl.watch.Watch.post", lambda *_: None)
    monkeypatch.setattr(_check, "no_overlap", lambda *_: None)


def check(weighting, *, missing: int | None = None, parts: int = 1, **options) -> None:
    """Steps after the first few keep to the device."""
    net, x = Net().to("meta"), torch.empty(16, 6, device="meta")
    for param in weighting.parameters():  # torch cannot move one to meta in place
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().to("meta")))
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    opt = MultiTaskOptimizer(base, weighting=weighting, model=net, **options)
    closures = [
        lambda tasks=ALL, part=part: net.losses(part, tasks, missing) for part in x.chunk(parts)
    ]
    given = closures if parts > 1 else closures[0]
    for _ in range(2):  # states and masks are made
        opt.step(given)
    with one_device():
        for _ in range(2):
            opt.step(given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [m.name for m in methods()])
def test_every_method(name, kind):
    check(make(name, TASKS), **KINDS[kind])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_step(name):
    check(PCGrad(), **OPTIONS[name])


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_a_missing_task(kind):
    check(PCGrad(), parts=2, missing=1, **KINDS[kind])


def test_a_crossing_is_seen():
    there = torch.empty((), device="meta")
    with pytest.raises(AssertionError, match="from device to device"), one_device():
        torch.ones(3).to("meta")
    with pytest.raises(AssertionError, match="from the host"), one_device():
        torch.tensor([1.0], device="meta")
    for read in (float, bool, Tensor.tolist, Tensor.cpu, Tensor.nonzero):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), one_device():
            read(there)
