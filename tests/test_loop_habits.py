"""What people do around a step, and what used to go wrong without a word."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from flatmtl import SAM, SAMO, MultiTaskOptimizer, Representation
from flatmtl.weighting import Mean, PCGrad


def network(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
    return nn.ModuleDict(
        {"trunk": trunk, "heads": nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])}
    )


def losses_of(net: nn.ModuleDict, x: torch.Tensor, tasks=(0, 1)) -> list[torch.Tensor]:
    z = net["trunk"](x)
    return [(net["heads"][t](z) - t).square().mean() for t in tasks]


def make(net, weighting=None, lr: float = 0.1, **options) -> MultiTaskOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=lr)
    return MultiTaskOptimizer(base, weighting=weighting or Mean(), model=net, **options)


def flat(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def grads(net) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()]).clone()


@pytest.fixture
def x(rng) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((16, 5))).float()


@pytest.mark.parametrize(
    "sharpness",
    [SAM(2.0), SAM(2.0, aggregate="direct"), SAMO(2.0, beta=0.0)],
    ids=["sam", "direct", "samo"],
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_inside_autocast_sees_the_perturbed_parameters(sharpness, every, x):
    """autocast caches the casts of the parameters: they must not outlive a perturbation."""
    if every > 1 and isinstance(sharpness, SAMO):
        pytest.skip("SAMO solves at every step")
    results = []
    for around in (True, False):
        net = network()
        opt = make(net, sharpness=sharpness, weights_every=every)

        def closure(tasks=(0, 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=not around):
                return [loss.float() for loss in losses_of(net, x, tasks)]

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                opt.step(closure)
        results.append(flat(net))
    plain = network()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            make(plain).step(lambda: losses_of(plain, x))
    moved = (results[1] - flat(plain)).norm()
    assert (results[0] - results[1]).norm() <= 0.3 * moved
    assert moved > 0.1


@pytest.mark.parametrize("vector", [
    lambda parts: torch.stack(parts) / 2,
    lambda parts: torch.cat([p.reshape(1) for p in parts]),
    lambda parts: list(torch.stack(parts)),
    lambda parts: torch.stack(parts).unbind(),
])  # fmt: skip
def test_losses_computed_together_are_told(vector, x):
    net = network()
    with pytest.warns(UserWarning, match="counts as shared"):
        make(net).step(lambda: vector(losses_of(net, x)))


@pytest.mark.parametrize("form", [list, tuple, torch.stack])
def test_losses_apart_are_no_matter(form, x):
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(net).step(lambda: form(losses_of(net, x)))


def test_losses_computed_together_with_named_shared_parameters(x):
    net = nn.Linear(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = make(net, shared=list(net.parameters()))
        opt.step(lambda: net(x).square().mean(0))


@pytest.mark.parametrize("zeroed", ["model", "base"])
def test_gradients_zeroed_elsewhere_between_micro_batches(zeroed, x):
    net = network()
    opt = make(net)
    opt.backward(losses_of(net, x))
    once = grads(net)
    {"model": net, "base": opt.base_optimizer}[zeroed].zero_grad(set_to_none=True)
    opt.backward(losses_of(net, x))
    assert torch.equal(grads(net), once)
    {"model": net, "base": opt.base_optimizer}[zeroed].zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="as it left them"):
        opt.backward(losses_of(net, x))
    opt.zero_grad()
    opt.backward(losses_of(net, x))
    assert torch.equal(grads(net), once)


def test_state_dict_hooks_run(x):
    net = network()
    opt, seen = make(net), []
    opt.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    opt.register_load_state_dict_pre_hook(
        lambda o, state: {k: v for k, v in state.items() if k != "note"}
    )
    opt.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    opt.step(lambda: losses_of(net, x))
    state = opt.state_dict()
    assert state["note"] == 1
    opt.load_state_dict(state)
    assert seen == ["before saving", "after loading"]


def test_a_closure_that_calls_backward_is_told(x):
    net = network()

    def closure():
        parts = losses_of(net, x)
        sum(parts).backward()
        return parts

    before = flat(net)
    with pytest.raises(RuntimeError, match="must not call"):
        make(net).step(closure)
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, int])
def test_any_real_number_is_a_radius(kind, x):
    net = network()
    opt = make(net, sharpness=SAM(0.1))
    opt.param_groups[0]["rho"] = kind(2)
    other = network()
    opt.step(lambda: losses_of(net, x))
    make(other, sharpness=SAM(2.0)).step(lambda: losses_of(other, x))
    assert torch.equal(flat(net), flat(other))


def test_forward_passes_between_steps_are_nobodys_features(x):
    nets = network(), network()
    for strays, net in enumerate(nets):
        opt = make(net, PCGrad(), jacobian=Representation(net["trunk"]))
        for _ in range(3):
            for _ in range(strays):
                losses_of(net, x)
            opt.step(lambda: losses_of(net, x))
    assert torch.equal(flat(nets[0]), flat(nets[1]))


@pytest.mark.parametrize("sharpness", [None, SAM(0.05)])
def test_the_model_changes_its_dtype(sharpness, x):
    net = network()
    opt = make(net, PCGrad(), sharpness=sharpness)
    opt.step(lambda: losses_of(net, x))
    net.double()
    twin = copy.deepcopy(net)
    opt.step(lambda: losses_of(net, x.double()))
    make(twin, PCGrad(), sharpness=sharpness).step(lambda: losses_of(twin, x.double()))
    assert (flat(net) - flat(twin)).norm() < 1e-3  # another draw of PCGrad's order
    assert net["trunk"][0].weight.grad.dtype == torch.float64


@pytest.mark.parametrize("sharpness", [None, SAM(0.05)])
def test_compiled_steps_are_run_as_they_are(sharpness, x):
    """torch.compile around a step, and of the model inside it."""
    results = []
    for kind in ("plain", "model", "step"):
        net = network()
        opt = make(net, PCGrad(), sharpness=sharpness)
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph

        trunk = torch.compile(net["trunk"], backend=backend) if kind == "model" else net["trunk"]

        def closure(tasks=(0, 1)):
            z = trunk(x)
            return [(net["heads"][t](z) - t).square().mean() for t in tasks]

        step = torch.compile(opt.step, backend=backend) if kind == "step" else opt.step
        for _ in range(3):
            step(closure)
        assert bool(compiled) == (kind == "model")
        results.append(flat(net))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_warnings_point_at_the_callers_line(x):
    net = network()
    opt = make(net, sharpness=SAM(1e4))
    with pytest.warns(UserWarning, match="rho is too large") as caught:
        for _ in range(3):
            opt.step(lambda: losses_of(net, 10 * x))
    assert {w.filename for w in caught} == {__file__}
    assert len(caught) <= 2  # each once


def test_a_warm_up_grows_the_radius(x):
    net = network()
    opt = make(net, sharpness=SAM(0.4, warmup=4), lr=0.0)
    distances = []

    def closure(tasks=None):
        if tasks == [0]:
            distances.append(float((flat(net["trunk"]) - start).norm()))
        return losses_of(net, x, (0, 1) if tasks is None else tasks)

    start = flat(net["trunk"])
    for _ in range(6):
        opt.step(closure)
    assert distances == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-5)


def test_several_processes_must_be_told_how_they_belong_together(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="process_group must be given where several processes run"):
        make(network())
    make(network(), process_group=None)  # each by itself
