"""States from step to step: parameters that change, steps that are not made, what is kept and what is not."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from flatmtl import SAM, SAMO, MultiTaskOptimizer, Representation
from flatmtl.weighting import Mean, NashMTL, PCGrad


def network(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    return nn.ModuleDict(
        {"trunk": trunk, "heads": nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])}
    )


def losses_of(net, x, tasks=(0, 1)):
    z = net["trunk"](x)
    return [(net["heads"][t](z) - t - 1).square().mean() for t in tasks]


def make(net, weighting=None, lr=0.1, base=None, **options):
    options.setdefault("model", net)
    base = base or torch.optim.SGD(net.parameters(), lr=lr)
    return MultiTaskOptimizer(base, weighting=weighting or Mean(), **options)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def grads(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()]).clone()


@pytest.fixture
def x(rng):
    return torch.from_numpy(rng.standard_normal((16, 5))).float()


def test_radius_zero_after_a_sharp_step_is_the_plain_step(x):
    net = network()
    opt = make(net, sharpness=SAM(0.5, every=2))
    opt.step(lambda: losses_of(net, x))
    for group in opt.param_groups:
        group["rho"] = 0.0
    for _ in range(4):
        twin = copy.deepcopy(net)
        opt.step(lambda: losses_of(net, x))
        make(twin).step(lambda: losses_of(twin, x))
        assert torch.equal(flat(net), flat(twin))


def test_radius_that_grows_from_zero_between_solves(x):
    net = network()
    opt = make(net, sharpness=SAM(0.0), weights_every=3)
    opt.step(lambda: losses_of(net, x))
    opt.param_groups[0]["rho"] = 0.1
    opt.step(lambda: losses_of(net, x))


@pytest.mark.parametrize("sharpness", [None, SAM(0.1), SAM(0.1, aggregate="direct")], ids=str)
@pytest.mark.parametrize("change", ["freeze", "unfreeze", "group", "dtype"])
def test_parameters_change_between_two_solves(sharpness, change, x):
    net = network()
    base = torch.optim.SGD(
        [*net["trunk"].parameters(), *net["heads"][0].parameters(), net["heads"][1].weight]
        if change == "group"
        else net.parameters(),
        lr=0.1,
    )
    if change == "unfreeze":
        net["trunk"][0].weight.requires_grad_(False)
    opt = make(net, base=base, sharpness=sharpness, weights_every=4)
    opt.step(lambda: losses_of(net, x))
    if change == "freeze":
        net["trunk"][0].weight.requires_grad_(False)
    elif change == "unfreeze":
        net["trunk"][0].weight.requires_grad_(True)
    elif change == "group":
        opt.add_param_group({"params": [net["heads"][1].bias]})
    else:
        net.double()
        x = x.double()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt.step(lambda: losses_of(net, x))
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]) == (not p.requires_grad), n


@pytest.mark.parametrize("change", ["freeze", "group"])
def test_resume_after_parameters_changed(change, x):
    def run(resume):
        net = network()
        base = torch.optim.SGD(
            [*net["trunk"].parameters(), *net["heads"][0].parameters(), net["heads"][1].weight],
            lr=0.1,
        )
        opt = make(net, base=base, sharpness=SAM(0.5, every=3))
        opt.step(lambda: losses_of(net, x))
        if change == "freeze":
            net["trunk"][0].weight.requires_grad_(False)
        else:
            opt.add_param_group({"params": [net["heads"][1].bias]})
        if resume:
            other = copy.deepcopy(net)
            groups = [
                {
                    "params": [
                        *other["trunk"].parameters(),
                        *other["heads"][0].parameters(),
                        other["heads"][1].weight,
                    ]
                }
            ]
            if change == "group":
                groups.append({"params": [other["heads"][1].bias]})
            again = make(other, base=torch.optim.SGD(groups, lr=0.1), sharpness=SAM(0.5, every=3))
            again.load_state_dict(opt.state_dict())
            net, opt = other, again
        for _ in range(4):
            opt.step(lambda: losses_of(net, x))
        return flat(net)

    assert torch.equal(run(False), run(True))


def test_the_flat_part_stays_when_a_parameter_is_frozen(x):
    """d = A(g) + the flat part of the last sharp step."""
    net = network()
    opt = make(net, sharpness=SAM(0.5, every=3), lr=0.0)
    opt.step(lambda: losses_of(net, x))
    sharp = net["trunk"][2].weight.grad.clone()
    net["trunk"][0].weight.requires_grad_(False)
    calls = []

    def closure(tasks=None):
        calls.append(tasks)
        return losses_of(net, x) if tasks is None else losses_of(net, x, tasks)

    opt.step(closure)
    if len(calls) == 1:  # no perturbed pass: the old flat part
        assert torch.allclose(net["trunk"][2].weight.grad, sharp, rtol=1e-4, atol=1e-7)


def test_roles_survive_a_freeze_with_a_missing_task(x):
    results = []
    for freeze in (False, True):
        net = network()
        opt = make(net, Mean())
        opt.step(lambda: losses_of(net, x))
        if freeze:
            net["heads"][1].bias.requires_grad_(False)
        opt.step(lambda: [losses_of(net, x)[0], None])
        results.append(net["trunk"][0].weight.detach().clone())
    assert torch.allclose(*results)


@pytest.mark.parametrize("kind", ["scaler", "skip"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(sharpness=SAM(0.5, every=2)),
        dict(sharpness=SAM(0.5, warmup=3)),
        dict(weights_every=2),
        dict(sharpness=SAMO(0.5)),
    ],
    ids=["every", "warmup", "weights_every", "samo"],
)
def test_a_skipped_step_with_a_fused_base(kind, fused, options, x):
    results = []
    for overflow in (False, True):
        net = network()
        opt = make(
            net,
            PCGrad(),
            base=torch.optim.SGD(net.parameters(), lr=0.1, fused=fused),
            nonfinite="skip" if kind == "skip" else "raise",
            **options,
        )
        scaler = torch.amp.GradScaler(
            "cpu",
            init_scale=4.0,
            growth_interval=10**6,
            backoff_factor=0.5,
            enabled=kind == "scaler",
        )

        def step(bad):
            def closure(tasks=(0, 1)):
                found = losses_of(net, x, tasks)
                return [
                    loss * float("inf") if bad and t == 1 else loss for t, loss in zip(tasks, found)
                ]

            opt.backward(closure, scaler=scaler)
            scaler.step(opt)
            scaler.update()

        if overflow:
            step(True)
        for _ in range(3):
            step(False)
        results.append(flat(net))
    assert torch.allclose(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_a_failed_step_moves_no_weighting_state(x):
    """The trunk's own gradient overflows, the features' do not."""
    net = network()

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    opt = make(net, PCGrad(), jacobian=Representation(net["trunk"]))
    opt.step(lambda: losses_of(net, x))
    before = opt.weighting.state_dict()["rng"].clone()
    w = net["trunk"][0].weight
    w.register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError):
        opt.step(lambda: losses_of(net, x))
    assert torch.equal(opt.weighting.state_dict()["rng"], before)


def test_a_warning_as_an_error_moves_no_weighting_state(x):
    net = network()
    opt = make(net, PCGrad(), sharpness=SAM(1e4))
    before = opt.weighting.state_dict()["rng"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            opt.step(lambda: losses_of(net, 10 * x))
    assert torch.equal(opt.weighting.state_dict()["rng"], before)


def test_dropped_gradients_move_no_weighting_state(x):
    net = network()
    opt = make(net, PCGrad())
    before = opt.weighting.state_dict()["rng"].clone()
    opt.backward(losses_of(net, x))
    opt.zero_grad()
    assert torch.equal(opt.weighting.state_dict()["rng"], before)


def test_a_base_that_fails_moves_no_weighting_state(x):
    net = network()
    opt = make(net, PCGrad())
    before = opt.weighting.state_dict()["rng"].clone()

    def hook(*_):
        raise KeyError

    opt.base_optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError):
        opt.step(lambda: losses_of(net, x))
    assert torch.equal(opt.weighting.state_dict()["rng"], before)


def test_history_counts_steps_not_backwards(x):
    net = network()
    opt = make(net, history=10)
    for _ in range(2):
        for _ in range(3):
            opt.backward(losses_of(net, x))
        opt.step()
        opt.zero_grad()
    assert len(opt.history) == 2


@pytest.mark.parametrize("kind", ["skip"])
def test_history_has_no_skipped_steps(kind, x):
    net = network()
    opt = make(net, history=10, nonfinite="skip")
    opt.step(lambda: [loss * float("nan") for loss in losses_of(net, x)])
    opt.step(lambda: losses_of(net, x))
    assert len(opt.history) == 1


def test_skip_undoes_replaced_buffers(x):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, z):
            self.n = self.n + 1
            return z

    net = network()
    net["trunk"].append(Counts())
    opt = make(net, nonfinite="skip")
    opt.step(lambda: losses_of(net, x))
    assert net["trunk"][-1].n == 1
    opt.step(lambda: [loss * float("nan") for loss in losses_of(net, x)])
    assert net["trunk"][-1].n == 1


def test_exempt_bias_of_a_group_added_later(x):
    results = []
    for late in (False, True):
        net = network()
        new = nn.Linear(8, 1)
        torch.manual_seed(3)
        nn.init.normal_(new.weight), nn.init.constant_(new.bias, 0.5)
        if not late:
            net["heads"].append(new)
        opt = make(net, sharpness=SAM(1.0, adaptive=True, eta=0.1, exempt_bias=True))
        if late:
            net["heads"].append(new)
            opt.add_param_group({"params": new.parameters()})
        opt.step(lambda tasks=(0, 1, 2): losses_of(net, x, tasks))
        results.append(flat(net))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "sharpness", [None, SAM(0.3), SAMO(0.3, beta=0.0)], ids=["plain", "sam", "samo"]
)
def test_memory_format_changes_between_steps(sharpness, rng):
    x = torch.from_numpy(rng.standard_normal((4, 3, 6, 6))).float()

    def net_():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "trunk": nn.Conv2d(3, 5, 3),
                "heads": nn.ModuleList([nn.Conv2d(5, 2, 3), nn.Conv2d(5, 2, 3)]),
            }
        )

    results = []
    for last in (False, True):
        net = net_()
        opt = make(net, sharpness=sharpness)
        opt.step(lambda: losses_of(net, x))
        if last:
            net.to(memory_format=torch.channels_last)
        for _ in range(2):
            opt.step(lambda: losses_of(net, x))
        results.append(flat(net))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_features_are_not_kept_by_an_optimizer_that_is_gone(x):
    net = network()
    opt = make(net, jacobian=Representation(net["trunk"]))
    opt.step(lambda: losses_of(net, x))
    del opt
    gc.collect()
    out = net["trunk"](x)
    ref = weakref.ref(out)
    del out
    gc.collect()
    assert ref() is None


def test_zero_grad_in_the_closure_of_a_micro_batch(x):
    nets = network(), network()
    opts = [make(n) for n in nets]

    def closure():
        opts[0].zero_grad()
        return losses_of(nets[0], x)

    try:
        opts[0].step([closure, closure])
    except RuntimeError:
        return
    opts[1].step([lambda: losses_of(nets[1], x)] * 2)
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_a_mixed_accumulation_undoes_no_older_buffers(x):
    net = network()
    net["trunk"].append(nn.BatchNorm1d(8))
    opt = make(net, nonfinite="skip")
    opt.step(lambda: losses_of(net, x))
    opt.step(losses_of(net, x))
    mean = net["trunk"][-1].num_batches_tracked.clone()
    opt.backward(losses_of(net, x))
    opt.backward(lambda: [loss * float("nan") for loss in losses_of(net, x)])
    assert net["trunk"][-1].num_batches_tracked >= mean


def test_losses_split_from_a_vector_are_told(x):
    net = network()
    with pytest.warns(UserWarning, match="counts as shared"):
        make(net).step(lambda: list(torch.split(torch.stack(losses_of(net, x)) * 1.0, 1)))


def test_losses_that_are_entries_of_different_tensors_are_no_matter(x):
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(net).step(lambda: [loss.reshape(1)[0] for loss in losses_of(net, x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_gradient_between_solves_in_low_precision(dtype, x):
    net = network().to(dtype)
    opt = make(net, NashMTL(), weights_every=2, lr=0.0)
    opt._engine.weights = {}
    opt.step(lambda: losses_of(net, x.to(dtype)))
    opt._engine.weights["loss"] = torch.tensor([0.0, 0.3], dtype=torch.float64)
    want = [p.grad.clone() for p in net["heads"].parameters()]
    opt.step(lambda: losses_of(net, x.to(dtype)))
    for p, w in zip(net["heads"].parameters(), want):
        assert (p.grad - w).norm() <= 8 * torch.finfo(dtype).eps * w.norm()


@pytest.mark.parametrize("samo", [False, True])
def test_sparse_gradients(samo):
    emb = nn.Embedding(4, 3, sparse=True)
    base = torch.optim.SGD(emb.parameters(), lr=0.1)
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAMO(0.1) if samo else None)
    with pytest.raises(ValueError, match="dense gradient"):
        opt.step(lambda: [emb(torch.tensor([0])).sum(), emb(torch.tensor([1])).square().sum()])


@pytest.mark.parametrize("how", ["round trip", "grad.data"])
def test_views_that_no_longer_view(how, x):
    net = network()
    opt = make(net)
    opt.step(lambda: losses_of(net, x))
    if how == "round trip":
        net.double()
        net.float()
    else:
        for p in net.parameters():
            p.grad.data = p.grad.data.clamp(-0.1, 0.1)
    twin = copy.deepcopy(net)
    other = make(twin)
    for _ in range(3):
        opt.step(lambda: losses_of(net, x))
        other.step(lambda: losses_of(twin, x))
    assert torch.allclose(flat(net), flat(twin), atol=1e-6)


def test_reentrant_checkpoints_are_refused(x):
    x = x.clone().requires_grad_()
    net = network()

    def closure():
        z = torch.utils.checkpoint.checkpoint(net["trunk"], x, use_reentrant=True)
        return [(head(z) - 1).square().mean() for head in net["heads"]]

    with pytest.raises((RuntimeError, ValueError)):
        make(net).step(closure)


def test_each_with_history(x):
    net = network()
    opt = make(net, sharpness=SAM(0.1, aggregate="each"), history=3)
    opt.step(lambda: losses_of(net, x))


def test_a_parameter_first_reached_between_two_solves_is_trained(x):
    net = network()
    net["heads"].append(nn.Linear(8, 1))
    opt = make(net, weights_every=2)
    before = net["heads"][2].weight.detach().clone()
    for n in range(4):
        opt.step(lambda: losses_of(net, x, (0, 1, 2))[: 2 + n % 2] + [None] * (1 - n % 2))
    assert not torch.equal(before, net["heads"][2].weight)


def test_a_step_stays_of_the_kind_that_it_began_as(x):
    """Without kept weights a step solves; its second micro-batch must not take them for older ones."""
    nets = network(), network()
    for net, halves in zip(nets, (1, 2)):
        opt = make(net, weights_every=2)
        opt.step(lambda: losses_of(net, x))
        opt._engine.weights = {}
        for _ in range(halves):
            opt.backward([loss / halves for loss in losses_of(net, x)])
        opt.step()
    assert (flat(nets[0]) - flat(nets[1])).norm() <= 1e-6 * flat(nets[0]).norm()
