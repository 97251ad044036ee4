"""AffinityProbe given what it cannot use, and look-aheads that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from affinity_nets import Mixed, batches, differences, picture, storages
from affinity_runs import optimizer, step
from oracle_affinity import Quadratics, as_given, total

import flatmtl
from flatmtl import SAMO, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import Mean, PCGrad

NAN = float("nan")
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "fast"}, ValueError, "mode"),
    ({"mode": None}, (TypeError, ValueError), "mode"),
    ({"look_ahead": "adam"}, ValueError, "look_ahead"),
    ({"every": 0}, ValueError, "every"),
    ({"every": -3}, ValueError, "every"),
    ({"every": 2.0}, TypeError, "every"),
    ({"every": True}, TypeError, "every"),
    ({"lr": 0.0}, ValueError, "lr"),
    ({"lr": -0.1}, ValueError, "lr"),
    ({"lr": NAN}, ValueError, "lr"),
    ({"lr": float("inf")}, ValueError, "lr"),
    ({"lr": "0.1"}, TypeError, "lr"),
    ({"lr": True}, TypeError, "lr"),
    ({"momentum": True}, ValueError, "momentum"),  # exact
    ({"mode": "first_order", "momentum": 0.9}, TypeError, "momentum"),
    ({"mode": "first_order", "look_ahead": "optimizer"}, ValueError, "look_ahead"),
    ({"groups": [()]}, ValueError, "groups"),
    ({"groups": [(0, 0)]}, ValueError, "groups"),
    ({"groups": [(0, 1), (1, 0)]}, ValueError, "groups"),
    ({"groups": "ab"}, (TypeError, ValueError), "groups"),
    ({"groups": 3}, TypeError, "groups"),
    ({"groups": [(0, 1.5)]}, TypeError, "groups"),
    ({"mode": "first_order", "groups": [(0, 1)]}, ValueError, "groups"),
    ({"shared": []}, ValueError, "shared"),
    ({"shared": 7}, TypeError, "shared"),
    ({"shared": ["weight"]}, TypeError, "shared"),
    ({"shared": [torch.nn.Parameter(torch.zeros(2))]}, ValueError, "shared"),
    ({"model": "net"}, TypeError, "model"),
]


@pytest.mark.parametrize(
    ("given", "error", "name"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_bad_arguments(given, error, name, rng):
    problem = Quadratics(rng)
    with pytest.raises(error, match=name):
        AffinityProbe(optimizer("plain", problem.parameters(), 0.1), **given)


@pytest.mark.parametrize("given", [None, "sgd", torch.optim.SGD, [torch.zeros(1)]])
def test_no_optimizer(given):
    with pytest.raises(TypeError, match="optimizer"):
        AffinityProbe(given)


def test_optimizers_that_have_no_such_gradients(rng):
    problem = Quadratics(rng)
    base = torch.optim.SGD(problem.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SAMO"):
        AffinityProbe(MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAMO()))
    module = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(module.parameters(), lr=0.1)
    how = flatmtl.Representation(module)
    with pytest.raises(ValueError, match="Representation"):
        AffinityProbe(MultiTaskOptimizer(base, weighting=Mean(), jacobian=how))


def test_a_parameter_twice_in_shared(rng):
    problem = Quadratics(rng)
    with pytest.raises(ValueError, match="shared"):
        AffinityProbe(optimizer("plain", problem.parameters(), 0.1), shared=problem.shared[:1] * 2)


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
def test_groups_of_unknown_tasks(kind, rng):
    problem = Quadratics(rng)
    opt = optimizer(kind, problem.parameters(), 0.1)
    probe = AffinityProbe(opt, groups=[("t0", "nobody")])
    with pytest.raises(ValueError, match="groups.*nobody"):
        step(probe, opt, lambda: as_given("dict", problem.losses()))


@pytest.mark.parametrize("kind", ["plain", "pcgrad"])
def test_several_learning_rates_for_what_is_shared(kind, rng):
    problem = Quadratics(rng)
    groups = [
        {"params": problem.shared[:1], "lr": 0.01},
        {"params": problem.shared[1:] + problem.heads},
    ]
    opt = optimizer(kind, groups, 0.02)
    probe = AffinityProbe(opt)
    with pytest.raises(ValueError, match="lr"):
        step(probe, opt, problem.losses)


@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_losses_in_place_of_a_closure(mode, rng):
    """Exact look-aheads need the forward pass again; the first order does not."""
    problem = Quadratics(rng)
    opt = optimizer("pcgrad", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, mode=mode)
    if mode == "first_order":
        opt.backward(problem.losses())
        opt.step()
        assert (probe.record().counts() == 1).all()
        return
    with pytest.raises((TypeError, ValueError, RuntimeError), match="closure"):
        opt.backward(problem.losses())
    plain = AffinityProbe(optimizer("plain", problem.parameters(), 0.1))
    with pytest.raises((TypeError, ValueError), match="closure"):
        plain(problem.losses())


def test_a_probe_of_a_multi_task_optimizer_is_not_called(rng):
    problem = Quadratics(rng)
    probe = AffinityProbe(optimizer("mean", problem.parameters(), 0.1))
    with pytest.raises((TypeError, RuntimeError, ValueError), match="step"):
        probe(problem.losses)


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-direct"])
@pytest.mark.parametrize("other", ["names", "fewer", "none"])
def test_other_tasks_on_the_way(kind, other, rng):
    """The look-ahead's losses must be those of the same tasks."""
    problem = Quadratics(rng)
    opt = optimizer(kind, problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt)
    calls: list[int] = []

    def closure():
        calls.append(1)
        losses = as_given("dict", problem.losses())
        if len(calls) == 1:
            return losses
        if other == "names":
            return {name + "'": loss for name, loss in losses.items()}
        if other == "fewer":
            return {k: losses[k] for k in ("t0", "t1")}
        return {**losses, "t1": None}

    before = [p.detach().clone() for p in problem.parameters()]
    with pytest.raises(ValueError, match="closure must return"):
        step(probe, opt, closure)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters()))


class Failure(Exception):
    pass


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("look_ahead", ["sgd", "optimizer"])
@pytest.mark.parametrize("when", ["first", "middle", "last"])
def test_a_look_ahead_that_fails(kind, look_ahead, when, rng):
    """Parameters, optimizer, buffers and random numbers are as before, or as one clean pass left them."""
    torch.manual_seed(int(rng.integers(2**31)))
    model = Mixed()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(kind, params, 0.05, momentum=0.9, wrap={"model": model})
    given = {"model": model} if kind == "plain" else {}
    probe = AffinityProbe(opt, every=1, look_ahead=look_ahead, **given)
    batch, after = batches("mixed", int(rng.integers(2**31)), 2)
    step(probe, opt, lambda: model.losses(batch))
    opt.zero_grad()
    places, before = storages(model), picture(model, opt)
    clean, calls = [], []
    # of the 3 look-aheads, which under SAM come before or after the 3 perturbed passes
    fails = {"first": 2, "middle": 3, "last": 4}[when]

    def closure():
        calls.append(1)
        losses = model.losses(batch)
        if len(calls) == 1:
            clean.append(picture(model, opt))
        if len(calls) == fails:
            raise Failure
        return losses

    with pytest.raises(Failure):
        step(probe, opt, closure)
    left = picture(model, opt)
    same = [p for p in (before, clean[0]) if not differences(left, p)]
    assert same, differences(left, before)
    assert storages(model) == places
    step(probe, opt, lambda: model.losses(after))  # and all goes on
    assert probe.record().counts().max() == 2


@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_detach_ends_it(mode, rng):
    problem = Quadratics(rng)
    opt = optimizer("pcgrad", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, mode=mode, every=1)
    opt.step(problem.losses)
    probe.detach()
    calls: list[int] = []

    def closure():
        calls.append(1)
        return problem.losses()

    opt.step(closure)
    assert len(calls) == 1
    assert (probe.steps, probe.measured) == (1, 1)
    assert (probe.record().counts() == 1).all()
    again = AffinityProbe(opt, mode=mode, every=1)  # the place is free
    opt.step(problem.losses)
    assert again.measured == 1


def test_two_probes_beside_each_other(rng):
    """In a plain loop each measures on its own; neither disturbs the other."""
    problem = Quadratics(rng)
    lr = problem.safe_lr()
    opt = optimizer("plain", problem.parameters(), lr)
    first, second = AffinityProbe(opt), AffinityProbe(opt, mode="first_order")
    z, f = problem.exact(lr), problem.first_order(lr)
    first(problem.losses)
    total(second(problem.losses)).backward()
    opt.step()
    assert abs(first.record().matrix() - z).max() < 1e-11
    assert abs(second.record().matrix() - f).max() < 1e-11 + 1e-9 * abs(f).max()


def test_a_record_before_any_step(rng):
    probe = AffinityProbe(optimizer("plain", Quadratics(rng).parameters(), 0.1))
    with pytest.raises(RuntimeError, match="step"):
        probe.record()


def test_a_state_of_another_probe(rng):
    problem = Quadratics(rng)
    opt = optimizer("plain", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, every=1)
    probe(problem.losses)
    other = AffinityProbe(opt, mode="first_order", every=1)
    with pytest.raises(ValueError, match="mode|state"):
        other.load_state_dict(probe.state_dict())
    with pytest.raises((ValueError, KeyError, TypeError)):
        other.load_state_dict({"nothing": 1})


def test_weights_every_leaves_no_rows(rng):
    """Between two solves there are no gradients of single tasks: said at once, or measured where they are."""
    problem = Quadratics(rng)
    base = torch.optim.SGD(problem.parameters(), lr=problem.safe_lr(0.05))
    opt = MultiTaskOptimizer(base, weighting=PCGrad(), weights_every=2)
    try:
        probe = AffinityProbe(opt, every=1, mode="first_order")
    except ValueError as refused:
        assert "weights_every" in str(refused)
        return
    z = problem.first_order(base.param_groups[0]["lr"])
    opt.step(problem.losses)
    try:
        opt.step(problem.losses)
    except ValueError as refused:
        assert "weights_every" in str(refused)
        return
    assert (probe.record().counts() >= 1).all()
    assert abs(probe.record().matrix() - z).max() < abs(z).max()
