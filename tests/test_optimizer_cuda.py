"""Whole steps on a CUDA device: as on the CPU, without a wait, and captured in a graph."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import make
from step_options import KINDS, SHARP
from torch import nn

from flatmtl import SAM, SAMO, MultiTaskOptimizer, Representation
from flatmtl.weighting import MGDA, Mean, NashMTL, PCGrad, methods

pytestmark = pytest.mark.gpu
TASKS = 3
ALL = tuple(range(TASKS))
METHODS = [m.name for m in methods()]
GRAPHED = [m.name for m in methods() if not m.cls.looks_back]  # the others are refused

OPTIONS = {
    **KINDS,
    **SHARP,
}
# what changes from step to step on the host, or draws by a generator that a graph does not know
EAGER = {
    "every": {"sharpness": SAM(0.05, every=2)},
    "weights_every": {"weights_every": 3},
    "weights_every, sam": {"weights_every": 3, "sharpness": SAM(0.05)},
    "samo": {"sharpness": SAMO(0.05)},
    "replay": {"sharpness": SAM(0.05), "replay_rng": True},
    "batched": {"jacobian": "batched"},
    "skip": {"nonfinite": "skip"},
}


class Net(nn.Module):
    """A trunk with BatchNorm (cuDNN's has no batching rule: without it for "batched"), a head a task."""

    def __init__(self, option: str = "") -> None:
        super().__init__()
        norm = nn.Identity() if option == "batched" else nn.BatchNorm1d(16)
        self.trunk = nn.Sequential(nn.Linear(6, 16), norm, nn.Tanh(), nn.Linear(16, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(TASKS))

    def losses(self, x: torch.Tensor, tasks=ALL) -> list[torch.Tensor]:
        z = self.trunk(x)
        # above 0, as some methods of the losses want them
        return [0.1 + (self.heads[t](z) - t).square().mean() for t in tasks]


def optimizer(net: Net, weighting=None, **options) -> MultiTaskOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    options.setdefault("nonfinite", "mask")  # nothing can raise from a graph
    return MultiTaskOptimizer(base, weighting=weighting or PCGrad(), model=net, **options)


def warmed_up(step) -> None:
    """Some steps on a side stream, as torch wants them before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def check_graph(net: Net, opt: MultiTaskOptimizer, rng, *, parts: int = 1) -> None:
    """Replays with new data are the steps of a twin that was not captured.

    ``parts``: micro-batches a step.
    """
    static = torch.from_numpy(rng.standard_normal((32, 6))).float().cuda()

    def step(net: Net, opt: MultiTaskOptimizer, x: torch.Tensor):
        closures = [closure_of(net, part) for part in x.chunk(parts)]
        return opt.step(closures if parts > 1 else closures[0])

    warmed_up(lambda: step(net, opt, static))
    twin_net, twin = copy.deepcopy((net, opt))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step(net, opt, static)
    for _ in range(3):
        new = torch.from_numpy(rng.standard_normal((32, 6))).float().cuda()
        static.copy_(new)
        graph.replay()
        expected = step(twin_net, twin, new)
        for a, b in zip(losses, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert (flat(net) - flat(twin_net)).norm() <= 1e-3 * flat(net).norm()
    assert torch.allclose(net.trunk[1].running_mean, twin_net.trunk[1].running_mean, atol=1e-4)
    assert int(net.trunk[1].num_batches_tracked) == int(twin_net.trunk[1].num_batches_tracked)


def flat(net: Net) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in net.parameters()])


def closure_of(net: Net, x: torch.Tensor):
    def closure(tasks=ALL):
        return net.losses(x, tasks)

    return closure


@pytest.mark.parametrize("name", [*OPTIONS, *(n for n in EAGER if n != "samo")])
@pytest.mark.parametrize("weighting", [Mean, PCGrad, MGDA, NashMTL])
def test_as_on_the_cpu(name, weighting, rng):
    options = {**OPTIONS, **EAGER}[name]
    here = Net(name).double() if name != "bf16 rows" else Net()
    there = copy.deepcopy(here).cuda()
    x = torch.from_numpy(rng.standard_normal((32, 6))).to(next(here.parameters()).dtype)
    one, other = optimizer(here, weighting(), **options), optimizer(there, weighting(), **options)
    for _ in range(4):
        one.step(closure_of(here, x))
        other.step(closure_of(there, x.cuda()))
    error = (flat(here) - flat(there)).norm() / flat(here).norm()
    assert error <= (1e-2 if name == "bf16 rows" else 1e-9)


@pytest.mark.parametrize("name", [*OPTIONS, *(n for n in EAGER if n != "skip")])
def test_nothing_waits_for_the_device(name, rng):
    net = Net(name).cuda()
    x = torch.from_numpy(rng.standard_normal((32, 6))).float().cuda()
    opt = optimizer(net, **{**OPTIONS, **EAGER}[name])
    closure = closure_of(net, x)
    for _ in range(3):
        opt.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_nothing_waits_for_the_device_whatever_the_method(name, sharpness, rng):
    net = Net().cuda()
    x = torch.from_numpy(rng.standard_normal((32, 6))).float().cuda()
    opt = optimizer(net, make(name, TASKS), sharpness=sharpness, nonfinite="raise")
    closure = closure_of(net, x)
    for _ in range(3):
        opt.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weighting", [PCGrad, MGDA, NashMTL])
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_in_a_graph(name, weighting, rng):
    """A replay is a step: parameters, momentum, BatchNorm and the weighting's state all move."""
    net = Net().cuda()
    check_graph(net, optimizer(net, weighting(), **OPTIONS[name]), rng)


@pytest.mark.parametrize("name", GRAPHED)
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_captured_whatever_the_method(name, sharpness, rng):
    net = Net().cuda()
    check_graph(net, optimizer(net, make(name, TASKS), sharpness=sharpness), rng)


@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_micro_batches_in_a_graph(sharpness, rng):
    net = Net().cuda()
    check_graph(net, optimizer(net, sharpness=sharpness), rng, parts=2)


def test_adam_in_a_graph(rng):
    """It counts its steps on the device where it is ``capturable``."""
    net = Net().cuda()
    base = torch.optim.Adam(net.parameters(), lr=0.01, capturable=True)
    opt = MultiTaskOptimizer(
        base, weighting=PCGrad(), sharpness=SAM(0.05), model=net, nonfinite="mask"
    )
    check_graph(net, opt, rng)


def refused_in_a_graph(net: Net, opt: MultiTaskOptimizer, match: str, *, warm: int = 3) -> None:
    x = torch.randn(32, 6, device="cuda")
    before = torch.cuda.current_stream()
    for _ in range(warm):
        opt.step(closure_of(net, x))
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step(closure_of(net, x))
    assert torch.cuda.current_stream() == before


def test_the_first_step_is_refused_in_a_graph():
    net = Net().cuda()
    refused_in_a_graph(net, optimizer(net), "a step must have been made before", warm=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sharpness": SAMO(0.05)}, "SAMO"),
        ({"sharpness": SAM(0.05), "replay_rng": True}, "replay_rng"),
        ({"nonfinite": "skip"}, "base_optimizer must be fused"),
    ],
    ids=["samo", "replay_rng", "skip"],
)
def test_what_only_the_host_can_do_is_refused_in_a_graph(options, match):
    net = Net().cuda()
    refused_in_a_graph(net, optimizer(net, **options), match)


def test_a_method_that_looks_back_is_refused_in_a_graph():
    net = Net().cuda()
    refused_in_a_graph(net, optimizer(net, make("famo", TASKS)), "looks back")


def test_a_fused_optimizer_skips_in_a_graph(rng):
    """It decides on the device: a replay with a NaN changes nothing, the next one is a step."""
    net = Net().cuda()
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=True)
    opt = MultiTaskOptimizer(base, weighting=MGDA(), model=net, nonfinite="skip")
    static = torch.randn(32, 6, device="cuda")
    closure = closure_of(net, static)
    warmed_up(lambda: opt.step(closure))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(closure)
    before = flat(net)
    static[0, 0] = torch.nan
    graph.replay()
    assert torch.equal(flat(net), before)
    assert net.trunk[1].running_mean.isfinite().all()
    static.normal_()
    graph.replay()
    after = flat(net)
    assert after.isfinite().all() and not torch.equal(after, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)])
def test_float16_with_a_scaler(fused, sharpness, rng):
    """An overflow leaves everything as it was; other steps are those of float32 to float16's rounding."""
    net = Net().cuda()
    base = torch.optim.Adam(net.parameters(), lr=0.01, fused=fused)
    opt = MultiTaskOptimizer(base, weighting=NashMTL(), sharpness=sharpness, model=net)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x = torch.randn(32, 6, device="cuda")

    def closure(tasks=ALL, factor=1.0):
        with torch.autocast("cuda", torch.float16):
            return [loss.float() * factor for loss in net.losses(x, tasks)]

    for factor in (1.0, float("inf"), 1.0):
        before, scale = flat(net), scaler.get_scale()
        opt.backward(lambda tasks=ALL: closure(tasks, factor), scaler=scaler)  # noqa: B023
        scaler.step(opt)
        scaler.update()
        skipped = factor != 1.0
        assert torch.equal(flat(net), before) == skipped
        assert scaler.get_scale() == (scale / 2 if skipped else scale)


def test_representation_on_the_device(rng):
    net = Net().cuda()
    x = torch.randn(32, 6, device="cuda")
    opt = optimizer(net, MGDA(), jacobian=Representation(net.trunk))
    first = sum(float(loss) for loss in opt.step(closure_of(net, x)))
    for _ in range(20):
        last = sum(float(loss) for loss in opt.step(closure_of(net, x)))
    assert last < first


def test_sync_batch_norm_is_updated_once():
    """Its statistics come from the clean pass alone (one process: it is BatchNorm then)."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net()).cuda()
    x = torch.randn(32, 6, device="cuda")
    opt = optimizer(net, sharpness=SAM(0.05))
    opt.step(closure_of(net, x))
    assert int(net.trunk[1].num_batches_tracked) == 1
