"""AffinityProbe where something else is going on: dropout, loss scales, schedules, changes of the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from affinity_nets import Mixed, batches
from affinity_runs import KINDS, close, optimizer, run, step
from oracle_affinity import Quadratics, flat, real_steps, stepped, total
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import FairGrad, PCGrad

BOTH = ["plain", "pcgrad"]


@pytest.mark.parametrize(
    ("kind", "micro"), [("plain", 1), ("pcgrad", 1), ("pcgrad", 2), ("sam-decomposed", 2)]
)
def test_looks_ahead_see_the_same_masks(kind, micro, rng):
    """Dropout and noise as in the clean pass, BatchNorm on the batch: the step is all that differs."""
    seed = int(rng.integers(2**31))
    torch.manual_seed(seed)
    model = Mixed().double()
    data = [tuple(x.double() for x in b) for b in batches("mixed", seed, micro)]
    shared = list(model.trunk.parameters())
    params = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(kind, params, 0.05, wrap={"model": model})
    probe = AffinityProbe(opt, every=1, model=model if kind == "plain" else None)
    twin, state = copy.deepcopy(model), torch.get_rng_state()

    def again():
        torch.set_rng_state(state)
        parts = [twin.losses(batch) for batch in data]
        return [sum(part) for part in zip(*parts)]

    expected = stepped(again, list(twin.trunk.parameters()), 0.05)
    torch.set_rng_state(state)
    closures = [lambda batch=batch: model.losses(batch) for batch in data]
    step(probe, opt, closures if micro > 1 else closures[0])
    close(probe.record().matrix(), expected, 1e-12)
    assert len(shared) == 8


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
def test_looks_ahead_that_draw_more(kind, rng):
    """The next step draws as it would have, however many numbers a look-ahead took."""
    problem = Quadratics(rng)
    opt = optimizer(kind, problem.parameters(), problem.safe_lr())
    probe, drawn = AffinityProbe(opt, every=2), []

    def closure():
        drawn.append(torch.rand(()).item())
        if not torch.is_grad_enabled():
            torch.rand(len(drawn))
        return problem.losses()

    passes = 4 if kind.startswith("sam") else 1  # of a step, in which these numbers are drawn
    expected = torch.rand(2 * passes, generator=torch.Generator().manual_seed(3)).tolist()
    torch.manual_seed(3)
    step(probe, opt, closure)
    assert drawn[1:4] == drawn[:1] * 3
    step(probe, opt, closure)
    assert [drawn[0], *drawn[4:]] == expected


SCALED = [{"mode": "first_order"}, {"mode": "first_order", "momentum": True},
          {"groups": [(0, 1)]}, {"look_ahead": "optimizer", "groups": [(0, 1)]}]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SCALED, ids=["first_order", "etap", "sgd", "optimizer"])
def test_a_loss_scale_changes_nothing(kind, how, rng):
    """A power of two: what is measured has the same bits, or nearly."""
    problem, seen = Quadratics(rng, dtype=torch.float32), []
    lr = problem.safe_lr()
    start = [p.detach().clone() for p in problem.parameters()]
    for scale in (None, 2.0**5, 2.0**14):
        with torch.no_grad():
            for p, old in zip(problem.parameters(), start):
                p.copy_(old)
        opt = optimizer(kind, problem.parameters(), lr, weight_decay=0.1, momentum=0.5)
        for p in problem.parameters():
            opt.state[p]["momentum_buffer"] = torch.ones_like(p)
        probe = AffinityProbe(opt, every=1, **how)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        if scaler is None:
            step(probe, opt, problem.losses)
        elif kind == "plain":
            probe(problem.losses, scaler=scaler)
        else:
            opt.backward(problem.losses, scaler=scaler)
            scaler.step(opt)
        record = probe.record()
        seen.append(np.stack([record.matrix(q) for q in record.quantities]))
    for other in seen[1:]:
        close(other, seen[0], 1e-6 * np.abs(seen[0]).max(axis=(1, 2), keepdims=True), 1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_a_schedule_that_begins_at_zero(kind, rng):
    """A warm-up's first step: nothing moves, and nothing can be divided by its learning rate."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.1)
    opt = optimizer(kind, problem.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: n / 2)
    for mode in ("exact", "first_order"):
        probe = AffinityProbe(opt, mode=mode, every=1)
        opt.param_groups[0]["lr"] = 0.0
        step(probe, opt, problem.losses)
        opt.param_groups[0]["lr"] = lr
        z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
        step(probe, opt, problem.losses)
        record = probe.record()
        close(record.matrix("affinity_per_lr"), z / lr, 1e-10 / lr)
        assert (record.counts("affinity_per_lr") == 1).all()
        assert np.isfinite(record.matrix()).all()
        probe.detach() if kind != "plain" else None
    assert schedule is not None


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_a_learning_rate_in_a_tensor(kind, mode, rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), torch.tensor(lr, dtype=torch.float64))
    probe = AffinityProbe(opt, mode=mode, every=1)
    z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
    step(probe, opt, problem.losses)
    close(probe.record().matrix(), z, 1e-11)
    close(probe.record().matrix("affinity_per_lr"), z / lr, 1e-11 / lr)


def test_several_probes_of_one_optimizer(rng):
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.1)
    for sharpness in (None, SAM(0.05)):
        base = torch.optim.SGD(problem.parameters(), lr=lr)
        opt = MultiTaskOptimizer(base, weighting=PCGrad(), sharpness=sharpness)
        probes = [AffinityProbe(opt, every=2), AffinityProbe(opt, mode="first_order", every=1),
                  AffinityProbe(opt, every=3, lr=lr / 3, groups=[(0, 2)])]  # fmt: skip
        seen = run(
            problem,
            None,
            opt,
            lambda: (problem.exact(lr), problem.first_order(lr), problem.exact(lr / 3)),
            4,
        )
        for k, every in enumerate((2, 1, 3)):
            expected = np.mean([s[k] for s in seen[::every]], axis=0)
            close(probes[k].record().matrix(), expected, 1e-11)
        probes[0].detach()
        opt.step(problem.losses)
        assert [p.steps for p in probes] == [4, 5, 5]


@pytest.mark.parametrize("kind", [*BOTH, "sam-direct"])
def test_a_gradient_inside_the_forward_pass(kind, rng):
    """A closure that differentiates on its own (a gradient penalty), in grad mode of its own making."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.05)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)

    def closure():
        with torch.enable_grad():
            x = torch.ones(2, dtype=torch.float64, requires_grad=True)
            inner = (x * problem.shared[0][:1]).square().sum()
            (g,) = torch.autograd.grad(inner, x, create_graph=True)  # 2 s²
        return [loss + 0.0 * g.sum() for loss in problem.losses()]

    z = problem.exact(lr)
    step(probe, opt, closure)
    close(probe.record().matrix(), z, 1e-11)


@pytest.mark.parametrize("kind", BOTH)
def test_autocast_around_the_whole_step(kind, rng):
    """Weights that autocast keeps in a lower precision are not those of the parameters looked at."""
    torch.manual_seed(int(rng.integers(2**31)))
    found = []
    trunk, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    start = copy.deepcopy([trunk.state_dict(), heads.state_dict()])

    def losses():
        h = torch.tanh(trunk(x))
        return [(head(h)[:, 0].float() - y[:, k]).square().mean() for k, head in enumerate(heads)]

    def inside():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses()

    for outer in (False, True):
        trunk.load_state_dict(start[0])
        heads.load_state_dict(start[1])
        opt = optimizer(kind, [*trunk.parameters(), *heads.parameters()], 0.5)
        probe = AffinityProbe(opt, every=1)
        if outer:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                opt.step(losses) if kind != "plain" else probe(losses)
        else:
            opt.step(inside) if kind != "plain" else probe(inside)
        found.append(probe.record().matrix())
    assert np.array_equal(found[0], found[1])
    assert np.abs(np.diag(found[0])).min() > 1e-4  # the steps were made


@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_rows_in_bfloat16(mode, rng):
    problem = Quadratics(rng, dtype=torch.float32)
    lr = problem.safe_lr()
    opt = optimizer("pcgrad", problem.parameters(), lr, wrap={"row_dtype": torch.bfloat16})
    probe = AffinityProbe(opt, mode=mode, every=1, momentum=mode == "first_order")
    z = problem.exact(lr) if mode == "exact" else problem.first_order(lr)
    g = problem.grads()
    size = lr * np.outer(np.linalg.norm(g, axis=1) / problem.values(), np.linalg.norm(g, axis=1))
    step(probe, opt, problem.losses)
    close(probe.record().matrix(), z, 0.02 * size)


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
def test_a_task_that_shares_nothing(kind, rng):
    """Only its own head: its step moves nothing that is shared, and no other step moves its loss."""
    problem = Quadratics(rng, 3)
    lr = problem.safe_lr()
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    z = problem.exact(lr)
    z[2], z[:, 2] = 0, 0
    step(probe, opt, lambda: [*problem.losses()[:2], problem.heads[2].square().sum() + 1])
    record = probe.record()
    close(record.matrix(), z, 1e-11)
    assert (record.matrix()[2] == 0).all()
    assert (record.matrix()[:, 2] == 0).all()
    assert (record.counts("cosine")[:2, :2] == 1).all()


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_what_a_task_does_not_reach_stays(kind, base, rng):
    """Shared by two of three tasks: a step on the third leaves it, weight decay and momentum too."""
    problem, narrow = Quadratics(rng, 3), Quadratics(rng, 1, ((3,),), head=0)
    narrow.shared = problem.shared[:1]
    options = {"weight_decay": 0.3, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    lr = min(problem.safe_lr(0.05), narrow.safe_lr(0.05))
    opt = optimizer(kind, problem.parameters()[:-1], lr, base, **options)
    probe = AffinityProbe(opt, every=1, look_ahead="optimizer", groups=[(1, 2), (0, 1)])
    inner = opt.base_optimizer if isinstance(opt, MultiTaskOptimizer) else opt
    expected = []
    for _ in range(3):
        g = problem.grads()
        g[2] = np.concatenate([narrow.grads()[0], np.zeros(4)])
        g = np.concatenate([g, [g[1] + g[2], g[0] + g[1]]])
        steps = real_steps(inner, problem.shared, g)
        alone = real_steps(inner, narrow.shared, narrow.grads())
        steps[2] = np.concatenate([alone[0], np.zeros(4)])
        z = problem.affinity(steps)
        z[2] = narrow.affinity(steps[:, :3])
        expected.append(z)
        step(probe, opt, lambda: [*problem.losses()[:2], narrow.loss(0)])
    z = np.mean(expected, axis=0)
    close(probe.record().matrix(), z[:, :3], 1e-11)
    close(probe.record().group_matrix(), z[:, 3:], 1e-11)


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_are_freed_and_frozen(kind, rng):
    """Steps are taken on what is trained at that moment."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.05)
    problem.shared[1].requires_grad_(False)
    opt = optimizer(kind, problem.parameters(), lr)
    probe = AffinityProbe(opt, every=1)
    first = problem.shared[0].numel()
    for k, count in enumerate((first, problem.size, 0)):
        problem.shared[1].requires_grad_(k > 0)
        problem.shared[0].requires_grad_(k < 2)
        moved = lr * problem.grads()
        moved[:, count or problem.size :] = 0
        moved[:, : first if count == 0 else 0] = 0
        before, z = flat(problem.shared), problem.affinity(moved)
        step(probe, opt, problem.losses)
        probe.end_epoch()
        close(probe.record().by_epoch()[k], z, 1e-11)
        frozen = slice(first, None) if k == 0 else slice(0, first if k == 2 else 0)
        assert (flat(problem.shared)[frozen] == before[frozen]).all()


@pytest.mark.parametrize("kind", BOTH)
def test_hooks_of_all_optimizers_see_one_step(kind, rng):
    """torch's global step hooks too: a profiler or a logger counts steps by them."""
    problem, calls = Quadratics(rng), []
    opt = optimizer(kind, problem.parameters(), problem.safe_lr())
    hooks = [
        hook(lambda other, *_: calls.append(type(other)))
        for hook in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    run(problem, lambda closure: closure(), opt, lambda: None, 1)
    usual = list(calls)
    calls.clear()
    run(problem, AffinityProbe(opt, every=1, look_ahead="optimizer"), opt, lambda: None, 1)
    for hook in hooks:
        hook.remove()
    assert calls == usual


@pytest.mark.parametrize("kind", ["plain", "pcgrad", "sam-decomposed"])
@pytest.mark.parametrize("look_ahead", ["sgd", "optimizer"])
def test_no_look_ahead_where_a_gradient_is_not_finite(kind, look_ahead, rng):
    """Nothing is run at parameters of NaN: a loss that checks its input would end the training."""
    problem = Quadratics(rng)
    opt = optimizer(kind, problem.parameters(), problem.safe_lr(), wrap={"nonfinite": "mask"})
    probe = AffinityProbe(opt, every=1, look_ahead=look_ahead, groups=[(0, 1), (1, 2)])
    seen = []

    def closure():
        seen.append(flat(problem.shared))
        losses = problem.losses()
        if losses[1].requires_grad:
            losses[1].register_hook(lambda g: g * float("nan"))
        return losses

    opt.step(closure) if kind != "plain" else probe(closure)
    assert np.isfinite(seen).all()
    assert (probe.record().counts() == [[1, 0, 1]] * 3).all()


class Replacing(nn.Module):
    """A buffer that every forward pass replaces, and one that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def losses(self, x):
        h = torch.tanh(self.trunk(x))
        self.count = self.count + 1
        self.mean.lerp_(h.detach().mean(0), 0.1)
        h = h * self.count  # a look-ahead counts as the clean pass did? it starts from its result
        return [(h - self.mean).square().mean() + 1, h.abs().mean() + 1]


@pytest.mark.parametrize("kind", BOTH)
def test_buffers_that_are_replaced(kind, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    model, x = Replacing(), torch.randn(5, 3)
    other = copy.deepcopy(model)
    for net, probing in ((model, True), (other, False)):
        opt = optimizer(kind, list(net.parameters()), 0.01, wrap={"model": net})
        probe = (
            AffinityProbe(opt, every=1, **({"model": net} if kind == "plain" else {}))
            if probing
            else None
        )
        for _ in range(3):
            step(probe or (lambda closure: closure()), opt, lambda net=net: net.losses(x))
    assert float(model.count) == 3
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


def test_between_two_solves_it_waits(rng):
    """weights_every: steps without gradients of single tasks are not measured; the next that has them is."""
    problem = Quadratics(rng)
    lr = problem.safe_lr(0.03)
    for mode in ("exact", "first_order"):
        base = torch.optim.SGD(problem.parameters(), lr=lr)
        opt = MultiTaskOptimizer(base, weighting=FairGrad(), weights_every=3)
        probe = AffinityProbe(opt, mode=mode, every=2)
        look = problem.exact if mode == "exact" else problem.first_order
        seen = run(problem, None, opt, lambda: look(lr), 7)
        assert (probe.steps, probe.measured) == (7, 3)
        close(probe.record().matrix(), np.mean(seen[::3], axis=0), 1e-11)


def test_a_failing_clean_pass_counts_for_nothing(rng):
    problem = Quadratics(rng)
    opt = optimizer("plain", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, every=1)

    def fails():
        raise KeyError("data")

    with pytest.raises(KeyError):
        probe(fails)
    assert (probe.steps, probe.measured) == (0, 0)
    total(probe(problem.losses)).backward()
    assert (probe.record().counts() == 1).all()


STATES = [
    ({}, {"mode": "first_order"}),
    ({}, {"mode": "first_order", "momentum": True}),  # as many quantities
    ({}, {"look_ahead": "optimizer"}),
    ({"groups": [(0, 1)]}, {}),
    ({"groups": [(0, 1)]}, {"groups": [(1, 2)]}),
]


@pytest.mark.parametrize(("saved", "loading"), STATES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_state_of_another_kind_of_probe(saved, loading, swap, rng):
    """Taken up, it would go on under wrong names."""
    first, second = (loading, saved) if swap else (saved, loading)
    problem = Quadratics(rng)
    opt = optimizer("plain", problem.parameters(), problem.safe_lr())
    probe = AffinityProbe(opt, every=1, **first)
    probe(problem.losses)
    with pytest.raises(ValueError, match="state"):
        AffinityProbe(opt, every=1, **second).load_state_dict(probe.state_dict())
