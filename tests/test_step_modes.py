"""Ways to make a step: micro-batches, missing tasks, GradScaler, skipping, replay, ways to take
gradients, row types; and what a step must never do."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from quadratics import Problem, snapshot, untouched, values
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatmtl
from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import (
    MGDA,
    CAGrad,
    Constant,
    FairGrad,
    GradVac,
    Mean,
    NashMTL,
    PCGrad,
    Sum,
    Weighting,
)  # fmt: skip

LR = 0.01
SHARPNESS = {
    "plain": None,
    "sam": SAM(0.1),
    "asam": SAM(0.5, adaptive=True, eta=0.01),
    "direct": SAM(0.1, aggregate="direct"),
    "second": SAM(0.1, aggregate="second"),
    "each": SAM(0.1, aggregate="each"),
    "joint": SAM(0.1, 0.2, joint_norm=True),
    "every": SAM(0.1, every=2),
    "samo": flatmtl.SAMO(0.05),
}
any_sharpness = pytest.mark.parametrize("sharpness", SHARPNESS.values(), ids=SHARPNESS)
plain_or_sam = pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])


class Net(nn.Module):
    """A trunk (with BatchNorm and dropout where asked for) and three heads."""

    def __init__(self, norm: bool = False, dropout: float = 0.0, dtype=torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(),
            nn.Dropout(dropout), nn.Linear(8, 6), nn.Tanh(),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(6, k) for k in (1, 2, 3)])
        self.to(dtype)

    def losses(self, x: Tensor, tasks=None) -> list[Tensor]:
        """Sums over the batch, so that those of parts add up to those of the whole."""
        h = self.trunk(x)
        wanted = range(3) if tasks is None else tasks
        return [((-1) ** i * self.heads[i](h) - x[:, i : i + 1]).square().sum() for i in wanted]


def net_and_twin(seed: int, **options) -> tuple[Net, Net]:
    torch.manual_seed(seed)
    net = Net(**options)
    return net, copy.deepcopy(net)


def wrap(net: nn.Module | Problem, weighting: Weighting, sharpness=None, base=torch.optim.SGD,
         lr=LR, momentum=0.9, **options) -> MultiTaskOptimizer:  # fmt: skip
    made = base(
        net.parameters(), lr=lr, **({"momentum": momentum} if base is torch.optim.SGD else {})
    )
    if isinstance(net, nn.Module):
        options.setdefault("model", net)
    return MultiTaskOptimizer(made, weighting=weighting, sharpness=sharpness, **options)


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def grads(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in net.parameters()])


def near(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b), (a, b)


def assert_same(a, b, path: str = "") -> None:
    """Nested states, equal to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{k}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


def kept_state(opt: MultiTaskOptimizer) -> dict:
    """The saved state, without the flat part that SAM(every=k) keeps between two perturbed steps: a
    perturbed step that fails is due again, and makes it anew."""
    state = copy.deepcopy(opt.state_dict())
    state["flatmtl"].get("engine", {}).pop("flat", None)
    return state


class Everything:
    """All that a step may change, as it is now."""

    def __init__(self, net: nn.Module, opt: MultiTaskOptimizer) -> None:
        self.net, self.opt = net, opt
        self.tensors = [*net.parameters(), *net.buffers()]
        self.before = snapshot(self.tensors)
        self.state = kept_state(opt)
        self.rng = torch.get_rng_state()

    def unchanged(self, rng: bool = False) -> bool:
        assert_same(kept_state(self.opt), self.state)
        assert untouched(self.tensors, self.before)
        return not rng or torch.equal(torch.get_rng_state(), self.rng)


# ---- micro-batches -------------------------------------------------------------------------------


@any_sharpness
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("by_task", [False, True])
def test_a_list_of_closures_is_one_big_batch(sharpness, parts, by_task, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, FairGrad(), sharpness), wrap(twin, FairGrad(), sharpness)

    def closure(part):
        return (lambda tasks=None: net.losses(part, tasks)) if by_task else lambda: net.losses(part)

    for _ in range(3):
        mine = first.step([closure(part) for part in x.chunk(parts)])
        theirs = second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin), 1e-9)
        near(torch.stack(list(mine)), torch.stack(list(theirs)))
    near(flat(net), flat(twin))


@pytest.mark.parametrize("parts", [2, 3])
def test_repeated_backward_is_one_big_batch(parts, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, FairGrad()), wrap(twin, FairGrad())
    for _ in range(3):
        for part in x.chunk(parts):
            losses = first.backward(net.losses(part))
            near(torch.stack(list(losses)), torch.stack(net.losses(part)).detach())
        first.step()
        second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin), 1e-9)
    near(flat(net), flat(twin))


@pytest.mark.parametrize(
    "weighting",
    [PCGrad(seed=3), GradVac(seed=1), NashMTL(update_every=2), CAGrad()],
    ids=["pcgrad", "gradvac", "nash", "cagrad"],
)
@pytest.mark.parametrize("way", ["backward", "closures", "backward of closures"])
def test_stateful_weightings_move_once(weighting, way, rng):
    """Streams, targets and counters are those of as many steps, however many micro-batches."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, weighting.twin()), wrap(twin, weighting.twin())
    for _ in range(4):
        parts = x.chunk(3)
        closures = [lambda part=part: net.losses(part) for part in parts]
        if way == "backward":
            for part in parts:
                first.backward(net.losses(part))
            first.step()
        elif way == "closures":
            first.step(closures)
        else:
            first.backward(closures)
            first.step()
        second.step(lambda: twin.losses(x))
        mine, theirs = first.state_dict()["flatmtl"], second.state_dict()["flatmtl"]
        assert mine["weighting"].keys() == theirs["weighting"].keys()
        for a, b in zip(mine["weighting"].values(), theirs["weighting"].values()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    near(flat(net), flat(twin), 1e-8)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_between_drops_the_rows(set_to_none, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, FairGrad()), wrap(twin, FairGrad())
    for _ in range(3):
        first.backward(net.losses(10 * x.flip(0)))
        first.zero_grad(set_to_none=set_to_none)
        first.backward(net.losses(x))
        first.step()
        second.step(lambda: twin.losses(x))
    assert torch.equal(flat(net), flat(twin))


def test_gradients_are_cleared_by_the_loop_as_ever(rng):
    """zero_grad, backward, backward, step: the usual order of a loop with accumulation."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, PCGrad()), wrap(twin, PCGrad())
    for _ in range(3):
        first.zero_grad()
        for part in x.chunk(2):
            first.backward(net.losses(part))
        first.step()
        second.step(lambda: twin.losses(x))
    near(flat(net), flat(twin))


@plain_or_sam
def test_backward_of_a_closure_then_clip_then_step(sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = wrap(net, PCGrad(), sharpness), wrap(twin, PCGrad(), sharpness, lr=0.0)
    where = flat(net).clone()
    losses = first.backward(lambda: net.losses(x))
    near(torch.stack(list(losses)), torch.stack(net.losses(x)).detach())
    assert torch.equal(flat(net), where)  # the perturbation is undone before it returns
    second.step(lambda: twin.losses(x))
    assert torch.equal(grads(net), grads(twin))
    total = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    near(total, grads(twin).norm())
    first.step()
    assert float((flat(net) - where).norm()) == pytest.approx(LR * 1e-3, rel=1e-4)


@plain_or_sam
def test_micro_batches_with_sharpness_move_batch_norm_once_each(sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, Mean(), sharpness)
    opt.step([lambda part=part: net.losses(part) for part in x.chunk(3)])
    for part in x.chunk(3):
        twin.losses(part)
    for a, b in zip(net.buffers(), twin.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [[], [lambda: None, 3], [3]], ids=["empty", "mixed", "number"])
def test_lists_that_are_no_closures(bad, rng):
    problem = Problem(rng)
    before = snapshot(problem.parameters())
    with pytest.raises((TypeError, ValueError), match="closure|loss"):
        wrap(problem, Mean()).step(bad)
    assert untouched(problem.parameters(), before)


@pytest.mark.parametrize("mode", [None, "decomposed", "direct"])
@pytest.mark.parametrize("options", [{}, dict(jacobian="batched")], ids=["sequential", "batched"])
def test_micro_batches_between_two_solves(mode, options, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    sharpness = None if mode is None else SAM(0.1, aggregate=mode)
    first, second = (
        wrap(n, FairGrad(), sharpness, weights_every=3, **options) for n in (net, twin)
    )
    for _ in range(5):
        first.step([lambda part=part: net.losses(part) for part in x.chunk(3)])
        second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin), 1e-9)


def test_repeated_backward_between_two_solves(rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    first, second = (wrap(n, FairGrad(), weights_every=3) for n in (net, twin))
    for _ in range(5):
        for part in x.chunk(3):
            first.backward(net.losses(part))
        first.step()
        second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin), 1e-9)


# ---- tasks that are missing ----------------------------------------------------------------------


def without(losses, *missing: int):
    return [None if i in missing else loss for i, loss in enumerate(losses)]


@any_sharpness
@pytest.mark.parametrize("first", [False, True], ids=["later", "at the first step"])
@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_a_missing_task(sharpness, first, kind, rng):
    """As if its gradient were zero; its own parameters have none, and Adam does not move them."""
    problem = Problem(rng, 3)
    other = copy.deepcopy(problem)
    opt = wrap(problem, MGDA(), sharpness, torch.optim.Adam)
    twin = wrap(other, MGDA(), sharpness, torch.optim.Adam)
    if not first:
        opt.step(lambda: form(problem.losses(), kind))
        twin.step(other.losses)
    head = snapshot([problem.heads[2]])
    losses = opt.step(lambda: form(without(problem.losses(), 2), kind))
    # the same with the third task there, but flat
    theirs = twin.step(lambda: [*other.losses()[:2], 0.0 * other.loss(2)])
    assert isinstance(losses, kind)
    found = list(losses.values()) if kind is dict else list(losses)
    assert found[2] is None
    assert [float(x) for x in found[:2]] == [float(x) for x in theirs[:2]]
    np.testing.assert_allclose(problem.shared_grad(), other.shared_grad(), rtol=1e-9, atol=1e-12)
    assert untouched([problem.heads[2]], head)
    assert problem.heads[2].grad is None or not problem.heads[2].grad.any()
    opt.step(lambda: form(problem.losses(), kind))  # and it may come back
    assert not untouched([problem.heads[2]], head)


def form(losses, kind):
    return {"abc"[i]: x for i, x in enumerate(losses)} if kind is dict else kind(losses)


@plain_or_sam
def test_a_task_that_is_missing_everywhere_but_once(sharpness, rng):
    """Micro-batches: a task that is in one of them only."""
    problem = Problem(rng, 3)
    other = copy.deepcopy(problem)
    opt, twin = wrap(problem, PCGrad(), sharpness), wrap(other, PCGrad(), sharpness)
    for _ in range(2):
        losses = opt.step([
            lambda: without([x * 0.5 for x in problem.losses()], 1),
            lambda: without([x * 0.5 for x in problem.losses()], 2),
        ])  # fmt: skip
        expected = twin.step(lambda: [a * b for a, b in zip(other.losses(), (1.0, 0.5, 0.5))])
        np.testing.assert_allclose([float(x) for x in losses], [float(x) for x in expected])
        np.testing.assert_allclose(problem.shared_grad(), other.shared_grad(), rtol=1e-9)
        for a, b in zip(problem.head_grads(), other.head_grads()):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_adam_does_not_touch_a_missing_tasks_parameters(rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, Mean(), base=torch.optim.AdamW)
    opt.step(problem.losses)
    opt.step(problem.losses)
    state = copy.deepcopy(opt.state[problem.heads[1]])
    head = snapshot([problem.heads[1]])
    opt.step(lambda: without(problem.losses(), 1))
    assert untouched([problem.heads[1]], head)  # momentum and weight decay would move it
    assert_same(opt.state[problem.heads[1]], state)


@plain_or_sam
def test_the_missing_tasks_closure_is_not_called(sharpness, rng):
    problem = Problem(rng, 3)
    calls = []

    def closure(tasks=None):
        calls.append(tasks)
        return without(problem.losses(), 0) if tasks is None else problem.losses(tasks)

    wrap(problem, Mean(), sharpness).step(closure)
    assert calls == ([None] if sharpness is None else [None, [1], [2]])


def test_missing_at_the_first_step_with_named_shared(rng):
    """One task alone cannot show what is shared: shared= does."""
    problem = Problem(rng, 2)
    other = copy.deepcopy(problem)
    opt = wrap(problem, Mean(), shared=problem.shared)
    opt.step(lambda: without(problem.losses(), 1))
    g = torch.autograd.grad(other.loss(0), other.shared)
    for p, expected in zip(problem.shared, g):
        torch.testing.assert_close(p.grad, expected / 2)
    opt.step(problem.losses)
    assert problem.heads[1].grad.abs().sum() > 0


BETWEEN = [dict(sharpness=SAM(0.1, every=2)), dict(weights_every=2),
           dict(weights_every=2, sharpness=SAM(0.1)),
           dict(weights_every=2, sharpness=SAM(0.1, aggregate="direct"))]  # fmt: skip


@pytest.mark.parametrize("options", BETWEEN, ids=str)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_missing_in_a_cheap_step_or_a_full_one(options, at, rng):
    """As the same task there but flat; its own parameters are not touched."""
    problem = Problem(rng, 3)
    other = copy.deepcopy(problem)
    opt = wrap(problem, FairGrad(), lr=1e-4, **options)
    twin = wrap(other, FairGrad(), lr=1e-4, **options)
    for _ in range(at):
        opt.step(problem.losses)
        twin.step(other.losses)
    head = snapshot([problem.heads[2]])
    opt.step(lambda: without(problem.losses(), 2))
    twin.step(lambda: [*other.losses()[:2], 0.0 * other.loss(2)])
    assert untouched([problem.heads[2]], head)
    np.testing.assert_allclose(problem.shared_grad(), other.shared_grad(), rtol=1e-8, atol=1e-10)
    for a, b in zip(problem.heads[:2], other.heads[:2]):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    opt.step(problem.losses)
    assert not untouched([problem.heads[2]], head)


@plain_or_sam
def test_all_tasks_missing(sharpness, rng):
    """Nothing to learn from: refused, or no step."""
    problem = Problem(rng, 2)
    opt = wrap(problem, Mean(), sharpness)
    opt.step(problem.losses)
    before = snapshot(problem.parameters())
    with contextlib.suppress(ValueError):
        opt.step(lambda: [None, None])
    assert untouched(problem.parameters(), before)


@plain_or_sam
def test_the_number_of_tasks_does_not_change(sharpness, rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, Mean(), sharpness)
    opt.step(lambda: without(problem.losses(), 1))
    before = snapshot(problem.parameters())
    for wrong in (
        lambda: problem.losses()[:2],
        lambda: [*problem.losses(), problem.loss(0)],
        lambda: dict(zip("abc", problem.losses())),
    ):
        with pytest.raises(ValueError, match="task"):
            opt.step(wrong)
        assert untouched(problem.parameters(), before)
    opt.step(problem.losses)


def test_names_do_not_change(rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, Mean())
    opt.step(lambda: dict(zip("abc", problem.losses())))
    for names in ("abd", "ab", "abcd"):
        with pytest.raises(ValueError, match="task"):
            opt.step(lambda: dict(zip(names, [*problem.losses(), problem.loss(0)])))
    opt.step(lambda: dict(zip("cba", reversed(problem.losses()))))


# ---- GradScaler ----------------------------------------------------------------------------------

SCALED = {
    "pcgrad": lambda: PCGrad(seed=2),
    "nash": NashMTL,
    "fairgrad": FairGrad,
    "cagrad": CAGrad,
    "mgda": MGDA,
}


def scaler(scale: float = 2.0**12, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


@pytest.mark.parametrize("name", SCALED)
@any_sharpness
@pytest.mark.parametrize("scale", [2.0**12, 3000.0])
def test_the_same_step_with_and_without_a_scaler(name, sharpness, scale, rng):
    """Nash and FairGrad are not homogeneous: weights of scaled gradients would be others."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler(scale)
    first, second = (wrap(n, SCALED[name](), sharpness, lr=1e-3) for n in (net, twin))
    for _ in range(3):
        mine = first.backward(lambda: net.losses(x), scaler=amp)
        scaled = grads(net).clone()
        amp.step(first)
        amp.update()
        theirs = second.step(lambda: twin.losses(x))
        near(scaled, scale * grads(twin), 1e-3)  # rounding, enlarged by the solver's condition
        near(torch.stack(list(mine)), torch.stack(list(theirs)), 1e-5)
        near(flat(net), flat(twin), 1e-5)
        with torch.no_grad():  # each step from one state
            for p, q in zip(net.parameters(), twin.parameters()):
                p.copy_(q)
    assert amp.get_scale() == scale


@pytest.mark.parametrize("name", SCALED)
def test_a_power_of_two_changes_no_bit(name, rng):
    """Scaling by a power of two is exact; without sharpness every digit is the same."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    first, second = wrap(net, SCALED[name]()), wrap(twin, SCALED[name]())
    for _ in range(3):
        first.backward(net.losses(x), scaler=amp)
        amp.step(first)
        amp.update()
        second.backward(twin.losses(x))
        second.step()
    near(flat(net), flat(twin), 1e-6)


@plain_or_sam
def test_unscale_and_clip(sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    first, second = wrap(net, PCGrad(), sharpness), wrap(twin, PCGrad(), sharpness)
    for _ in range(3):
        first.backward(lambda: net.losses(x), scaler=amp)
        amp.unscale_(first)
        a = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        amp.step(first)
        amp.update()
        second.backward(lambda: twin.losses(x))
        b = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        second.step()
        near(a, b, 1e-4)
    near(flat(net), flat(twin), 1e-5)


@any_sharpness
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("unscale", [False, True])
def test_overflow_skips_the_step(sharpness, base, unscale, rng):
    """Everything as before, to the bit: parameters, moments, weighting's state, statistics; and the
    scale is halved."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    opt = wrap(net, PCGrad(seed=3), sharpness, base)
    other = wrap(twin, PCGrad(seed=3), sharpness, base)

    def step(factor: float) -> None:
        opt.backward(lambda: [a * f for a, f in zip(net.losses(x), (1, factor, 1))], scaler=amp)
        if unscale:
            amp.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        amp.step(opt)
        amp.update()

    step(1.0)
    kept = Everything(net, opt)
    for bad in (1e38, float("nan")):
        scale = amp.get_scale()
        step(bad)
        assert kept.unchanged()
        assert amp.get_scale() == scale / 2
    step(1.0)
    assert not untouched(kept.tensors, kept.before)
    # and the run as a whole is the one without the bad steps (the scale is a power of two)
    clean = scaler()
    for _ in range(2):
        other.backward(lambda: twin.losses(x), scaler=clean)
        if unscale:
            clean.unscale_(other)
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        clean.step(other)
        clean.update()
    near(flat(net), flat(twin), 1e-5)


def test_overflow_in_one_task_that_the_weights_would_hide(rng):
    """A non-finite task skips the step, also where its weight is zero."""
    net, _ = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    opt = wrap(net, Constant(weights=torch.tensor([1.0, 0.0, 1.0])))
    opt.step(lambda: net.losses(x))
    kept = Everything(net, opt)
    opt.backward([a * f for a, f in zip(net.losses(x), (1, float("inf"), 1))], scaler=amp)
    amp.step(opt)
    amp.update()
    assert kept.unchanged()
    assert amp.get_scale() == 2.0**11


def test_overflow_in_a_perturbed_pass_only(rng):
    net, _ = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    opt = wrap(net, PCGrad(seed=1), SAM(0.1))
    opt.step(lambda: net.losses(x))
    kept = Everything(net, opt)

    def closure(tasks=None):
        factor = float("inf") if tasks == [2] else 1.0
        return [loss * factor for loss in net.losses(x, tasks)]

    opt.backward(closure, scaler=amp)
    amp.step(opt)
    amp.update()
    assert kept.unchanged()
    assert amp.get_scale() == 2.0**11


@plain_or_sam
def test_accumulation_under_a_scaler(sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    first, second = wrap(net, FairGrad(), sharpness), wrap(twin, FairGrad(), sharpness)
    for _ in range(2):
        if sharpness is None:
            for part in x.chunk(2):
                first.backward(net.losses(part), scaler=amp)
        else:
            first.backward([lambda part=part: net.losses(part) for part in x.chunk(2)], scaler=amp)
        amp.step(first)
        amp.update()
        second.step(lambda: twin.losses(x))
    near(flat(net), flat(twin), 1e-5)


def test_scaler_step_wants_a_scaled_backward(rng):
    net, _ = net_and_twin(1, dtype=torch.float32)
    x = torch.randn(12, 5)
    opt, amp = wrap(net, Mean()), scaler()
    amp.scale(torch.ones(()))  # the scaler is set up
    opt.backward(net.losses(x))
    kept = Everything(net, opt)
    with pytest.raises(RuntimeError, match="scaler"):
        amp.step(opt)
    assert kept.unchanged()


def test_scaler_step_takes_no_closure(rng):
    net, _ = net_and_twin(1, dtype=torch.float32)
    x = torch.randn(12, 5)
    opt, amp = wrap(net, Mean(), SAM(0.1)), scaler()
    opt.step(lambda: net.losses(x))
    opt.backward(lambda: net.losses(x), scaler=amp)
    kept = Everything(net, opt)
    with pytest.raises((ValueError, RuntimeError), match="[Cc]losure"):
        amp.step(opt, lambda: net.losses(x))
    assert kept.unchanged()


def test_a_scaler_that_is_off(rng):
    """enabled=False is how one code serves both: the plain step."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler(enabled=False)
    first, second = wrap(net, NashMTL()), wrap(twin, NashMTL())
    for _ in range(2):
        first.backward(net.losses(x), scaler=amp)
        amp.unscale_(first)
        amp.step(first)
        amp.update()
        second.step(lambda: twin.losses(x))
    assert torch.equal(flat(net), flat(twin))


@pytest.mark.parametrize("bad", ["scaler", 3, object()])
def test_something_that_is_no_scaler(bad, rng):
    net, _ = net_and_twin(1, dtype=torch.float32)
    with pytest.raises(TypeError, match="scaler"):
        wrap(net, Mean()).backward(net.losses(torch.randn(4, 5)), scaler=bad)


@pytest.mark.parametrize("mode", [None, "decomposed", "direct"])
def test_a_scaler_between_two_solves(mode, rng):
    """weights_every: the one backward pass of the weighted loss is scaled and unscaled alike."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    sharpness = None if mode is None else SAM(0.1, aggregate=mode)
    first, second = (wrap(n, FairGrad(), sharpness, weights_every=3) for n in (net, twin))
    for _ in range(5):
        first.backward(lambda: net.losses(x), scaler=amp)
        amp.step(first)
        amp.update()
        second.step(lambda: twin.losses(x))
        near(flat(net), flat(twin), 1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_dropped_task_does_not_leak_between_two_solves(scaled, rng):
    """Weight zero and a gradient 10,000 times longer, as MGDA drops it; its own parameters learn on."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler(2.0**4) if scaled else None
    weights = Constant(weights=torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    opt = wrap(net, weights, lr=1e-6, weights_every=9)
    for _ in range(2):
        twin.load_state_dict(net.state_dict())
        losses = [a * b for a, b in zip(twin.losses(x), (1.0, 1e4, 1.0))]
        opt.backward([a * b for a, b in zip(net.losses(x), (1.0, 1e4, 1.0))], scaler=amp)
        if scaled:
            amp.unscale_(opt)
        trunk = list(twin.trunk.parameters())
        expected = torch.autograd.grad(losses[0] + 0.5 * losses[2], trunk, retain_graph=True)
        for p, g in zip(net.trunk.parameters(), expected):
            near(p.grad, g, 1e-5)
        own = torch.autograd.grad(losses[1], list(twin.heads[1].parameters()))
        for p, g in zip(net.heads[1].parameters(), own):
            near(p.grad, g, 1e-5)
        if scaled:
            amp.step(opt)
            amp.update()
        else:
            opt.step()


COUNTING = {
    "every": dict(sharpness=SAM(0.1, every=3)),
    "warmup": dict(sharpness=SAM(0.1, warmup=5)),
    "weights_every": dict(weights_every=3),
    "weights_every-sam": dict(weights_every=3, sharpness=SAM(0.1)),
    "weights_every-direct": dict(weights_every=3, sharpness=SAM(0.1, aggregate="direct")),
    "samo": dict(sharpness=flatmtl.SAMO(0.05)),
}
counting = pytest.mark.parametrize("options", COUNTING.values(), ids=COUNTING)


@counting
def test_a_scale_that_changes_from_step_to_step(options, rng):
    """What is kept between steps is kept in the gradients' own unit, not in that of an old scale."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    amp = scaler()
    first, second = (wrap(n, FairGrad(), lr=1e-3, **options) for n in (net, twin))
    for scale in (2.0**10, 2.0**3, 2.0**14, 2.0**9, 2.0**12):
        first.backward(lambda: net.losses(x), scaler=amp)
        amp.step(first)
        amp.update(scale)
        second.step(lambda: twin.losses(x))
        near(flat(net), flat(twin), 1e-5)


@counting
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_overflow_moves_no_counter(options, at, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)

    def step(net, opt, amp, factor: float = 1.0) -> None:
        opt.backward(lambda: [loss * factor for loss in net.losses(x)], scaler=amp)
        amp.step(opt)
        amp.update(2.0**12)

    first, second = wrap(net, FairGrad(), **options), wrap(twin, FairGrad(), **options)
    one, two = scaler(), scaler()
    for k in range(5):
        if k == at:
            step(net, first, one, float("inf"))
        step(net, first, one)
        step(twin, second, two)
    assert torch.equal(flat(net), flat(twin))


# ---- nonfinite="skip" ----------------------------------------------------------------------------


@any_sharpness
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skip_changes_nothing(sharpness, bad, rng):
    net, _ = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, PCGrad(seed=3), sharpness, torch.optim.Adam, nonfinite="skip")

    def step(factor: float) -> list[Tensor]:
        return opt.step(lambda: [a * f for a, f in zip(net.losses(x), (1, factor, 1))])

    step(1.0)
    kept = Everything(net, opt)
    for _ in range(2):
        losses = step(bad)
        assert kept.unchanged()
        assert not losses[1].isfinite()
        finite = list(opt.last_status()["finite"].values())
        # SAMO has one mean gradient: no task is finite where one is not
        assert finite == (
            [False] * 3 if isinstance(sharpness, flatmtl.SAMO) else [True, False, True]
        )
    step(1.0)
    assert not untouched(kept.tensors, kept.before)


@any_sharpness
def test_a_skipped_step_leaves_no_trace_later(sharpness, rng):
    """Momentum, streams, warm-ups and intervals go on as if it had not been."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    first = wrap(net, PCGrad(seed=3), sharpness, nonfinite="skip")
    second = wrap(twin, PCGrad(seed=3), sharpness, nonfinite="skip")
    for step in range(4):
        if step == 2:
            first.step(lambda: [loss * float("nan") for loss in net.losses(x)])
        first.step(lambda: net.losses(x))
        second.step(lambda: twin.losses(x))
    assert torch.equal(flat(net), flat(twin))


@counting
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_skipped_step_moves_no_counter(options, at, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    first = wrap(net, FairGrad(), nonfinite="skip", **options)
    second = wrap(twin, FairGrad(), nonfinite="skip", **options)
    for step in range(5):
        if step == at:
            first.step(lambda: [loss * float("nan") for loss in net.losses(x)])
        first.step(lambda: net.losses(x))
        second.step(lambda: twin.losses(x))
    assert torch.equal(flat(net), flat(twin))


# ---- random numbers ------------------------------------------------------------------------------


class Masks(nn.Module):
    """Dropout that keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.rand_like(x) > 0.4).to(x.dtype)
        self.drawn.append(mask)
        return x * mask


def masked_net(seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net.trunk[3] = Masks()
    return net


REPLAYED = {k: v for k, v in SHARPNESS.items() if v is not None and k != "every"}


@pytest.mark.parametrize("sharpness", REPLAYED.values(), ids=REPLAYED)
def test_replayed_masks(sharpness, rng):
    net = masked_net(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, Mean(), sharpness, replay_rng=True)
    drawn = net.trunk[3].drawn
    previous = None
    for _ in range(3):
        drawn.clear()
        state = torch.get_rng_state()
        opt.step(lambda: net.losses(x))
        assert len(drawn) >= 4
        assert all(torch.equal(mask, drawn[0]) for mask in drawn)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        net.losses(x)
        assert torch.equal(torch.get_rng_state(), after)  # as after the clean pass alone
        assert previous is None or not torch.equal(previous, drawn[0])
        previous = drawn[0]


def test_the_generator_ends_where_the_clean_pass_left_it(rng):
    """Also where a perturbed pass runs one task, and so draws fewer numbers."""
    net, _ = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)

    def closure(tasks=None):
        return [loss * torch.rand(()) for loss in net.losses(x, tasks)]

    opt = wrap(net, Mean(), SAM(0.1), replay_rng=True)
    state = torch.get_rng_state()
    opt.step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    closure()
    assert torch.equal(torch.get_rng_state(), after)


def test_without_replay_the_masks_differ(rng):
    net = masked_net(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    wrap(net, Mean(), SAM(0.1)).step(lambda: net.losses(x))
    drawn = net.trunk[3].drawn
    assert len(drawn) == 4
    assert not any(torch.equal(drawn[0], mask) for mask in drawn[1:])


def test_replay_by_micro_batch(rng):
    """Every micro-batch has its own mask, the same in all passes."""
    net = masked_net(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, Mean(), SAM(0.1), replay_rng=True)
    opt.step([lambda part=part: net.losses(part) for part in x.chunk(2)])
    drawn = net.trunk[3].drawn
    assert len(drawn) == 2 * 4
    assert not torch.equal(drawn[0], drawn[1])
    for first, second in zip(drawn[0::2], drawn[1::2]):
        assert torch.equal(first, drawn[0])
        assert torch.equal(second, drawn[1])


def test_replay_makes_the_flat_part_that_of_one_mask(rng):
    """The step with dropout replayed is the step of the net with that mask fixed."""
    seed = int(rng.integers(1 << 30))
    net, fixed = masked_net(seed), masked_net(seed)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, PCGrad(), SAM(0.2), replay_rng=True)
    opt.step(lambda: net.losses(x))
    mask = net.trunk[3].drawn[0]
    fixed.trunk[3].forward = lambda z: z * mask
    wrap(fixed, PCGrad(), SAM(0.2)).step(lambda: fixed.losses(x))
    assert torch.equal(flat(net), flat(fixed))


@plain_or_sam
def test_replay_changes_nothing_without_random_numbers(sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    wrap(net, PCGrad(), sharpness, replay_rng=True).step(lambda: net.losses(x))
    wrap(twin, PCGrad(), sharpness).step(lambda: twin.losses(x))
    assert torch.equal(flat(net), flat(twin))


class Boom(Exception):
    pass


RAISING = {**REPLAYED, "every": SAM(0.1, every=2)}


@pytest.mark.parametrize("sharpness", RAISING.values(), ids=RAISING)
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("open_", ["step", "backward"])
def test_a_closure_that_raises(sharpness, replay, at, open_, rng):
    """Parameters, statistics, weighting's state, modes and random numbers are those before the step."""
    torch.manual_seed(int(rng.integers(1 << 30)))
    net = Net(norm=True, dropout=0.3)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, PCGrad(seed=3), sharpness, torch.optim.Adam, replay_rng=replay)
    opt.step(lambda: net.losses(x))
    if isinstance(sharpness, SAM) and sharpness.every > 1:
        opt.step(lambda: net.losses(x))
    kept = Everything(net, opt)
    calls = []

    def closure():
        calls.append(1)
        losses = net.losses(x)
        if len(calls) == at + 1:
            raise Boom
        return losses

    with pytest.raises(Boom):
        getattr(opt, open_)(closure)
    assert kept.unchanged(rng=True)
    assert net.training
    assert net.trunk[3].training
    opt.step(lambda: net.losses(x))
    assert not untouched(kept.tensors, kept.before)


@pytest.mark.parametrize("mode", ["decomposed", "direct"])
def test_a_closure_that_raises_between_two_solves(mode, rng):
    torch.manual_seed(int(rng.integers(1 << 30)))
    net = Net(norm=True, dropout=0.3)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = wrap(net, FairGrad(), SAM(0.1, aggregate=mode), torch.optim.Adam, weights_every=3)
    opt.step(lambda: net.losses(x))
    kept = Everything(net, opt)
    calls = []

    def closure():
        calls.append(1)
        losses = net.losses(x)
        if len(calls) == 2:
            raise Boom
        return losses

    with pytest.raises(Boom):
        opt.step(closure)
    assert kept.unchanged(rng=True)


# ---- saved and copied ------------------------------------------------------------------------------

SAVED = {
    **{k: dict(sharpness=v) for k, v in SHARPNESS.items()},
    "warmup": dict(sharpness=SAM(0.2, warmup=9)),
    "weights_every": dict(weights_every=3),
    "weights_every-sam": dict(weights_every=3, sharpness=SAM(0.1)),
    "bf16": dict(row_dtype=torch.bfloat16, sharpness=SAM(0.1)),
}


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_is_the_same_to_the_bit(options, way, at, rng):
    """With random orders, moments, flat parts and counters, at a full step and between two."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    weighting = GradVac(seed=7)
    opt = wrap(net, weighting, base=torch.optim.Adam, **options)
    for _ in range(at):
        opt.step(lambda: net.losses(x))
    if way == "state_dict":
        other = wrap(twin, GradVac(seed=1), base=torch.optim.Adam, **options)
        stream = io.BytesIO()
        torch.save({"opt": opt.state_dict(), "net": net.state_dict()}, stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)
        twin.load_state_dict(saved["net"])
        other.load_state_dict(saved["opt"])
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, opt))
    else:
        twin, other = pickle.loads(pickle.dumps((net, opt)))
    for _ in range(4):
        opt.step(lambda: net.losses(x))
        other.step(lambda: twin.losses(x))
        assert torch.equal(flat(net), flat(twin))


# ---- ways to take gradients ------------------------------------------------------------------------

WAYS = {"batched": "batched", "one": flatmtl.Batched(chunk=1), "two": flatmtl.Batched(chunk=2),
        "all": flatmtl.Batched(chunk=None), "more": flatmtl.Batched(chunk=7)}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@any_sharpness
def test_batched_is_sequential(way, sharpness, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    first = wrap(net, FairGrad(), sharpness, jacobian=way)
    second = wrap(twin, FairGrad(), sharpness, jacobian="sequential")
    for _ in range(3):
        first.step(lambda: net.losses(x))
        second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin), 1e-9)
    near(flat(net), flat(twin))


@pytest.mark.parametrize("way", ["batched", flatmtl.Batched(chunk=2)], ids=["all", "two"])
def test_batched_with_a_missing_task_and_micro_batches(way, rng):
    problem = Problem(rng, 4)
    other = copy.deepcopy(problem)
    first = wrap(problem, PCGrad(), jacobian=way)
    second = wrap(other, PCGrad())
    for missing in (1, 3):
        first.step([lambda: without(problem.losses(), missing), problem.losses])
        second.step([lambda: without(other.losses(), missing), other.losses])
    np.testing.assert_allclose(values(problem.parameters()), values(other.parameters()), rtol=1e-10)


class Square(torch.autograd.Function):
    """Keeps things on ctx under names that autograd's own nodes use, too."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.variable = torch.ones(3)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info, dims, x):
        return Square.apply(x), dims[0]


@pytest.mark.parametrize("options", [
    {}, dict(sharpness=SAM(0.1)), dict(sharpness=flatmtl.SAMO(0.1)), dict(jacobian="batched"),
    dict(jacobian="representation"), dict(weights_every=2),
], ids=str)  # fmt: skip
def test_custom_functions_in_the_trunk(options, rng):
    """What is shared and whose is what is found through any node of the graph."""
    seed, found = int(rng.integers(1 << 30)), []
    for square in (Square.apply, torch.square):
        torch.manual_seed(seed)
        net = Net()
        x = torch.randn(12, 5, dtype=torch.float64)
        way = dict(options)
        if way.get("jacobian") == "representation":
            way["jacobian"] = flatmtl.Representation(net.trunk)
        net.trunk[5].forward = lambda z, square=square: square(z)
        opt = wrap(net, FairGrad(), **way)
        for _ in range(2):
            opt.step(lambda: net.losses(x))
        found.append(flat(net))
    near(*found)


@pytest.mark.parametrize("tasks, chunk, passes", [(5, None, 1), (5, 2, 3), (4, 2, 2), (3, 1, 3)])
def test_batched_makes_fewer_backward_passes(tasks, chunk, passes, rng):
    problem = Problem(rng, tasks)
    opt = wrap(problem, Mean(), jacobian=flatmtl.Batched(chunk=chunk))
    count = []

    def closure():
        x = [p * 1.0 for p in problem.shared]
        x[0].register_hook(lambda g: count.append(1))
        return [(problem.a[i] @ torch.cat([*(p.reshape(-1) for p in x), problem.heads[i]])
                 ).square().sum() for i in range(tasks)]  # fmt: skip

    opt.step(closure)  # the first one may look who reaches what
    count.clear()
    opt.step(closure)
    assert len(count) == passes


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "2"])
def test_bad_chunk(chunk):
    with pytest.raises((TypeError, ValueError), match="chunk"):
        flatmtl.Batched(chunk=chunk)


@pytest.mark.parametrize("way", ["vmap", 3, None, nn.Linear(2, 2)], ids=str)
def test_bad_jacobian(way, rng):
    with pytest.raises((TypeError, ValueError), match="jacobian"):
        wrap(Problem(rng), Mean(), jacobian=way)


@pytest.mark.parametrize("weighting", [Mean(), Sum(), Constant(weights=torch.tensor([1.0, 0.3, 2.0]))],
                         ids=["mean", "sum", "constant"])  # fmt: skip
def test_representation_is_equal_for_linear_weightings(weighting, rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True)
    x = torch.randn(12, 5, dtype=torch.float64)
    first = wrap(net, weighting, jacobian=flatmtl.Representation(net.trunk))
    second = wrap(twin, weighting.twin())
    for _ in range(3):
        mine = first.step(lambda: net.losses(x))
        theirs = second.step(lambda: twin.losses(x))
        near(torch.stack(list(mine)), torch.stack(list(theirs)))
        near(grads(net), grads(twin))
    near(flat(net), flat(twin))


def test_representation_between_two_solves(rng):
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    weights = Constant(weights=torch.tensor([1.0, 0.25, 2.0]))
    first = wrap(net, weights, jacobian=flatmtl.Representation(net.trunk), weights_every=3)
    second = wrap(twin, weights.twin())
    for _ in range(5):
        first.step(lambda: net.losses(x))
        second.step(lambda: twin.losses(x))
        near(grads(net), grads(twin))


@pytest.mark.parametrize("name", ["mgda", "fairgrad", "pcgrad"])
def test_representation_is_mgda_ub(name, rng):
    """By hand: weights from the gradients at z = trunk(x), then one backward of sum w_i L_i."""
    make = {"mgda": MGDA, "fairgrad": FairGrad, "pcgrad": lambda: PCGrad(seed=5)}[name]
    net, twin = net_and_twin(int(rng.integers(1 << 30)))
    x = torch.randn(12, 5, dtype=torch.float64)
    solver = make()
    opt = wrap(net, make(), jacobian=flatmtl.Representation(net.trunk))
    for _ in range(3):
        twin.load_state_dict(net.state_dict())
        z = twin.trunk(x)
        losses = [((-1) ** i * h(z) - x[:, i : i + 1]).square().sum()
                  for i, h in enumerate(twin.heads)]  # fmt: skip
        rows = torch.stack(
            [torch.autograd.grad(loss, z, retain_graph=True)[0].reshape(-1) for loss in losses]
        )
        w = solver(rows @ rows.T)
        trunk = list(twin.trunk.parameters())
        total = sum(w_i * loss for w_i, loss in zip(w, losses))
        expected = torch.autograd.grad(total, trunk, retain_graph=True)
        opt.step(lambda: net.losses(x))
        for p, g in zip(net.trunk.parameters(), expected):
            near(p.grad, g, 1e-9)
        for i, head in enumerate(twin.heads):
            own = torch.autograd.grad(losses[i], list(head.parameters()), retain_graph=True)
            for p, g in zip(net.heads[i].parameters(), own):
                near(p.grad, g)


def test_representation_goes_back_through_the_trunk_once(rng):
    net, _ = net_and_twin(1)
    x = torch.randn(12, 5, dtype=torch.float64)
    count = []

    def watch(module, inputs, out) -> None:
        out.register_hook(lambda g: count.append(1))

    net.trunk[0].register_forward_hook(watch)
    opt = wrap(net, MGDA(), jacobian=flatmtl.Representation(net.trunk))
    for step in range(3):
        opt.step(lambda: net.losses(x))
        assert len(count) == step + 1


def test_representation_is_not_for_sharpness(rng):
    net, _ = net_and_twin(1)
    with pytest.raises(ValueError, match="sharpness|Representation"):
        wrap(net, Mean(), SAM(0.1), jacobian=flatmtl.Representation(net.trunk))


def test_representation_that_no_task_uses(rng):
    net, _ = net_and_twin(1)
    other = nn.Linear(2, 2)
    opt = wrap(net, Mean(), jacobian=flatmtl.Representation(other))
    before = snapshot(list(net.parameters()))
    with pytest.raises((ValueError, RuntimeError), match="[Rr]epresentation|module"):
        opt.step(lambda: net.losses(torch.randn(4, 5, dtype=torch.float64)))
    assert untouched(list(net.parameters()), before)


# ---- rows in another type ------------------------------------------------------------------------


def test_bf16_rows_of_a_linear_weighting(rng):
    """The update is the sum of rounded rows: each element by its terms' rounding, 2^-9 of each."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), dtype=torch.float32)
    x = torch.randn(12, 5)
    opt = wrap(net, Sum(), row_dtype=torch.bfloat16)
    opt.step(lambda: net.losses(x))
    losses = twin.losses(x)
    for p, q in zip(net.trunk.parameters(), twin.trunk.parameters()):
        rows = [torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in losses]
        assert p.grad.dtype == torch.float32
        rounded = sum(r.bfloat16().double() for r in rows)
        size = sum(r.abs().double() for r in rows)
        assert ((p.grad.double() - rounded).abs() <= 2.0**-20 * size + 1e-30).all()
        assert not torch.equal(p.grad, sum(rows))  # they were rounded
    for head, other, loss in zip(net.heads, twin.heads, losses):
        for p, q in zip(head.parameters(), other.parameters()):
            g = torch.autograd.grad(loss, q, retain_graph=True)[0]
            assert p.grad.dtype == torch.float32
            assert ((p.grad - g).abs() <= 2.0**-8 * g.abs()).all()


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "fairgrad"])
@any_sharpness
def test_bf16_rows(name, sharpness, rng):
    """Within the rounding of the rows; with sharpness s - g loses what bfloat16 cannot hold of it."""
    net, twin = net_and_twin(int(rng.integers(1 << 30)), norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    make = {"pcgrad": PCGrad, "mgda": MGDA, "fairgrad": FairGrad}[name]
    first = wrap(net, make(), sharpness, row_dtype=torch.bfloat16)
    second = wrap(twin, make(), sharpness)
    first.step(lambda: net.losses(x))
    second.step(lambda: twin.losses(x))
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in net.parameters())
    heads = [torch.cat([p.grad.reshape(-1) for p in n.heads.parameters()]) for n in (net, twin)]
    near(*heads, 2.0**-7 if sharpness is None else 0.05)
    if sharpness is None:
        near(grads(net), grads(twin), 0.1)  # 2^-9, enlarged by the solver's condition


@pytest.mark.parametrize(
    "bad",
    [torch.float32, torch.float64, torch.int8, torch.complex64, "bfloat16", torch.float8_e4m3fn],
    ids=str,
)
def test_bad_row_dtype(bad, rng):
    with pytest.raises((TypeError, ValueError), match="row_dtype"):
        wrap(Problem(rng), Mean(), row_dtype=bad)


# ---- nothing is read on the host -----------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Raises where a value leaves its tensor: what would wait for a device."""

    BANNED = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique",
              "item", "repeat_interleave.Tensor")  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.BANNED:
            raise AssertionError(f"host read: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reads(monkeypatch):
    """What does not come by the dispatcher, too."""

    # On the CPU, and there only, the watch for errors and warnings looks at its flags at once.
    monkeypatch.setattr("flatmtl.watch.Watch.post", lambda *_: None)

    @contextlib.contextmanager
    def banned():
        def refuse(name):
            def read(*args, **kwargs):
                raise AssertionError(f"host read: Tensor.{name}")

            return read

        with monkeypatch.context() as patch, NoReads():
            for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__",
                         "__index__"):  # fmt: skip
                patch.setattr(Tensor, name, refuse(name))
            yield

    return banned


QUIET = {
    "plain": {},
    "sam": dict(sharpness=SAM(0.1)),
    "asam": dict(sharpness=SAM(0.5, 0.2, adaptive=True, eta=0.1, exempt_bias=True)),
    "joint": dict(sharpness=SAM(0.1, joint_norm=True)),
    "direct": dict(sharpness=SAM(0.1, aggregate="direct")),
    "second": dict(sharpness=SAM(0.1, aggregate="second")),
    "each": dict(sharpness=SAM(0.1, aggregate="each")),
    "every": dict(sharpness=SAM(0.1, every=2, warmup=3)),
    "samo": dict(sharpness=flatmtl.SAMO(0.05)),
    "samo-adaptive": dict(sharpness=flatmtl.SAMO(0.05, adaptive=True)),
    "weights_every": dict(weights_every=2),
    "weights_every-sam": dict(weights_every=2, sharpness=SAM(0.1)),
    "weights_every-direct": dict(weights_every=2, sharpness=SAM(0.1, aggregate="direct")),
    "batched": dict(jacobian="batched"),
    "chunks": dict(jacobian=flatmtl.Batched(chunk=2), sharpness=SAM(0.1)),
    "representation": dict(jacobian="trunk"),
    "bf16": dict(row_dtype=torch.bfloat16, sharpness=SAM(0.1)),
    "replay": dict(replay_rng=True, sharpness=SAM(0.1)),
    "history": dict(history=4, sharpness=SAM(0.1)),
    "history-plain": dict(history=4),
}


@pytest.mark.parametrize("options", QUIET.values(), ids=QUIET)
@pytest.mark.parametrize("weighting", [PCGrad(), FairGrad(), MGDA(), NashMTL()],
                         ids=["pcgrad", "fairgrad", "mgda", "nash"])  # fmt: skip
def test_no_host_read_in_a_step(options, weighting, no_reads, rng):
    torch.manual_seed(int(rng.integers(1 << 30)))
    net = Net(norm=True, dropout=0.2, dtype=torch.float32)
    if options.get("jacobian") == "trunk":
        options = {**options, "jacobian": flatmtl.Representation(net.trunk)}
    x = torch.randn(12, 5)
    opt = wrap(net, weighting.twin(), nonfinite="mask", **options)
    for step in range(5):  # the first may look around
        with no_reads() if step else contextlib.nullcontext():
            opt.step(lambda: net.losses(x))
    assert torch.isfinite(flat(net)).all()


@pytest.mark.parametrize("options", [{}, dict(sharpness=SAM(0.1))], ids=["plain", "sam"])
def test_no_host_read_with_micro_batches_and_missing_tasks(options, no_reads, rng):
    torch.manual_seed(int(rng.integers(1 << 30)))
    net = Net(norm=True, dtype=torch.float32)
    x = torch.randn(12, 5)
    opt = wrap(net, FairGrad(), nonfinite="mask", **options)
    opt.step(lambda: net.losses(x))
    for _ in range(3):
        with no_reads():
            opt.step([lambda: without(net.losses(x[:6]), 1), lambda: net.losses(x[6:])])


def test_no_host_read_in_a_scaled_backward(no_reads, rng):
    """The scaler itself reads its flag in step(); what is flatmtl's does not."""
    torch.manual_seed(int(rng.integers(1 << 30)))
    net = Net(dtype=torch.float32)
    x = torch.randn(12, 5)
    opt, amp = wrap(net, FairGrad(), SAM(0.1)), scaler()
    for step in range(3):
        with no_reads() if step else contextlib.nullcontext():
            opt.backward(lambda: net.losses(x), scaler=amp)
        amp.step(opt)
        amp.update()


def test_the_watcher_sees_reads(no_reads):
    x = torch.ones(2)
    for read in (lambda: x[0].item(), lambda: bool(x[0]), lambda: x.tolist(), lambda: float(x[0]),
                 lambda: torch.equal(x, x), lambda: x.nonzero(), lambda: x.numpy()):  # fmt: skip
        with pytest.raises(AssertionError, match="host read"), no_reads():
            read()


# ---- refused -------------------------------------------------------------------------------------


def test_lbfgs_is_refused_with_the_reason(rng):
    base = torch.optim.LBFGS(Problem(rng).parameters())
    with pytest.raises(TypeError, match="LBFGS.*(losses|closure)"):
        MultiTaskOptimizer(base, weighting=Mean())


def test_mixed_devices(rng):
    """Shared parameters on two devices cannot lie in one row. (meta stands for a second device.)"""
    here = nn.Parameter(torch.ones(3))
    there = nn.Parameter(torch.ones(3, device="meta"))
    base = torch.optim.SGD([here, there], lr=LR)

    def closure():
        return [here.sum(), there.sum()]

    before = snapshot([here])
    with pytest.raises(ValueError, match="device"):
        opt = MultiTaskOptimizer(base, weighting=Mean(), shared=[here, there])
        opt.step(closure)
    assert untouched([here], before)


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_bad_replay_rng(bad, rng):
    with pytest.raises((TypeError, ValueError), match="replay_rng"):
        wrap(Problem(rng), Mean(), replay_rng=bad)
