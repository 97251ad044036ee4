"""What the optimizer does with the methods that are no plain Gram weightings, on stubs of every kind.

The expected gradients come from torch.autograd alone.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from stub_methods import Back, Count, Inverse, Largest, Learned, Momentum, Relative
from torch import Tensor, nn

import flatmtl
import flatmtl.interchange
from flatmtl import SAM, AffinityProbe, Batched, MultiTaskOptimizer, Representation
from flatmtl.weighting import CRMOGM, MGDA, GradVac, Mean, NashMTL, PCGrad


class Net(nn.Module):
    def __init__(self, seed: int = 0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Linear(5, 7),
            nn.BatchNorm1d(7) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Linear(7, 4),
        )
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])
        self.double()

    def losses(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x).tanh()
        return [0.1 + head(h).sub(k).square().mean() for k, head in enumerate(self.heads)]

    @property
    def shared(self) -> list[Tensor]:
        return list(self.trunk.parameters())

    def own(self, k: int) -> list[Tensor]:
        return list(self.heads[k].parameters())


def batch(rng) -> Tensor:
    return torch.from_numpy(rng.standard_normal((6, 5)))


def truth(net: Net, x: Tensor):
    """Losses [T], shared gradients [T, P], own gradients, by autograd."""
    losses = net.losses(x)
    rows, own = [], []
    for k, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, [*net.shared, *net.own(k)], retain_graph=True)
        n = len(net.shared)
        rows.append(torch.cat([g.flatten() for g in grads[:n]]))
        own.append(torch.cat([g.flatten() for g in grads[n:]]))
    return torch.stack([loss.detach() for loss in losses]), torch.stack(rows), own


def flat(params) -> Tensor:
    return torch.cat([p.grad.flatten() for p in params])


def optimizer(net: Net, method, **options) -> MultiTaskOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=options.pop("lr", 0.05))
    return MultiTaskOptimizer(base, weighting=method, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------- one backward pass


def test_one_pass_weighs_shared_and_own_gradients(rng):
    net, x = Net(), batch(rng)
    losses, rows, own = truth(net, x)
    opt = optimizer(net, Inverse())
    opt.backward(lambda: net.losses(x))
    close(flat(net.shared), (rows / losses[:, None]).sum(0))
    for k in range(3):
        close(flat(net.own(k)), own[k] / losses[k])


@pytest.mark.parametrize("form", ["list", "mapping", "stack"])
def test_one_pass_is_one_backward_pass(rng, monkeypatch, form):
    net, x = Net(), batch(rng)
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    forwards = []
    opt = optimizer(net, Inverse())

    def closure():
        forwards.append(1)
        losses = net.losses(x)
        return {
            "list": losses,
            "mapping": dict(zip("abc", losses, strict=True)),
            "stack": torch.stack(losses),
        }[form]

    for _ in range(3):
        opt.step(closure)
    assert len(calls) == len(forwards) == 3


def test_micro_batches_are_an_observation_each(rng):
    net, xs = Net(), [batch(rng), batch(rng)]
    expected = [truth(net, x) for x in xs]
    opt = optimizer(net, Inverse())
    opt.backward([lambda x=x: net.losses(x) for x in xs])
    close(flat(net.shared), sum((r / L[:, None]).sum(0) for L, r, _ in expected))
    close(flat(net.own(1)), sum(own[1] / L[1] for L, _, own in expected))
    both = flat(net.shared)
    opt.zero_grad()
    for x in xs:  # the same, one call each
        opt.backward(lambda x=x: net.losses(x))
    close(flat(net.shared), both)


def test_state_moves_once_a_micro_batch_and_not_for_a_dropped_step(rng):
    net, x = Net(), batch(rng)
    method = Count()
    opt = optimizer(net, method)
    opt.backward([lambda: net.losses(x)] * 3)
    opt.zero_grad()
    assert method.state_dict()["count"].tolist() == [[0, 0, 0]]
    opt.backward(lambda: net.losses(x))
    opt.backward(lambda: net.losses(x))
    opt.step()
    assert method.state_dict()["count"].tolist() == [[2, 2, 2]]

    def fails():
        raise KeyError("data")

    opt.backward(lambda: net.losses(x))
    with pytest.raises(KeyError):
        opt.backward(fails)
    assert method.state_dict()["count"].tolist() == [[2, 2, 2]]


def test_a_missing_task_has_weight_zero_and_keeps_its_state(rng):
    net, x = Net(), batch(rng)
    _, rows, own = truth(net, x)
    method = Count()
    opt = optimizer(net, method)
    opt.backward(lambda: net.losses(x))  # which tells the roles
    opt.zero_grad()

    def without():
        a, _, c = net.losses(x)
        return [a, None, c]

    opt.backward(without)
    close(flat(net.shared), rows[0] + 3 * rows[2])
    assert all(p.grad is None for p in net.own(1))
    close(flat(net.own(2)), 3 * own[2])
    assert method.state_dict()["count"].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(rng, bad):
    x = batch(rng)

    def closure(net):
        a, b, c = net.losses(x)
        return [a, b * bad, c]

    net = Net()
    before = copy.deepcopy(net.state_dict())
    method = Count()
    opt = optimizer(net, method)
    with pytest.raises(FloatingPointError, match=r"\[1\]"):
        opt.step(lambda: closure(net))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert method.state_dict()["count"].tolist() == [[0, 0, 0]]
    masked = Net()
    _, rows, _ = truth(masked, x)
    opt = optimizer(masked, Count(), nonfinite="mask")
    opt.backward(lambda: closure(masked))
    close(flat(masked.shared), rows[0] + 3 * rows[2])
    assert opt.last_status()["finite"] == {0: True, 1: False, 2: True}
    assert all(not p.grad.any() for p in masked.own(1) if p.grad is not None)
    skipped = Net()
    method = Count()
    opt = optimizer(skipped, method, nonfinite="skip")
    opt.step(lambda: closure(skipped))
    assert all(torch.equal(v, skipped.state_dict()[k]) for k, v in before.items())
    assert method.state_dict()["count"].tolist() == [[0, 0, 0]]


def test_a_loss_that_the_method_refuses_changes_nothing(rng):
    net, x = Net(), batch(rng)
    before = copy.deepcopy(net.state_dict())
    opt = optimizer(net, Inverse())
    with pytest.raises(ValueError, match="losses must be above 0 for Inverse, got .* for task 2"):
        opt.step(lambda: [*net.losses(x)[:2], net.losses(x)[2] - 100])
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_with_sharpness_the_perturbed_gradients_are_weighted(rng):
    x = batch(rng)
    for sharpness in (SAM(0.1), SAM(0.1, aggregate="direct")):
        net = Net()
        losses, rows, own = truth(net, x)
        sharp = []
        for k in range(3):
            other = copy.deepcopy(net)
            with torch.no_grad():
                for group, g in ((other.shared, rows[k]), (other.own(k), own[k])):
                    eps = 0.1 * g / g.norm()
                    for p, part in zip(group, eps.split([p.numel() for p in group]), strict=True):
                        p.add_(part.view_as(p))
            sharp.append(truth(other, x))
        opt = optimizer(net, Inverse(), sharpness=sharpness, history=2)
        assert opt.flat_weighting is None
        opt.backward(lambda net=net: net.losses(x))
        want = sum(s[1][k] / losses[k] for k, s in enumerate(sharp))
        torch.testing.assert_close(flat(net.shared), want, rtol=1e-9, atol=1e-11)
        for k, s in enumerate(sharp):
            torch.testing.assert_close(flat(net.own(k)), s[2][k] / losses[k], rtol=1e-9, atol=1e-11)


def test_sharpness_every_other_step_keeps_weighted_flat_parts(rng):
    xs = [batch(rng) for _ in range(4)]
    nets = []
    for every in (1, 2):
        net = Net()
        opt = optimizer(net, Count(), sharpness=SAM(1e-9, every=every), lr=0.01)
        for x in xs:
            opt.step(lambda net=net, x=x: net.losses(x))
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_probe_changes_nothing_and_sees_all_gradients(rng):
    xs = [batch(rng) for _ in range(4)]
    for mode in ("exact", "first_order"):
        runs = []
        for probed in (False, True):
            net = Net(norm=True)
            opt = optimizer(net, Count(), model=net)
            probe = AffinityProbe(opt, every=2, mode=mode) if probed else None
            for x in xs:
                opt.step(lambda net=net, x=x: net.losses(x))
            runs.append([p.detach().clone() for p in net.parameters()])
            if probe is not None:
                seen = probe.record().matrix("cosine")
                assert seen.shape == (3, 3)
                assert seen.diagonal() == pytest.approx(1)
        assert all(map(torch.equal, *runs))


def test_history_of_one_pass(rng):
    net, x = Net(), batch(rng)
    losses, _, _ = truth(net, x)
    opt = optimizer(net, Inverse(), history=3)
    opt.step(lambda: net.losses(x))
    seen = opt.history.arrays()
    close(torch.from_numpy(seen["losses"][0]), losses)
    close(torch.from_numpy(seen["weights"][0]), 1 / losses)


# ---------------------------------------------------------------- what is learned


def test_learned_parameters_have_a_group_of_their_own(rng):
    net, x = Net(), batch(rng)
    losses, rows, _ = truth(net, x)
    method = Learned(3, lr=0.5)
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    opt = MultiTaskOptimizer(base, weighting=method)
    group = opt.param_groups[-1]
    assert group["params"] == [method.s]
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.0
    opt.step(lambda: net.losses(x))
    close(method.s.detach(), -0.5 * (losses - 1))
    losses, rows, _ = truth(net, x)
    opt.backward(lambda: net.losses(x))
    close(flat(net.shared), (rows * method.s.detach().exp()[:, None]).sum(0))


def test_learned_parameters_that_the_caller_has_placed_stay_there():
    net, method = Net(), Learned(3)
    base = torch.optim.Adam(
        [{"params": net.parameters()}, {"params": method.parameters(), "lr": 7.0}]
    )
    opt = MultiTaskOptimizer(base, weighting=method)
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["lr"] == 7.0


def test_learned_parameters_over_micro_batches_a_skip_and_a_missing_task(rng):
    net, xs = Net(), [batch(rng), batch(rng)]
    expected = [truth(net, x)[0] for x in xs]
    method = Learned(3)
    opt = optimizer(net, method, nonfinite="skip", lr=0.1)
    opt.backward([lambda x=x: net.losses(x) for x in xs])
    close(method.s.grad, sum(expected) - 1)
    opt.zero_grad()
    for x in xs:
        opt.backward(lambda x=x: net.losses(x))
    close(method.s.grad, sum(expected) - 1)
    opt.step()
    kept = method.s.detach().clone()
    opt.step(lambda: [loss * math.nan for loss in net.losses(xs[0])])
    assert torch.equal(method.s.detach(), kept)
    opt.backward(lambda: [net.losses(xs[0])[0], None, net.losses(xs[0])[2]])
    assert method.s.grad[1] == 0


def test_learned_parameters_resume_and_copies(rng):
    xs = [batch(rng) for _ in range(6)]

    def run(net, opt, part):
        for x in part:
            opt.step(lambda x=x: net.losses(x))

    def fresh():
        net, method = Net(), Learned(3, lr=0.2)
        base = torch.optim.Adam(net.parameters(), lr=0.01)
        return net, MultiTaskOptimizer(base, weighting=method)

    net, opt = fresh()
    run(net, opt, xs)
    first, opt_a = fresh()
    run(first, opt_a, xs[:3])
    second, opt_b = fresh()
    second.load_state_dict(first.state_dict())
    opt_b.load_state_dict(copy.deepcopy(opt_a.state_dict()))
    run(second, opt_b, xs[3:])
    for a, b in zip(net.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(opt.weighting.s, opt_b.weighting.s)
    third, opt_c = copy.deepcopy((first, opt_a))
    assert opt_c.param_groups[-1]["params"][0] is opt_c.weighting.s
    run(third, opt_c, xs[3:])
    for a, b in zip(net.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learned_parameters_under_a_scaler(rng):
    x = batch(rng).float()
    grads = []
    for scaled in (False, True):
        net = Net().float()
        method = Learned(3)
        opt = optimizer(net, method)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        opt.backward(lambda net=net: net.losses(x), scaler=scaler)
        if scaled:
            scaler.unscale_(opt)
        grads.append((method.s.grad.clone(), flat(net.shared)))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the losses after the step


def test_looking_back_sees_the_same_batch_after_the_step(rng):
    net, xs = Net(norm=True), [batch(rng), batch(rng)]
    method = Back()
    opt = optimizer(net, method, model=net, lr=1e-3)  # so small that some loss falls
    runs = []

    def closure(x=xs[0]):
        runs.append(1)
        return net.losses(x)

    opt.step(closure)
    assert len(runs) == 2
    before, after = method.seen[-1]
    statistics = copy.deepcopy(net.trunk[1].state_dict())
    close(after, torch.stack(net.losses(xs[0])).detach())
    net.trunk[1].load_state_dict(statistics)
    assert int(net.trunk[1].num_batches_tracked) == 1
    assert (after < before).any()
    opt.backward(closure)
    opt.zero_grad()  # dropped: nothing to look back on
    assert len(method.seen) == 1
    opt.step([lambda x=x: net.losses(x) for x in xs])
    assert len(method.seen) == 2
    close(method.seen[-1][1], torch.stack(net.losses(xs[1])).detach())  # of the last one seen
    with pytest.raises(ValueError, match="losses must be a closure"):
        opt.backward(net.losses(xs[0]))


def test_looking_back_draws_the_same_dropout_masks(rng):
    net, x = Net(), batch(rng)
    net.trunk[1] = nn.Dropout(0.5)
    method = Back()
    opt = optimizer(net, method, lr=0.0)
    state = torch.get_rng_state()
    opt.step(lambda: net.losses(x))
    ours = torch.get_rng_state()
    before, after = method.seen[-1]
    assert torch.equal(before, after)
    torch.set_rng_state(state)
    net.losses(x)
    assert torch.equal(ours, torch.get_rng_state())


# ---------------------------------------------------------------- losses and gradients


def test_with_losses(rng):
    net, x = Net(), batch(rng)
    losses, rows, own = truth(net, x)
    opt = optimizer(net, Relative())
    opt.backward(lambda: net.losses(x))
    want = (rows * (losses / rows.norm(dim=1))[:, None]).sum(0)
    close(flat(net.shared), want)
    close(flat(net.own(2)), 2 * own[2])
    opt.zero_grad()
    opt.backward([lambda: net.losses(x)] * 2)  # sums of losses and of gradients
    close(flat(net.shared), 2 * want)


def test_with_losses_and_sharpness_solves_for_both_parts(rng):
    net, x = Net(), batch(rng)
    opt = optimizer(net, Relative(), sharpness=SAM(0.1))
    opt.backward(lambda: net.losses(x))
    assert isinstance(opt.flat_weighting, Relative)
    assert {"loss", "flat"} <= set(opt.last_status())


def test_with_losses_on_features_and_between_solves(rng):
    net, x = Net(), batch(rng)
    losses, _, own = truth(net, x)
    opt = optimizer(net, Relative(), jacobian=Representation(net.trunk))
    opt.backward(lambda: net.losses(x))
    z = net.trunk(x).detach().requires_grad_()
    tops = [0.1 + h(z.tanh()).sub(k).square().mean() for k, h in enumerate(net.heads)]
    at = [torch.autograd.grad(t, z, retain_graph=True)[0] for t in tops]
    d = sum(loss / g.norm() * g for loss, g in zip(losses, at, strict=True))
    want = torch.autograd.grad(net.trunk(x), net.shared, d)
    close(flat(net.shared), torch.cat([g.flatten() for g in want]))
    close(flat(net.own(0)), 2 * own[0])
    net = Net()
    opt = optimizer(net, Relative(), weights_every=2, lr=0.0)
    opt.step(lambda: net.losses(x))
    first = [p.grad.clone() for p in net.parameters()]
    opt.backward(lambda: net.losses(x))
    for p, g in zip(net.parameters(), first, strict=True):
        close(p.grad, g)


# ---------------------------------------------------------------- the rows


def test_rows(rng):
    net, x = Net(), batch(rng)
    _, rows, own = truth(net, x)
    opt = optimizer(net, Largest())
    opt.backward(lambda: net.losses(x))
    want = rows.gather(0, rows.abs().argmax(0, keepdim=True))[0]
    close(flat(net.shared), want)
    close(flat(net.own(1)), own[1])
    assert torch.equal(flatmtl.aggregate(rows, Largest()), want)
    opt = optimizer(net, Largest(), history=2)
    opt.step(lambda: net.losses(x))
    assert opt.history.arrays()["cosines"].shape[-1] == 3


def test_rows_that_are_not_finite_are_left_out(rng):
    net, x = Net(), batch(rng)
    _, rows, _ = truth(net, x)
    opt = optimizer(net, Momentum(), nonfinite="mask")
    opt.backward(lambda: [net.losses(x)[0], net.losses(x)[1] * math.nan, net.losses(x)[2]])
    close(flat(net.shared), rows[0] + rows[2])


def test_a_state_of_rows(rng):
    net, xs = Net(), [batch(rng) for _ in range(3)]
    method = Momentum()
    opt = optimizer(net, method)
    y = torch.zeros(3, sum(p.numel() for p in net.shared), dtype=torch.float64)
    for x in xs:
        _, rows, _ = truth(net, x)
        opt.backward(lambda x=x: net.losses(x))
        opt.zero_grad()  # dropped: the state stays
        opt.backward(lambda x=x: net.losses(x))
        y = y / 2 + rows
        close(flat(net.shared), y.sum(0))
        opt.step()
    saved = copy.deepcopy((net, opt))
    opt.backward(lambda: net.losses(xs[0]))
    saved[1].backward(lambda: saved[0].losses(xs[0]))
    assert torch.equal(flat(net.shared), flat(saved[0].shared))


def test_a_state_of_rows_moves_with_the_parameters(rng):
    """A task that comes later makes parameters shared that were another's own."""
    net, x = Net(), batch(rng)
    extra = nn.Linear(5, 4).double()

    def closure(all_of_them: bool):
        h = net.trunk(x).tanh()
        z = (extra(x) + h).tanh()
        a = net.heads[0](h).square().mean()
        b = net.heads[1](z).sub(1).square().mean()
        c = net.heads[2](z).sub(2).square().mean() if all_of_them else None
        return [a, b, c]

    base = torch.optim.SGD([*extra.parameters(), *net.parameters()], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Momentum())
    opt.step(lambda: closure(False))
    first = flat(net.shared).clone()
    opt.step(lambda: closure(True))
    h = closure(True)[2]
    third = torch.cat([g.flatten() for g in torch.autograd.grad(h, net.shared)])
    close(flat(net.shared), 1.5 * first + third)


def test_rows_and_sharpness(rng):
    net, x = Net(), batch(rng)
    _, rows, own = truth(net, x)
    opt = optimizer(net, Momentum(), sharpness=SAM(0.0))
    opt.step(lambda: net.losses(x))
    opt.backward(lambda: net.losses(x))
    plain = Net()
    other = optimizer(plain, Momentum())
    other.step(lambda: plain.losses(x))
    other.backward(lambda: plain.losses(x))
    close(flat(net.shared), flat(plain.shared))
    net = Net()
    opt = optimizer(net, Largest(), sharpness=SAM(0.1))
    opt.backward(lambda: net.losses(x))
    sharp = []
    for k in range(3):
        other = Net()
        with torch.no_grad():
            for group, g in ((other.shared, rows[k]), (other.own(k), own[k])):
                eps = 0.1 * g / g.norm()
                for p, part in zip(group, eps.split([p.numel() for p in group]), strict=True):
                    p.add_(part.view_as(p))
        sharp.append(truth(other, x)[1][k])
    flat_rows = torch.stack(sharp) - rows
    want = sum(r.gather(0, r.abs().argmax(0, keepdim=True))[0] for r in (rows, flat_rows))
    torch.testing.assert_close(flat(net.shared), want, rtol=1e-7, atol=1e-9)


def test_a_state_of_rows_under_a_scaler(rng):
    x = batch(rng).float()
    grads = []
    for scaled in (False, True):
        net = Net().float()
        opt = optimizer(net, Momentum(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=scaled)
        for _ in range(3):  # the scale doubles in between
            opt.backward(lambda net=net: net.losses(x), scaler=scaler)
            if scaled:
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
        grads.append(flat(net.shared))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- weights per group


def parts(net: Net, how):
    """Slices of a flat row, of each group of shared parameters."""
    names = [n for n, _ in net.trunk.named_parameters()]
    sizes = [p.numel() for p in net.shared]
    key = {
        "parameter": lambda n: n,
        "layer": lambda n: n.rpartition(".")[0],
        "group": lambda n: n.endswith("bias"),
        "lists": lambda n: n == "0.weight",
    }[how]
    groups: dict = {}
    at = 0
    for name, size in zip(names, sizes, strict=True):
        groups.setdefault(key(name), []).append(torch.arange(at, at + size))
        at += size
    return [torch.cat(g) for g in groups.values()]


@pytest.mark.parametrize("how", ["parameter", "layer", "group", "lists"])
@pytest.mark.parametrize("make", [MGDA, NashMTL, lambda: PCGrad(seed=3), GradVac, Mean])
@pytest.mark.parametrize("sharpness", [None, SAM(0.0), SAM(0.0, aggregate="direct")])
def test_weights_per_group(rng, how, make, sharpness):
    net, x = Net(), batch(rng)
    _, rows, own = truth(net, x)
    if how == "group":
        biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
        rest = [p for n, p in net.named_parameters() if not n.endswith("bias")]
        base = torch.optim.SGD([{"params": rest}, {"params": biases}], lr=0.1)
    else:
        base = torch.optim.SGD(net.parameters(), lr=0.1)
    per = [[net.trunk[0].weight]] if how == "lists" else how
    model = net if how == "layer" else None
    opt = MultiTaskOptimizer(
        base, weighting=make(), weights_per=per, model=model, sharpness=sharpness, history=2
    )
    opt.backward(lambda: net.losses(x))
    index = parts(net, how)
    grams = torch.stack([rows[:, i] @ rows[:, i].T for i in index])
    weights = make()(grams)
    want = torch.zeros(rows.shape[1], dtype=torch.float64)
    for i, w in zip(index, weights, strict=True):
        want[i] = w @ rows[:, i]
    torch.testing.assert_close(flat(net.shared), want, rtol=1e-7, atol=1e-10)
    close(flat(net.own(1)), own[1])
    opt.step()
    seen = opt.history.arrays()
    n = rows.norm(dim=1)
    torch.testing.assert_close(torch.from_numpy(seen["cosines"][0]), rows @ rows.T / n / n[:, None])
    torch.testing.assert_close(
        torch.from_numpy(seen["weights"][0]), weights.mean(0), rtol=1e-6, atol=1e-9
    )


def test_weights_per_group_resume(rng):
    xs = [batch(rng) for _ in range(4)]

    def fresh():
        net = Net()
        return net, optimizer(net, GradVac(seed=5), weights_per="parameter")

    net, opt = fresh()
    for x in xs:
        opt.step(lambda x=x: net.losses(x))
    first, opt_a = fresh()
    for x in xs[:2]:
        opt_a.step(lambda x=x: first.losses(x))
    second, opt_b = fresh()
    second.load_state_dict(first.state_dict())
    opt_b.load_state_dict(copy.deepcopy(opt_a.state_dict()))
    for x in xs[2:]:
        opt_b.step(lambda x=x: second.losses(x))
    assert all(map(torch.equal, net.parameters(), second.parameters()))


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Inverse(), {"sharpness": SAM(aggregate="second")}, "sharpness must aggregate"),
        (Relative(), {"sharpness": SAM(aggregate="each")}, "sharpness must aggregate"),
        (Largest(), {"sharpness": SAM(aggregate="each")}, "sharpness must aggregate"),
        (Inverse(), {"weights_every": 2}, "weights_every must be 1 with Inverse"),
        (Largest(), {"weights_every": 2}, "weights_every must be 1 with Largest"),
        (Mean(), {"weights_every": 2, "weights_per": "parameter"}, "weights_every must be 1"),
        (Inverse(), {"weights_per": "parameter"}, "weights_per must be 'model' with Inverse"),
        (Relative(), {"weights_per": "group"}, "weights_per must be 'model' with Relative"),
        (Largest(), {"weights_per": "group"}, "weights_per must be 'model' with Largest"),
        (Inverse(), {"jacobian": Batched()}, "jacobian must be 'sequential' with Inverse"),
        (Mean(), {"weights_per": "layer"}, "model must be given"),
        (Mean(), {"weights_per": "tensor"}, "weights_per must be one of"),
    ],
)
def test_what_does_not_go_together(method, options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        optimizer(net, method, **options)


def test_features_are_no_parameters():
    net = Net()
    at = Representation(net.trunk)
    for method in (Inverse(), Momentum()):
        with pytest.raises(ValueError, match="jacobian must not be Representation"):
            optimizer(net, method, jacobian=at)
    with pytest.raises(ValueError, match="jacobian must not be Representation with weights_per"):
        optimizer(net, Mean(), jacobian=at, weights_per="parameter")


def test_lists_of_parameters_are_checked():
    net = Net()
    weight = net.trunk[0].weight
    for per, message in (
        ([[weight], [weight]], "every parameter once"),
        ([[torch.zeros(3)]], r"weights_per\[0\] must list parameters"),
        ([weight], r"weights_per\[0\] must list parameters"),
        ([], "weights_per must be one of"),
        (3, "weights_per must be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer(net, Mean(), weights_per=per)


def test_losses_must_be_given_to_aggregate(rng):
    jac = torch.from_numpy(rng.standard_normal((3, 8)))
    losses = torch.tensor([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="losses must be given with Inverse"):
        flatmtl.aggregate(jac, Inverse())
    with pytest.raises(ValueError, match="losses must be given with Relative"):
        flatmtl.aggregate(jac, Relative())
    close(flatmtl.aggregate(jac, Inverse(), losses=losses), (jac / losses[:, None].double()).sum(0))
    n = jac.norm(dim=1)
    want = (jac * (losses.double() / n)[:, None]).sum(0)
    close(flatmtl.aggregate(jac, Relative(), losses=losses), want)
    with pytest.raises(TypeError, match="weighting must work on Gram matrices"):
        CRMOGM(Inverse())


def test_what_tasks_reach_may_change_between_one_pass_steps(rng):
    """A layer that joins later, one that becomes shared, and one whose owner is missing."""
    net, x = Net(), batch(rng)
    extra = nn.Linear(5, 4).double()

    def closure(late: bool, third: bool):
        h = net.trunk(x).tanh()
        z = (extra(x) + h).tanh() if late else h
        a = net.heads[0](z).square().mean() + 1
        b = net.heads[1](h).sub(1).square().mean() + 1
        return [a, b, net.heads[2](z).sub(2).square().mean() + 1 if third else None]

    base = torch.optim.SGD([*extra.parameters(), *net.parameters()], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Inverse())
    for late, third in ((False, False), (True, False), (True, True), (False, True)):
        opt.step(lambda late=late, third=third: closure(late, third))
        total = sum(loss.log() for loss in closure(late, third) if loss is not None)
        params = [*extra.parameters(), *net.parameters()]
        for p, g in zip(params, torch.autograd.grad(total, params, allow_unused=True), strict=True):
            assert (p.grad is None) == (g is None)
            if g is not None:
                close(p.grad, g)


def test_a_layer_of_a_missing_task_that_another_reaches_is_an_error_not_a_lost_gradient(rng):
    net, x = Net(), batch(rng)
    extra = nn.Linear(5, 4).double()

    def closure(step: int):
        h = net.trunk(x).tanh()
        z = (extra(x) + h).tanh()
        a = net.heads[0](z if step == 1 else h).square().mean()
        return [a, None if step == 1 else net.heads[1](z).square().mean()]

    base = torch.optim.SGD([*extra.parameters(), *net.parameters()], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Count())
    opt.step(lambda: closure(0))
    with pytest.raises(ValueError, match="must keep one role"):
        opt.step(lambda: closure(1))


@pytest.mark.parametrize("method", [Inverse(), Relative(), Largest()])
def test_torchjd_takes_gramians_alone(method):
    with pytest.raises(TypeError, match="weighting must work on Gram matrices, got"):
        flatmtl.interchange.to_torchjd(method)


# ---------------------------------------------------------------- what a review found


@pytest.mark.parametrize(
    "sharpness",
    [SAM(0.05), SAM(0.05, aggregate="direct"), flatmtl.SAMO(0.05), flatmtl.MAML(0.01)],
)
def test_a_finite_loss_with_a_gradient_that_is_not(sharpness, rng):
    """sqrt at 0: the loss is finite, its gradient is not."""
    net, x = Net(), batch(rng)

    def closure():
        a, b, _ = net.losses(x)
        zero = (net.trunk(x) - net.trunk(x).detach()).square().sum()
        return [a, b, zero.sqrt() + 1.0]

    opt = optimizer(net, Count(), sharpness=sharpness, nonfinite="mask")
    opt.step(closure)
    assert all(p.isfinite().all() for p in net.parameters())


def test_samo_weighs_own_parameters_too(rng):
    x = batch(rng)
    for method in (Inverse, Relative):
        heads = []
        for sharpness in (None, flatmtl.SAMO(1e-9)):
            net = Net()
            opt = optimizer(net, method(), sharpness=sharpness)
            opt.backward(lambda net=net: net.losses(x))
            heads.append(torch.cat([flat(net.own(k)) for k in range(3)]))
        torch.testing.assert_close(*heads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", ["layer", "parameter", "lists"])
@pytest.mark.parametrize("make", [GradVac, NashMTL, MGDA])
def test_groups_keep_their_state_when_more_is_shared(how, make, rng):
    net, x = Net(), batch(rng)
    extra = nn.Linear(5, 4).double()

    def closure(late: bool):
        h = net.trunk(x).tanh()
        z = (extra(x) + h).tanh()
        a, b = net.heads[0](h).square().mean(), net.heads[1](z).sub(1).square().mean()
        return [a, b, net.heads[2](z).sub(2).square().mean() if late else None]

    whole = nn.ModuleList([extra, net])
    base = torch.optim.SGD(whole.parameters(), lr=0.01)
    per = [[extra.weight], list(net.trunk.parameters())] if how == "lists" else how
    opt = MultiTaskOptimizer(base, weighting=make(), weights_per=per, model=whole, history=4)
    for late in (False, True, True):
        opt.step(lambda late=late: closure(late))
    assert all(p.isfinite().all() for p in whole.parameters())
    assert torch.from_numpy(opt.history.arrays()["weights"][1:]).isfinite().all()


def test_a_first_group_without_parameters():
    net = Net()
    base = torch.optim.SGD([{"params": []}, {"params": net.parameters()}], lr=0.1)
    MultiTaskOptimizer(base, weighting=Mean())
    MultiTaskOptimizer(base, weighting=Learned(3))


def test_an_optimizer_that_was_not_made_leaves_the_base_as_it_was():
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="shared"):
        MultiTaskOptimizer(base, weighting=Learned(3), shared=[torch.zeros(1)])
    assert len(base.param_groups) == 1


def test_zero_grad_reaches_what_is_learned(rng):
    net, x = Net(), batch(rng)
    method = Learned(3)
    opt = optimizer(net, method)
    opt.backward(lambda: net.losses(x))
    assert method.s.grad.any()
    opt.zero_grad(set_to_none=False)
    assert not method.s.grad.any()


def test_what_is_learned_goes_down_also_where_the_base_goes_up():
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, maximize=True)
    opt = MultiTaskOptimizer(base, weighting=Learned(3))
    assert [group["maximize"] for group in opt.param_groups] == [True, False]


def test_grouped_weights_and_the_pair_of_aggregates():
    net = Net()
    for how in ("second", "each"):
        with pytest.raises(ValueError, match="sharpness must aggregate"):
            optimizer(net, Mean(), weights_per="parameter", sharpness=SAM(0.1, aggregate=how))


def test_looking_back_without_a_model_warns_of_statistics(rng):
    net, x = Net(norm=True), batch(rng)
    opt = optimizer(net, Back())
    with pytest.warns(UserWarning, match="running statistics in the looking-back passes"):
        opt.step(lambda: net.losses(x))


def test_a_dropped_sharp_step_is_not_committed_by_a_plain_one(rng):
    net, x = Net(), batch(rng)
    opt = optimizer(net, Momentum(), sharpness=SAM(0.1))
    opt.backward(lambda: net.losses(x))
    opt.zero_grad()
    opt.param_groups[0]["rho"] = 0.0
    opt.step(lambda: net.losses(x))
    assert not opt.flat_weighting.state_dict()["y"].any()
