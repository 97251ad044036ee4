"""What an optimizer must not do quietly: stale gradients, lost roles, half-failed steps."""

import gc
import weakref

import pytest
import torch
from torch import nn

import flatmtl
from flatmtl.weighting import Mean, PCGrad


def make(params, sharpness=None, base=torch.optim.SGD, **options):
    return flatmtl.MultiTaskOptimizer(
        base(params, lr=0.1), weighting=Mean(), sharpness=sharpness, **options
    )


def leaves(*sizes):
    return [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes]


both = pytest.mark.parametrize("sharpness", [None, flatmtl.SAM(0.05)], ids=["plain", "sam"])


@both
def test_a_frozen_parameter_stays(sharpness, rng):
    """No zero_grad in the loop: the gradient of before the freeze must not be applied again."""
    a, b = leaves(3, 3)
    opt = make([a, b], sharpness, torch.optim.Adam)
    losses = lambda: [(a * b).square().sum(), (a + b).square().sum()]  # noqa: E731
    opt.step(losses)
    a.requires_grad_(False)
    kept = a.detach().clone()
    for _ in range(3):
        opt.step(losses)
    assert torch.equal(a, kept)


@both
def test_a_shared_parameter_that_turns_up_later(sharpness, rng):
    a, late = leaves(3, 3)
    opt = make([a, late], sharpness)
    opt.step(lambda: [a.square().sum(), (2 * a).square().sum()])
    before = late.detach().clone()
    opt.step(lambda: [(a + late).square().sum(), (2 * a - late).square().sum()])
    assert not torch.equal(late, before)
    assert opt._engine.roles is not None
    assert len(opt._engine.roles.shared_index) == 2


def test_a_failed_step_forgets_what_it_saw(rng):
    a, late = leaves(3, 3)
    opt = make([a, late])
    opt.step(lambda: [a.square().sum(), (2 * a).square().sum()])

    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("boom")

    with pytest.raises(ArithmeticError):
        opt.step(lambda: [(a + late).square().sum(), Boom.apply(a).sum()])
    before = late.detach().clone()
    opt.step(lambda: [(a + late).square().sum(), a.square().sum()])
    assert not torch.equal(late, before), "the parameter was never trained again"


def test_a_parameter_keeps_its_role(rng):
    a, own = leaves(3, 3)
    opt = make([a, own])
    opt.step(lambda: [(a + own).square().sum(), a.square().sum()])
    before = own.detach().clone()
    for _ in range(2):  # and the refusal is not forgotten either
        with pytest.raises(ValueError, match="must keep one role"):
            opt.step(lambda: [(a + own).square().sum(), (a - own).square().sum()])
    assert torch.equal(own, before)


def test_too_few_losses_in_a_perturbed_pass(rng):
    (a,) = leaves(3)
    before = a.detach().clone()
    opt = make([a], flatmtl.SAM(0.05))
    calls = []

    def closure():
        calls.append(1)
        losses = [a.square().sum(), (a - 1).square().sum()]
        return losses if len(calls) == 1 else losses[:1]

    with pytest.raises(ValueError, match="closure must return the losses of tasks"):
        opt.step(closure)
    assert torch.equal(a, before)


def test_a_failed_backward_leaves_nothing_to_step(rng):
    a, own = leaves(3, 3)
    opt = make([a, own])
    opt.backward([(a + own).square().sum(), a.square().sum()])
    with pytest.raises(FloatingPointError):
        opt.backward([(a + own).sum() * float("nan"), a.square().sum()])
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    assert own.grad is None or own.grad.isfinite().all()


@both
def test_losses_by_name_in_any_order(sharpness, rng):
    def run(swap):
        torch.manual_seed(0)
        a, own = leaves(3, 3)
        opt = make([a, own], sharpness)
        for k in range(3):
            losses = {"x": lambda: (a + own).square().sum(), "y": lambda: (a - 1).square().sum()}
            names = ["y", "x"] if swap and k else ["x", "y"]
            opt.step(lambda names=names, losses=losses: {n: losses[n]() for n in names})
        return a, own

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True)))


def test_groups_and_states_that_come_through_the_base(rng):
    a, b = leaves(3, 3)
    opt = make([a], flatmtl.SAM(0.05))
    plain = torch.optim.SGD([a], lr=0.5).state_dict()
    opt.base_optimizer.load_state_dict(plain)
    opt.base_optimizer.add_param_group({"params": [b]})
    opt.step(lambda: [(a + b).square().sum(), (a - b).square().sum()])
    assert [g["rho"] for g in opt.param_groups] == [0.05, 0.05]


def test_a_state_that_does_not_fit_changes_nothing(rng):
    (a,) = leaves(3)
    opt = flatmtl.MultiTaskOptimizer(torch.optim.SGD([a], lr=0.1), weighting=PCGrad(seed=3))
    opt.step(lambda: [a.square().sum(), (a - 1).square().sum()])
    before = opt.state_dict()
    bad = {**torch.optim.SGD([a], lr=0.7).state_dict(), "flatmtl": {"weighting": {"other": 1}}}
    with pytest.raises(ValueError, match="state must have"):
        opt.load_state_dict(bad)
    assert opt.param_groups[0]["lr"] == 0.1
    assert torch.equal(
        opt.state_dict()["flatmtl"]["weighting"]["rng"], before["flatmtl"]["weighting"]["rng"]
    )


def test_every_block_is_restored_though_one_cannot_be(rng):
    """The shared block comes first and fails; the own one and the buffers are restored all the same."""
    a, own = leaves(3, 4)
    net = nn.BatchNorm1d(2, affine=False).double()
    opt = make([a, own], flatmtl.SAM(0.5), model=net)
    kept, statistics = own.detach().clone(), net.running_mean.clone()
    calls = []

    def closure():
        calls.append(1)
        net(torch.randn(4, 2, dtype=torch.float64))
        if len(calls) == 3:  # task 1 perturbed: spoil the shared parameter, then fail
            a.data = a.data.float()
            raise KeyError("mine")
        return [a.square().sum(), a.sum() + own.square().sum()]

    with pytest.raises(RuntimeError) as failure:
        opt.step(closure)
    assert isinstance(failure.value.__context__, KeyError)
    assert torch.equal(own, kept)
    assert torch.equal(net.running_mean, statistics)


@pytest.mark.parametrize("swap", [False, True])
def test_the_clean_graphs_are_gone_before_the_perturbed_passes(swap, rng):
    """From the second step on too: they would live through T more forward passes."""
    (a,) = leaves(3)
    opt = make([a], flatmtl.SAM(0.05))
    alive = weakref.WeakSet()
    seen = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = type("Token", (), {})()
            alive.add(ctx.token)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def closure(tasks=("x", "y", "z")):
        gc.collect()
        seen.append(len(alive))
        names = list(reversed(tasks)) if swap and len(seen) > 4 else tasks
        return {name: Keep.apply(a).square().sum() for name in names}

    for _ in range(2):
        opt.step(closure)
    assert seen == [0] * 8


@pytest.mark.parametrize(
    ("make_it", "error", "word"),
    [
        (lambda p: torch.optim.LBFGS([p]), TypeError, "base_optimizer"),
        (lambda p: torch.optim.SGD([p], lr=0.1, maximize=True), ValueError, "maximize"),
    ],
)
def test_base_optimizers_that_do_not_fit(make_it, error, word):
    (a,) = leaves(2)
    with pytest.raises(error, match=word):
        flatmtl.MultiTaskOptimizer(make_it(a), weighting=Mean(), sharpness=flatmtl.SAM(0.1))


def test_names_and_numbers_of_the_wrong_kind():
    with pytest.raises(TypeError, match="name must be a string"):
        flatmtl.weighting.by_name(3)
    with pytest.raises(TypeError, match="eta must be a number"):
        flatmtl.SAM(eta="x")
    a = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="params must be float32"):
        make([a]).step(lambda: [(a * a.conj()).real.sum(), a.real.sum()])


def test_an_expanded_buffer_is_no_obstacle(rng):
    net = nn.Linear(3, 2).double()
    net.register_buffer("table", torch.zeros(1).expand(4))
    opt = make(net.parameters(), flatmtl.SAM(0.1), model=net)
    x = torch.randn(5, 3, dtype=torch.float64)
    opt.step(lambda: list(net(x).square().mean(0)))


@pytest.mark.gpu
@both
def test_no_host_read_in_a_step(sharpness):
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 1)]).cuda()
    opt = flatmtl.MultiTaskOptimizer(
        torch.optim.Adam(net.parameters(), lr=1e-3, capturable=True),
        weighting=PCGrad(),
        sharpness=sharpness,
        model=net,
    )
    x = torch.randn(16, 8, device="cuda")
    losses = lambda: [net[k](net[0](x).relu()).square().mean() for k in (1, 2)]  # noqa: E731
    for _ in range(3):
        opt.step(losses)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
