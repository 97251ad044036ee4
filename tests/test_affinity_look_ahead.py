"""Looks ahead in the company of dropout, loss scales, autocast, momentum: the step is all that differs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from affinity_nets import Mixed, batches
from affinity_runs import KINDS, close, optimizer, run, step
from oracle_affinity import Quadratics, flat, real_steps, stepped
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flatmtl import AffinityProbe, MultiTaskOptimizer

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
