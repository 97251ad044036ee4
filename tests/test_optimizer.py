"""MultiTaskOptimizer as an optimizer: what it accepts, what it leaves alone, what it saves."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from quadratics import Problem, snapshot, untouched, values
from torch import nn

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import MGDA, Mean, PCGrad, Sum

LR = 0.01
SHARPNESS = [None, SAM(0.1), SAM(0.5, adaptive=True)]
any_sharpness = pytest.mark.parametrize("sharpness", SHARPNESS, ids=["plain", "sam", "asam"])


def sgd(problem: Problem, **options) -> torch.optim.SGD:
    return torch.optim.SGD(problem.parameters(), lr=LR, **options)


def wrap(problem: Problem, weighting=None, sharpness=None, base=None, **options):
    return MultiTaskOptimizer(base or sgd(problem), weighting=weighting or Mean(),
                              sharpness=sharpness, **options)  # fmt: skip


class Net(nn.Module):
    """A trunk with BatchNorm and two heads."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.heads = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3)])

    def forward(self, x):
        z = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return [head(z) for head in self.heads]

    def losses(self, x):
        return [out.square().mean() + out.sum(dim=1).exp().mean() for out in self(x)]


# ---- it is an optimizer ----------------------------------------------------------------------


def test_is_an_optimizer_and_shares_the_groups(rng):
    problem = Problem(rng)
    base = sgd(problem)
    opt = wrap(problem, base=base)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert repr(opt)
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt.add_param_group({"params": [extra], "lr": 0.5})
    assert base.param_groups[-1]["params"][0] is extra


def test_added_group_is_trained(rng):
    problem = Problem(rng, 2)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = wrap(problem, sharpness=SAM(0.1))
    opt.add_param_group({"params": [extra]})
    assert opt.param_groups[-1]["rho"] == 0.1
    opt.step(lambda: [x + extra.square().sum() for x in problem.losses()])
    assert (extra < 1).all()


@any_sharpness
def test_learning_rate_schedulers(sharpness, rng):
    """On the wrapper or on the base, with the same effect and without a warning."""
    results = []
    for on_base in (False, True):
        state = np.random.default_rng(5)
        problem = Problem(state)
        opt = wrap(problem, sharpness=sharpness)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target = opt.base_optimizer if on_base else opt
            scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=2, gamma=0.1)
            for _ in range(5):
                opt.step(problem.losses)
                scheduler.step()
        assert opt.param_groups[0]["lr"] == pytest.approx(LR * 0.01)
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


def test_scheduler_really_acts(rng):
    problem = Problem(rng)
    opt = wrap(problem)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.0 if epoch else 1.0)
    opt.step(problem.losses)
    scheduler.step()
    before = snapshot(problem.parameters())
    opt.step(problem.losses)
    assert untouched(problem.parameters(), before)


@any_sharpness
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(sharpness, set_to_none, rng):
    """Cleared or not, and both ways: the next step is the same, nothing accumulates."""
    results = []
    for clear in (False, True):
        problem = Problem(np.random.default_rng(8))
        opt = wrap(problem, PCGrad(seed=1), sharpness)
        for _ in range(3):
            opt.step(problem.losses)
            if clear:
                opt.zero_grad(set_to_none=set_to_none)
                for p in problem.parameters():
                    assert p.grad is None if set_to_none else (p.grad == 0).all()
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


def test_step_hooks(rng):
    problem, calls = Problem(rng), []
    opt = wrap(problem, sharpness=SAM(0.1))
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step(problem.losses)
    assert calls == ["pre", "post"]


def test_shared_gradients_are_views_of_one_buffer(rng):
    problem = Problem(rng)
    opt = wrap(problem)
    opt.step(problem.losses)
    first, second = problem.shared[0].grad, problem.shared[1].grad
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.shape == problem.shared[0].shape and second.shape == problem.shared[1].shape


# ---- what the closure may return -------------------------------------------------------------


@any_sharpness
def test_kinds_of_losses(sharpness, rng):
    """List, tuple, dict and stacked losses train alike; what comes back has the same form."""
    forms = {
        "list": lambda x: list(x),
        "tuple": lambda x: tuple(x),
        "dict": lambda x: dict(zip("abc", x)),
        "stacked": lambda x: torch.stack(list(x)),
    }
    results = []
    for name, form in forms.items():
        problem = Problem(np.random.default_rng(4))
        opt = wrap(problem, MGDA(), sharpness)
        for _ in range(3):
            expected = [x.item() for x in problem.losses()]
            losses = opt.step(lambda: form(problem.losses()))
        kind = (
            torch.Tensor
            if name == "stacked"
            else {"list": list, "tuple": tuple, "dict": dict}[name]
        )
        assert isinstance(losses, kind), name
        flat = list(losses.values()) if name == "dict" else list(losses)
        assert [x.item() for x in flat] == expected and not any(x.requires_grad for x in flat)
        if name == "dict":
            assert list(losses) == ["a", "b", "c"]
            assert set(opt.last_status()["finite"]) == {"a", "b", "c"}
        results.append(values(problem.parameters()))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-12)


def test_dict_closure_is_asked_by_name(rng):
    problem, calls, names = Problem(rng), [], ["seg", "depth", "normal"]

    def closure(tasks=None):
        calls.append(tasks)
        wanted = names if tasks is None else tasks
        return {n: problem.loss(names.index(n)) for n in wanted}

    other = Problem(np.random.default_rng(0))
    with torch.no_grad():
        for p, q in zip(other.parameters(), problem.parameters()):
            p.copy_(q)
    other.a, other.b = problem.a, problem.b
    wrap(problem, sharpness=SAM(0.2)).step(closure)
    wrap(other, sharpness=SAM(0.2)).step(other.losses)
    assert calls == [None, ["seg"], ["depth"], ["normal"]]
    np.testing.assert_allclose(values(problem.parameters()), values(other.parameters()), rtol=1e-12)


def test_shape_of_one_element_is_a_scalar(rng):
    problem = Problem(rng)
    wrap(problem).step(lambda: [x.reshape(()) for x in problem.losses()])


@any_sharpness
def test_closure_runs_with_gradients_on(sharpness, rng):
    problem = Problem(rng)
    with torch.no_grad():
        wrap(problem, sharpness=sharpness).step(problem.losses)
    assert problem.shared[0].grad.abs().sum() > 0


# ---- without sharpness: backward(losses), step() ---------------------------------------------


def test_backward_then_step(rng):
    results = []
    for use_closure in (True, False):
        problem = Problem(np.random.default_rng(3))
        opt = wrap(problem, PCGrad(seed=2))
        for _ in range(4):
            if use_closure:
                opt.step(problem.losses)
            else:
                opt.backward(problem.losses())
                opt.step()
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


def test_gradient_may_be_clipped_in_between(rng):
    problem = Problem(rng)
    opt = wrap(problem)
    before = problem.shared_values()
    opt.backward(problem.losses())
    nn.utils.clip_grad_norm_(problem.parameters(), 1e-3)
    opt.step()
    moved = np.linalg.norm(problem.shared_values() - before)
    assert 0 < moved <= LR * 1e-3 * (1 + 1e-9)


def test_step_without_backward(rng):
    problem = Problem(rng)
    opt = wrap(problem)
    before = snapshot(problem.parameters())
    with pytest.raises((RuntimeError, ValueError, TypeError), match="backward|closure"):
        opt.step()
    opt.backward(problem.losses())
    opt.step()
    after = snapshot(problem.parameters())
    with pytest.raises((RuntimeError, ValueError, TypeError), match="backward|closure"):
        opt.step()  # one backward is good for one step
    assert untouched(problem.parameters(), after) and not untouched(problem.parameters(), before)


def test_sharpness_wants_a_closure(rng):
    problem = Problem(rng)
    opt = wrap(problem, sharpness=SAM(0.1))
    before = snapshot(problem.parameters())
    with pytest.raises((RuntimeError, ValueError, TypeError), match="closure"):
        opt.step()
    with pytest.raises((RuntimeError, ValueError, TypeError), match="closure|step"):
        opt.backward(problem.losses())
    assert untouched(problem.parameters(), before)


# ---- which parameters get which gradient -----------------------------------------------------


@any_sharpness
def test_parameter_of_one_task_and_of_none(sharpness, rng):
    """A head gets its own gradient; what no task reaches gets none and no Adam state."""
    problem = Problem(rng, 2)
    lost = nn.Parameter(torch.ones(3, dtype=torch.float64))
    base = torch.optim.Adam([*problem.parameters(), lost], lr=LR, weight_decay=0.1)
    opt = wrap(problem, PCGrad(), sharpness, base)
    opt.step(problem.losses)
    assert (lost == 1).all() and lost not in base.state
    assert lost.grad is None
    assert all(p in base.state for p in problem.parameters())


@any_sharpness
def test_frozen_parameters(sharpness, rng):
    """requires_grad=False: not moved, no gradient."""
    problem = Problem(rng, 2)
    problem.shared[1].requires_grad_(False)
    frozen = snapshot([problem.shared[1]])
    wrap(problem, sharpness=sharpness).step(problem.losses)
    assert untouched([problem.shared[1]], frozen) and problem.shared[1].grad is None
    assert problem.shared[0].grad.abs().sum() > 0


def test_frozen_parameters_are_no_part_of_the_norm(rng):
    problem = Problem(rng, 2, head=0)
    problem.shared[1].requires_grad_(False)
    x, cut, expected = problem.shared_values(), problem.shared[0].numel(), []
    for q in problem.tasks:
        g = q.gradient(x)
        g[cut:] = 0
        expected.append(q.gradient(x + 0.4 * g / np.linalg.norm(g))[:cut])
    wrap(problem, sharpness=SAM(0.4)).step(problem.losses)
    np.testing.assert_allclose(problem.shared[0].grad, np.mean(expected, axis=0), rtol=1e-10)


def test_frozen_later(rng):
    """Freezing between two steps takes effect."""
    problem = Problem(rng, 2)
    opt = wrap(problem, sharpness=SAM(0.1))
    opt.step(problem.losses)
    problem.shared[1].requires_grad_(False)
    opt.zero_grad()
    before = snapshot([problem.shared[1]])
    opt.step(problem.losses)
    assert untouched([problem.shared[1]], before)


def test_parameter_shared_by_some_tasks_only(rng):
    """Tasks that do not reach a shared parameter count as zero there."""
    problem = Problem(rng, 3, head=0)
    some = nn.Parameter(torch.ones(2, dtype=torch.float64))
    weight = [2.0, 0.0, 3.0]

    def losses():
        return [
            x + weight[i] * some.sum() if weight[i] else x for i, x in enumerate(problem.losses())
        ]

    base = torch.optim.SGD([*problem.parameters(), some], lr=LR)
    wrap(problem, base=base).step(losses)
    np.testing.assert_allclose(some.grad.numpy(), (2 + 0 + 3) / 3 * np.ones(2), rtol=1e-14)


def test_shared_by_name(rng):
    """shared= turns a head into a shared parameter: weighted like the others."""
    problem = Problem(rng, 2)
    named = [*problem.shared, problem.heads[0]]
    g = torch.autograd.grad(problem.loss(0), problem.heads[0])[0]
    wrap(problem, shared=named).step(problem.losses)
    torch.testing.assert_close(problem.heads[0].grad, g / 2)


def test_shared_may_be_a_generator(rng):
    problem = Problem(rng, 2)
    wrap(problem, shared=(p for p in problem.shared)).step(problem.losses)
    assert problem.shared[0].grad is not None


def test_named_shared_leaves_the_rest_to_one_task_each(rng):
    """A parameter that two tasks reach but that is not named: an error, or the unweighted sum."""
    problem = Problem(rng, 2, head=0)
    before = snapshot(problem.parameters())
    opt = wrap(problem, shared=problem.shared[:1])
    try:
        opt.step(problem.losses)
    except (ValueError, RuntimeError):
        assert untouched(problem.parameters(), before)
    else:
        total = sum(torch.autograd.grad(problem.loss(i), problem.shared[1])[0] for i in range(2))
        assert problem.shared[1].grad.shape == total.shape


@any_sharpness
def test_roles_do_not_change_silently(sharpness, rng):
    """A task that joins a head of another one: an error that says so, and no step."""
    problem = Problem(rng, 2)
    opt = wrap(problem, sharpness=sharpness)
    opt.step(problem.losses)
    before = snapshot(problem.parameters())

    def joined():
        a, b = problem.losses()
        return [a, b + problem.heads[0].sum()]

    with pytest.raises(ValueError, match="shared"):
        opt.step(joined)
    assert untouched(problem.parameters(), before)
    opt.step(problem.losses)
    assert not untouched(problem.parameters(), before)


def test_tied_weights(rng):
    """One parameter used twice in a graph: both uses count, once."""
    problem = Problem(rng, 2, head=0)
    p = problem.shared[0]

    def losses():
        return [(p * p).sum() + p.sum() * 3, p.sum()]

    base = torch.optim.SGD([p], lr=LR)
    expected = ((2 * p + 3 + 1) / 2).detach().clone()
    wrap(problem, base=base).step(losses)
    torch.testing.assert_close(p.grad, expected)


@any_sharpness
def test_channels_last(sharpness, rng):
    """A network in channels_last trains as in the plain layout, and keeps its layout."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = Net().double().to(memory_format=layout)
        where = net.conv.weight.data_ptr()
        strides = net.conv.weight.stride()
        opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9),
                                 weighting=PCGrad(seed=1), sharpness=sharpness, model=net)  # fmt: skip
        for _ in range(3):
            opt.step(lambda: net.losses(x.to(memory_format=layout)))
        assert net.conv.weight.stride() == strides and net.conv.weight.data_ptr() == where
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_many_tasks(rng):
    problem = Problem(rng, 40, shared=9, head=2)
    base = torch.optim.SGD(problem.parameters(), lr=1e-5)
    opt = wrap(problem, PCGrad(), SAM(0.05), base)
    first = sum(opt.step(problem.losses))
    for _ in range(3):
        last = sum(opt.step(problem.losses))
    assert last < first and all(opt.last_status()["finite"].values())


def test_old_gradients_are_overwritten(rng):
    """What .grad held before, of whatever kind, has no say."""
    results = []
    for garbage in (False, True):
        problem = Problem(np.random.default_rng(1), 2)
        opt = wrap(problem)
        if garbage:
            for p in problem.parameters():
                p.grad = torch.full_like(p, float("nan"))
        opt.step(problem.losses)
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


@any_sharpness
def test_one_loss_twice(sharpness, rng):
    """The same tensor as two tasks: two equal rows."""
    problem = Problem(rng, 1, head=0)
    opt = wrap(problem, sharpness=sharpness)

    def closure(tasks=None):
        loss = problem.loss(0)
        return [loss] * (2 if tasks is None else len(tasks))

    opt.step(closure)
    if sharpness is None:
        g = problem.tasks[0].gradient(values(problem.parameters()) + LR * problem.shared_grad())
        np.testing.assert_allclose(problem.shared_grad(), g, rtol=1e-10)


@any_sharpness
def test_autocast(sharpness):
    """bfloat16 inside the closure, float32 parameters and gradients outside."""
    net, x = Net(), torch.randn(4, 3, 6, 6)
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR), weighting=PCGrad(),
                             sharpness=sharpness, model=net)  # fmt: skip

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [out.float().square().mean() for out in net(x)]

    opt.step(closure)
    assert all(
        p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters()
    )


# ---- nothing but the step changes anything ---------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("sharpness", [SAM(0.1), SAM(0.5, adaptive=True)], ids=["sam", "asam"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_closure_that_raises(sharpness, at, rng):
    """In the clean pass or in any perturbed one: everything is as before, in the same storage."""
    net = Net().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    net.extra = nn.Linear(6, 1).double()
    base = torch.optim.Adam(net.parameters(), lr=LR)
    opt = MultiTaskOptimizer(base, weighting=PCGrad(seed=3), sharpness=sharpness, model=net)

    def losses():
        z = torch.relu(net.norm(net.conv(x))).mean(dim=(2, 3))
        return [h(z).square().mean() for h in (*net.heads, net.extra)]

    opt.step(losses)
    params, buffers = list(net.parameters()), list(net.buffers())
    before, kept = snapshot(params), snapshot(buffers)
    moments = copy.deepcopy(base.state_dict())
    drawn = copy.deepcopy(opt.state_dict())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == at + 1:
            net.norm(net.conv(x))  # moves the running statistics before it fails
            raise Boom
        return losses()

    with pytest.raises(Boom):
        opt.step(closure)
    assert calls == at + 1
    assert untouched(params, before)
    assert_same(base.state_dict(), moments)
    if at > 0:
        assert untouched(buffers, kept), "buffers moved although there was no step"
    assert_same(opt.state_dict(), drawn)


def assert_same(a, b) -> None:
    """Nested states, equal to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failed_step_changes_no_later_one(at):
    """With a failure in between, or without: the same parameters afterwards, to the bit."""
    results = []
    for fail in (False, True):
        problem = Problem(np.random.default_rng(6), 2)
        opt = wrap(problem, PCGrad(seed=3), SAM(0.1), torch.optim.Adam(problem.parameters(), lr=LR))
        for step in range(4):
            if fail and step == 2:
                calls = 0

                def closure():
                    nonlocal calls
                    calls += 1
                    if calls == at + 1:
                        raise Boom
                    return problem.losses()

                with pytest.raises(Boom):
                    opt.step(closure)
            opt.step(problem.losses)
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


@any_sharpness
def test_storage_stays(sharpness, rng):
    problem = Problem(rng)
    where = [p.data_ptr() for p in problem.parameters()]
    opt = wrap(problem, sharpness=sharpness)
    for _ in range(3):
        opt.step(problem.losses)
    assert where == [p.data_ptr() for p in problem.parameters()]


def test_parameters_are_back_before_the_base_steps(rng):
    """lr = 0: after a step with a large rho every bit is as before."""
    problem = Problem(rng)
    before = snapshot(problem.parameters())
    opt = wrap(problem, sharpness=SAM(10.0), base=torch.optim.SGD(problem.parameters(), lr=0.0))
    opt.step(problem.losses)
    assert untouched(problem.parameters(), before)


def test_batch_norm_is_updated_once(rng):
    """Running statistics: what one clean forward leaves, not 1 + T of them."""
    x = torch.randn(4, 3, 8, 8)
    net, twin = Net(), Net()
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.5), model=net)  # fmt: skip
    where = [b.data_ptr() for b in net.buffers()]
    for step in range(3):
        twin.load_state_dict(net.state_dict())
        twin(x)
        opt.step(lambda: net.losses(x))
        for a, b in zip(net.buffers(), twin.buffers()):
            assert torch.equal(a, b)
        assert net.norm.num_batches_tracked.item() == step + 1
    assert where == [b.data_ptr() for b in net.buffers()]


def test_batch_norm_without_model_sees_every_pass():
    """The reason for model=: without it the perturbed passes count too."""
    net, x = Net(), torch.randn(4, 3, 8, 8)
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.5))  # fmt: skip
    with pytest.warns(UserWarning, match="model="):
        opt.step(lambda: net.losses(x))
    assert net.norm.num_batches_tracked.item() == 3


def test_buffers_replaced_by_the_closure(rng):
    """A module that re-binds a buffer in forward (no in-place update) is put back as well."""

    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(3))
            self.register_buffer("n", torch.zeros(()))

        def losses(self):
            self.n = self.n + 1
            return [self.p.sum(), self.p.square().sum()]

    net = Count()
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.5), model=net)  # fmt: skip
    opt.step(net.losses)
    assert net.n.item() == 1


# ---- saved state -----------------------------------------------------------------------------


@any_sharpness
def test_resume_to_the_bit(sharpness, rng):
    """Save, load into new objects, go on: the same parameters as without the stop."""

    def start(seed: int):
        problem = Problem(np.random.default_rng(9))
        base = torch.optim.Adam(problem.parameters(), lr=LR)
        return problem, wrap(problem, PCGrad(seed=seed), sharpness, base)

    problem, opt = start(3)
    for _ in range(3):
        opt.step(problem.losses)
    opt.param_groups[0]["lr"] = 0.003
    if sharpness is not None:
        opt.param_groups[0]["rho"] = 0.02
    stream = io.BytesIO()
    torch.save(
        {"opt": opt.state_dict(), "params": [p.detach() for p in problem.parameters()]}, stream
    )
    for _ in range(3):
        opt.step(problem.losses)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, resumed = start(77)
    with torch.no_grad():
        for p, s in zip(other.parameters(), saved["params"]):
            p.copy_(s)
    resumed.load_state_dict(saved["opt"])
    assert resumed.param_groups[0]["lr"] == 0.003
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    for _ in range(3):
        resumed.step(other.losses)
    assert np.array_equal(values(problem.parameters()), values(other.parameters()))


def test_state_dict_holds_no_gradients(rng):
    """Moments, groups and the stream's position: nothing of the size of J."""
    problem = Problem(rng, 3, shared=1000)
    opt = wrap(problem, PCGrad(), SAM(0.1))
    opt.step(problem.losses)

    def elements(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, dict):
            value = list(value.values())
        return sum(elements(v) for v in value) if isinstance(value, (list, tuple)) else 0

    assert elements(opt.state_dict()) < 50


def test_state_of_another_weighting(rng):
    problem = Problem(rng)
    saved = wrap(problem, PCGrad()).state_dict()
    with pytest.raises((ValueError, KeyError)):
        wrap(problem, Mean()).load_state_dict(saved)


def test_base_state_dict_is_not_enough_but_loads(rng):
    """A wrong dictionary raises and leaves the optimizer as it was."""
    problem = Problem(rng)
    opt = wrap(problem, PCGrad(seed=1), base=torch.optim.Adam(problem.parameters(), lr=LR))
    opt.step(problem.losses)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((ValueError, KeyError, TypeError)):
        opt.load_state_dict({"nonsense": 1})
    assert_same(opt.state_dict(), before)


def test_copies_and_pickles(rng):
    """A deep copy or a pickle of model and optimizer goes on like the original."""
    problem = Problem(rng, 2)
    opt = wrap(problem, PCGrad(seed=1), SAM(0.1), torch.optim.Adam(problem.parameters(), lr=LR))
    opt.step(problem.losses)
    twins = [copy.deepcopy((problem, opt)), pickle.loads(pickle.dumps((problem, opt)))]
    opt.step(problem.losses)
    for other, twin in twins:
        twin.step(other.losses)
        assert np.array_equal(values(other.parameters()), values(problem.parameters()))
        assert other.shared[0].data_ptr() != problem.shared[0].data_ptr()


# ---- against training without flatmtl --------------------------------------------------------


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("sharpness", [None, SAM(0.0)], ids=["plain", "rho0"])
def test_mean_is_ordinary_training(kind, sharpness):
    """Mean over tasks = training the trunk on the mean loss, the heads on their own losses."""
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    nets = [Net().double(), Net().double()]
    base = BASES[kind](nets[1].parameters())
    opt = MultiTaskOptimizer(BASES[kind](nets[0].parameters()), weighting=Mean(), sharpness=sharpness,
                             model=nets[0])  # fmt: skip
    trunk = [*nets[1].conv.parameters(), *nets[1].norm.parameters()]
    for _ in range(10):
        mine = opt.step(lambda: nets[0].losses(x))
        losses = nets[1].losses(x)
        base.zero_grad()
        sum(losses).backward()
        for p in trunk:
            p.grad /= 2
        base.step()
        torch.testing.assert_close(
            torch.stack(mine), torch.stack(losses).detach(), rtol=1e-9, atol=0
        )
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    for p, q in zip(nets[0].buffers(), nets[1].buffers()):
        torch.testing.assert_close(p, q)


@any_sharpness
def test_training_learns(sharpness):
    net, x = Net(), torch.randn(16, 3, 6, 6)
    opt = MultiTaskOptimizer(torch.optim.Adam(net.parameters(), lr=0.01), weighting=PCGrad(),
                             sharpness=sharpness, model=net)  # fmt: skip
    first = opt.step(lambda: net.losses(x))
    for _ in range(30):
        last = opt.step(lambda: net.losses(x))
    assert sum(last) < 0.7 * sum(first)


# ---- gradients that are not finite -----------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@any_sharpness
def test_nonfinite_raise(bad, sharpness, rng):
    problem = Problem(rng, 3)
    base = torch.optim.Adam(problem.parameters(), lr=LR)
    opt = wrap(problem, PCGrad(), sharpness, base)

    def closure(factor: float):
        a, b, c = problem.losses()
        return {"fine": a, "broken": b * factor, "also": c}

    opt.step(lambda: closure(1.0))
    before, moments = snapshot(problem.parameters()), copy.deepcopy(base.state_dict())
    with pytest.raises(FloatingPointError, match="broken") as caught:
        opt.step(lambda: closure(bad))
    assert "fine" not in str(caught.value) and "also" not in str(caught.value)
    assert untouched(problem.parameters(), before)
    assert_same(base.state_dict(), moments)
    opt.step(lambda: closure(1.0))
    assert np.isfinite(values(problem.parameters())).all()
    assert not untouched(problem.parameters(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda", "sum"])
@pytest.mark.parametrize("rho", [None, 0.2])
def test_nonfinite_mask(bad, name, rho, rng):
    """The step of the other tasks, the broken task's head stays where it was."""
    order = np.array([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    weighting, aggregate = {
        "mean": (Mean(), lambda jac: jac.sum(axis=0) / 3),
        "sum": (Sum(), lambda jac: jac.sum(axis=0)),
        "pcgrad": (PCGrad(order=torch.from_numpy(order)), oracles.pcgrad_sum(order)),
        "mgda": (MGDA(), oracles.mgda),
    }[name]
    problem = Problem(rng, 3)
    opt = wrap(problem, weighting, None if rho is None else SAM(rho), nonfinite="mask")
    shared, heads = problem.shared_values(), problem.head_values()

    def closure():
        a, b, c = problem.losses()
        return [a, b * bad, c]

    opt.step(closure)
    without = [problem.tasks[0], oracles.Quadratic(problem.tasks[1].a * 0, problem.tasks[1].b * 0),
               problem.tasks[2]]  # fmt: skip
    d, own = oracles.fs_mtl_gradients(without, shared, heads, aggregate, rho)
    np.testing.assert_allclose(problem.shared_grad(), d, rtol=1e-6, atol=1e-6 * np.linalg.norm(d))
    assert (problem.heads[1].grad == 0).all()
    assert np.array_equal(values([problem.heads[1]]), heads[1])
    np.testing.assert_allclose(problem.head_grads()[2], own[2], rtol=1e-9)
    assert list(opt.last_status()["finite"].values()) == [True, False, True]


def test_nonfinite_only_in_the_perturbed_pass(rng):
    """A loss that breaks at theta + eps: raise restores, mask leaves the task out."""
    for mode in ("raise", "mask"):
        problem = Problem(rng, 2)
        opt = wrap(problem, sharpness=SAM(0.3), nonfinite=mode)
        shared, heads = problem.shared_values(), problem.head_values()
        before = snapshot(problem.parameters())

        def closure(tasks=None):
            losses = problem.losses(tasks)
            return [losses[0] * float("nan")] if tasks == [1] else losses

        if mode == "raise":
            with pytest.raises(FloatingPointError):
                opt.step(closure)
            assert untouched(problem.parameters(), before)
            continue
        opt.step(closure)
        d, own = oracles.fs_mtl_gradients(problem.tasks[:1], shared, heads[:1], oracles.mean, 0.3)
        np.testing.assert_allclose(problem.shared_grad(), d / 2, rtol=1e-9)
        assert np.array_equal(values([problem.heads[1]]), heads[1])
        assert np.isfinite(values(problem.parameters())).all()
        assert list(opt.last_status()["finite"].values()) == [True, False]


def test_nonfinite_only_in_a_head(rng):
    """Finite for the trunk, infinite for the head: the task counts as broken all the same."""
    problem = Problem(rng, 2)
    opt = wrap(problem, nonfinite="mask")
    head = problem.heads[1]

    def closure():
        a, b = problem.losses()
        return [a, b + (head - head.detach()).abs().sqrt().sum()]  # slope of sqrt at 0: infinite

    before = snapshot([head])
    opt.step(closure)
    assert untouched([head], before)
    assert list(opt.last_status()["finite"].values()) == [True, False]


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)])
def test_all_tasks_broken_with_mask(sharpness, rng):
    problem = Problem(rng, 2)
    opt = wrap(problem, PCGrad(), sharpness, nonfinite="mask")
    before = snapshot(problem.parameters())
    opt.step(lambda: [x * float("nan") for x in problem.losses()])
    assert untouched(problem.parameters(), before)


# ---- errors ----------------------------------------------------------------------------------


@any_sharpness
def test_fewer_losses_in_a_later_step(sharpness, rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, sharpness=sharpness)
    opt.step(problem.losses)
    before = snapshot(problem.parameters())
    for count in (2, 1, 0):
        with pytest.raises((ValueError, TypeError), match="loss"):
            opt.step(lambda n=count: problem.losses()[:n])
        assert untouched(problem.parameters(), before)


def test_perturbed_pass_with_another_number_of_losses(rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, sharpness=SAM(0.1))
    before = snapshot(problem.parameters())

    def closure(tasks=None):
        return problem.losses() if tasks is None else problem.losses([0, 1])

    with pytest.raises((ValueError, TypeError), match="loss"):
        opt.step(closure)
    assert untouched(problem.parameters(), before)


BAD_LOSSES = {
    "none": lambda p: None,
    "a number": lambda p: [1.0, 2.0, 3.0],
    "empty": lambda p: [],
    "empty dict": lambda p: {},
    "no graph": lambda p: [x.detach() for x in p.losses()],
    "one without graph": lambda p: [*p.losses()[:2], p.loss(2).detach()],
    "not a scalar": lambda p: [x.expand(2) for x in p.losses()],
    "two dimensions": lambda p: torch.stack(p.losses())[None],
    "scalar tensor": lambda p: p.loss(0),
    "generator": lambda p: (x for x in [None]),
    "complex": lambda p: [x.to(torch.complex128) for x in p.losses()],
    "no parameter": lambda p: [torch.ones((), requires_grad=True) * 2] * 3,
}


@pytest.mark.parametrize("case", BAD_LOSSES)
@any_sharpness
def test_bad_losses(case, sharpness, rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, sharpness=sharpness)
    before = snapshot(problem.parameters())
    with pytest.raises((ValueError, TypeError), match="loss"):
        opt.step(lambda: BAD_LOSSES[case](problem))
    assert untouched(problem.parameters(), before)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_bad_rho(rho, rng):
    with pytest.raises((ValueError, TypeError), match="rho"):
        SAM(rho)
    problem = Problem(rng)
    opt = wrap(problem, sharpness=SAM(0.1))
    opt.param_groups[0]["rho"] = rho
    before = snapshot(problem.parameters())
    with pytest.raises((ValueError, TypeError), match="rho"):
        opt.step(problem.losses)
    assert untouched(problem.parameters(), before)


@pytest.mark.parametrize("eta", [-0.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises((ValueError, TypeError), match="eta"):
        SAM(0.1, adaptive=True, eta=eta)


@pytest.mark.parametrize("weighting", ["pcgrad", None, PCGrad, 3, lambda g: g])
def test_unknown_weighting(weighting, rng):
    with pytest.raises((ValueError, TypeError), match="weighting"):
        MultiTaskOptimizer(sgd(Problem(rng)), weighting=weighting)


@pytest.mark.parametrize("options", [
    {"sharpness": 0.05}, {"sharpness": "sam"}, {"nonfinite": "ignore"}, {"model": 3},
    {"shared": 3}, {"shared": [3]},
])  # fmt: skip
def test_bad_options(options, rng):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        wrap(Problem(rng), **options)


def test_base_optimizer_must_be_one(rng):
    for base in (torch.optim.SGD, None, "sgd"):
        with pytest.raises((ValueError, TypeError), match="base_optimizer"):
            MultiTaskOptimizer(base, weighting=Mean())


def test_parameter_given_twice(rng):
    problem = Problem(rng)
    with pytest.raises((ValueError, TypeError)):
        wrap(problem, shared=[problem.shared[0], problem.shared[0]])
    with pytest.raises(ValueError):
        opt = wrap(problem)
        opt.add_param_group({"params": [problem.shared[0]]})


def test_shared_parameter_that_is_not_optimized(rng):
    problem = Problem(rng)
    stranger = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises((ValueError, TypeError), match="shared"):
        wrap(problem, shared=[*problem.shared, stranger])


@pytest.mark.parametrize("named", [False, True])
def test_mixed_dtypes_of_shared_parameters(named, rng):
    problem = Problem(rng, 2)
    other = nn.Parameter(torch.ones(3, dtype=torch.float32))
    base = torch.optim.SGD([*problem.parameters(), other], lr=LR)
    shared = [*problem.shared, other] if named else None
    before = snapshot([*problem.parameters(), other])
    with pytest.raises((ValueError, TypeError), match="dtype"):
        opt = wrap(problem, base=base, shared=shared)
        opt.step(lambda: [x + other.double().sum() for x in problem.losses()])
    assert untouched([*problem.parameters(), other], before)


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])
def test_heads_may_have_another_dtype(sharpness, rng):
    """Only what lies in one matrix must agree: the shared parameters, and each task's own."""
    problem = Problem(rng, 2, head=0)
    other = nn.Parameter(torch.ones(3, dtype=torch.float32))
    base = torch.optim.SGD([*problem.parameters(), other], lr=LR)
    opt = wrap(problem, base=base, sharpness=sharpness)
    opt.step(lambda: [problem.loss(0) + other.double().square().sum(), problem.loss(1)])
    assert other.grad.dtype == torch.float32 and (other < 1).all()
    assert problem.shared[0].grad.dtype == torch.float64


def test_status_before_the_first_step(rng):
    with pytest.raises(RuntimeError):
        wrap(Problem(rng)).last_status()


def test_errors_use_names_from_the_model():
    """With model= an error about a parameter names it as the model does."""
    net = Net()
    net.norm.double()
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=LR), weighting=Mean(), model=net)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(
        (ValueError, TypeError), match="norm.weight|conv.weight|norm.bias|conv.bias"
    ):
        opt.step(lambda: [net.conv(x).sum() + s * net.norm.weight.sum() for s in (1, 2)])
