"""FS-MTL against its formulas, on quadratics where every gradient is known (float64, 1e-12)."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from quadratics import Problem, snapshot, untouched, values

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import MGDA, Mean, PCGrad, Sum

LR = 0.01
TOLERANCE = {"mean": 1e-12, "sum": 1e-12, "pcgrad": 1e-11, "mgda": 1e-6}


def methods(rng, tasks: int) -> dict:
    """name -> (weighting, its formula); MGDA's ridge moves its weights by up to about 1e-8."""
    order = np.stack([rng.permutation(tasks) for _ in range(tasks)])
    return {
        "mean": (Mean(), oracles.mean),
        "sum": (Sum(), lambda jac: jac.sum(axis=0)),
        "pcgrad": (PCGrad(order=torch.from_numpy(order)), oracles.pcgrad_sum(order)),
        "mgda": (MGDA(), oracles.mgda),
    }


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (a, b)


def check_step(
    problem: Problem,
    weighting,
    aggregate,
    sharpness,
    tolerance: float,
    closure=None,
    rho: float | None = None,
    **options,
) -> MultiTaskOptimizer:
    """One step: .grad, the losses returned and the parameters, all against numpy."""
    opt = MultiTaskOptimizer(
        torch.optim.SGD(problem.parameters(), lr=LR), weighting=weighting, sharpness=sharpness,
        **options,
    )  # fmt: skip
    shared, heads = problem.shared_values(), problem.head_values()
    rho = rho if rho is not None else (sharpness.rho if sharpness else None)
    d, own = oracles.fs_mtl_gradients(
        problem.tasks, shared, heads, aggregate, rho,
        adaptive=bool(sharpness and sharpness.adaptive), eta=sharpness.eta if sharpness else 0.0,
    )  # fmt: skip
    clean = [q.loss(np.concatenate([shared, h])) for q, h in zip(problem.tasks, heads)]
    losses = opt.step(closure or problem.losses)
    np.testing.assert_allclose([float(x) for x in losses], clean, rtol=1e-12)
    assert not any(x.requires_grad for x in losses)
    close(problem.shared_grad(), d, tolerance)
    close(problem.shared_values(), shared - LR * d, tolerance)
    for i in range(len(problem.heads)):
        close(problem.head_grads()[i], own[i], 1e-12)
        close(values([problem.heads[i]]), heads[i] - LR * own[i], 1e-12)
    return opt


def partial(problem: Problem):
    """A closure that runs one task alone when asked to, and keeps count."""

    def closure(tasks=None):
        closure.calls.append(tasks)
        return problem.losses(tasks)

    closure.calls = []
    return closure


def test_the_problems_conflict(rng):
    """Otherwise PCGrad would be a sum here, and every order the same."""
    conflicts, results = 0, []
    for _ in range(10):
        problem = Problem(rng, 3)
        x, n = problem.shared_values(), 7
        g = [q.gradient(np.append(x, h))[:n] for q, h in zip(problem.tasks, problem.head_values())]
        conflicts += (oracles.gram(np.stack(g)) < 0).any()
    assert conflicts >= 3
    state = rng.bit_generator.state
    for seed in (4, 5):
        rng.bit_generator.state = state
        problem = Problem(rng, 6, shared=4)
        opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR),
                                 weighting=PCGrad(seed=seed), sharpness=SAM(0.1))  # fmt: skip
        opt.step(problem.losses)
        results.append(problem.shared_values())
    assert not np.array_equal(*results)


# ---- the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("rho", [None, 0.05, 1.5])
def test_step(name, tasks, rho, rng):
    weighting, aggregate = methods(rng, tasks)[name]
    sharpness = None if rho is None else SAM(rho)
    check_step(Problem(rng, tasks), weighting, aggregate, sharpness, TOLERANCE[name])


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_adaptive_step(name, eta, rng):
    weighting, aggregate = methods(rng, 3)[name]
    sharpness = SAM(0.7, adaptive=True, eta=eta)
    check_step(Problem(rng, 3), weighting, aggregate, sharpness, TOLERANCE[name])


@pytest.mark.parametrize("name", TOLERANCE)
def test_scales_six_decades_apart(name, rng):
    weighting, aggregate = methods(rng, 4)[name]
    problem = Problem(rng, 4, scale=10 ** rng.uniform(-1.5, 1.5, 4))
    check_step(problem, weighting, aggregate, SAM(0.05), 10 * TOLERANCE[name])


def test_closure_with_tasks(rng):
    """Asked for one task, only that one runs; the numbers are the same."""
    weighting, aggregate = methods(rng, 3)["pcgrad"]
    problem = Problem(rng, 3)
    closure = partial(problem)
    check_step(problem, weighting, aggregate, SAM(0.05), 1e-11, closure)
    assert closure.calls[0] is None and closure.calls[1:] == [[0], [1], [2]]


def test_closure_without_tasks_runs_all(rng):
    problem = Problem(rng, 3)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return problem.losses()

    check_step(problem, Mean(), oracles.mean, SAM(0.05), 1e-12, closure)
    assert calls == [True] * 4


def test_several_steps(rng):
    """Ten steps in a row: nothing is left over from one to the next."""
    weighting, aggregate = methods(rng, 3)["pcgrad"]
    problem = Problem(rng, 3)
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=weighting,
                             sharpness=SAM(0.1))  # fmt: skip
    shared, heads = problem.shared_values(), problem.head_values()
    for _ in range(10):
        opt.step(problem.losses)
        d, own = oracles.fs_mtl_gradients(problem.tasks, shared, heads, aggregate, 0.1)
        shared = shared - LR * d
        heads = [h - LR * g for h, g in zip(heads, own)]
    close(problem.shared_values(), shared, 1e-9)
    for h, expected in zip(problem.heads, heads):
        close(values([h]), expected, 1e-9)


def test_step_on_the_device(device, rng):
    weighting, aggregate = methods(rng, 3)["pcgrad"]
    check_step(Problem(rng, 3, device=device), weighting, aggregate, SAM(0.3), 1e-11)


# ---- separate norms, rho ---------------------------------------------------------------------


def test_shared_and_head_have_norms_of_their_own(rng):
    """By hand for one task: eps is rho long in the shared part and rho long in the head."""
    problem = Problem(rng, 2)
    seen = []

    def closure(tasks=None):
        if tasks is not None:
            seen.append((tasks[0], problem.shared_values(), problem.head_values()))
        return problem.losses(tasks)

    shared, heads = problem.shared_values(), problem.head_values()
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.25))  # fmt: skip
    opt.step(closure)
    assert [s[0] for s in seen] == [0, 1]
    for i, at_shared, at_heads in seen:
        assert np.linalg.norm(at_shared - shared) == pytest.approx(0.25, rel=1e-12)
        assert np.linalg.norm(at_heads[i] - heads[i]) == pytest.approx(0.25, rel=1e-12)
        other = 1 - i  # the other head stays where it was, to the bit
        assert np.array_equal(at_heads[other], heads[other])


def test_rho_per_group_is_live(rng):
    """Shared and head groups with radii of their own, edited between steps."""
    problem = Problem(rng, 3)
    base = torch.optim.SGD(
        [{"params": problem.shared, "rho": 0.4}, {"params": problem.heads}], lr=LR
    )
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAM(0.05))
    assert [g["rho"] for g in opt.param_groups] == [0.4, 0.05]
    for rho, rho_head in [(0.4, 0.05), (0.1, 0.9), (0.0, 0.5), (0.3, 0.0)]:
        opt.param_groups[0]["rho"], base.param_groups[1]["rho"] = rho, rho_head
        d, own = oracles.fs_mtl_gradients(
            problem.tasks,
            problem.shared_values(),
            problem.head_values(),
            oracles.mean,
            rho,
            rho_head,
        )
        opt.step(problem.losses)
        close(problem.shared_grad(), d, 1e-12)
        for i in range(3):
            close(problem.head_grads()[i], own[i], 1e-12)


def test_shared_norm_is_over_all_groups(rng):
    """Two groups of shared parameters: one norm, each group's own radius."""
    problem = Problem(rng, 2, head=0)
    base = torch.optim.SGD(
        [{"params": problem.shared[:1], "rho": 0.2}, {"params": problem.shared[1:], "rho": 0.6}],
        lr=LR,
    )
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAM())
    x, cut = problem.shared_values(), problem.shared[0].numel()
    radius = np.where(np.arange(len(x)) < cut, 0.2, 0.6)
    expected = []
    for q in problem.tasks:
        g = q.gradient(x)
        expected.append(q.gradient(x + radius * g / np.linalg.norm(g)))
    opt.step(problem.losses)
    close(problem.shared_grad(), np.mean(expected, axis=0), 1e-12)


@pytest.mark.parametrize("name", ["mean", "sum", "pcgrad", "pcgrad_random", "mgda"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_is_the_plain_method_to_the_bit(name, adaptive, rng):
    """All flat rows vanish: they add nothing, no NaN, and draw no numbers of the first stream."""
    state = rng.bit_generator.state
    results = []
    for sharpness in (None, SAM(0.0, adaptive=adaptive)):
        rng.bit_generator.state = state
        # more tasks than shared parameters: conflicts, so that the order of PCGrad matters
        problem = Problem(rng, 6, shared=4)
        weighting = PCGrad(seed=4) if name == "pcgrad_random" else methods(rng, 6)[name][0]
        opt = MultiTaskOptimizer(torch.optim.Adam(problem.parameters(), lr=LR), weighting=weighting,
                                 sharpness=sharpness)  # fmt: skip
        for _ in range(5):
            opt.step(problem.losses)
        results.append([p.detach().clone() for p in problem.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.isfinite(a).all() for a in results[0])


# ---- special cases ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "sum", "pcgrad", "mgda"])
def test_one_task_is_plain_sam(name, rng):
    """T = 1: everything reached is shared, one norm over all, the step of davda54's SAM."""
    problem = Problem(rng, 1)
    x = np.concatenate([problem.shared_values(), problem.head_values()[0]])
    weighting = methods(rng, 1)[name][0]
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=weighting,
                             sharpness=SAM(0.3))  # fmt: skip
    for _ in range(5):
        x = oracles.sam_step(problem.tasks[0], x, 0.3, LR)
        opt.step(problem.losses)
    close(values(problem.parameters()), x, 1e-11)


def plain_sam_loop(net, data, base, rho: float) -> None:
    """davda54's two steps, with the weights put back by subtraction replaced by a saved copy."""
    x, y = data
    params = list(net.parameters())
    loss = torch.nn.functional.mse_loss(net(x), y)
    grads = torch.autograd.grad(loss, params)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads):
            p.add_(rho / norm * g)
    loss = torch.nn.functional.mse_loss(net(x), y)
    grads = torch.autograd.grad(loss, params)
    with torch.no_grad():
        for p, s, g in zip(params, saved, grads):
            p.copy_(s)
            p.grad = g
    base.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_one_task_is_plain_sam_on_a_network(kind, rng):
    """The same for a small network that is no quadratic, against a loop in plain torch."""
    data = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)

    def network():
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ).double()

    first, second = network(), network()
    base = kind(second.parameters(), lr=0.01)
    opt = MultiTaskOptimizer(kind(first.parameters(), lr=0.01), weighting=Sum(), sharpness=SAM(0.1))
    for _ in range(5):
        opt.step(lambda: [torch.nn.functional.mse_loss(first(data[0]), data[1])])
        plain_sam_loop(second, data, base, 0.1)
    for p, q in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_linear_weighting_is_direct_aggregation(rng):
    """Mean(losses) + Mean(flats) = Mean(g_SAM)."""
    problem = Problem(rng, 4)
    x, heads = problem.shared_values(), problem.head_values()
    n = len(x)
    direct = []
    for q, h in zip(problem.tasks, heads):
        g = q.gradient(np.concatenate([x, h]))
        eps = np.concatenate([0.2 * part / np.linalg.norm(part) for part in (g[:n], g[n:])])
        direct.append((g + q.a.T @ (q.a @ eps))[:n])
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.2))  # fmt: skip
    opt.step(problem.losses)
    close(problem.shared_grad(), np.mean(direct, axis=0), 1e-12)


def test_nonlinear_weighting_is_not(rng):
    """PCGrad on losses and flats apart differs from PCGrad on g_SAM: decomposed it is."""
    order = np.array([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
    for _ in range(20):
        problem = Problem(rng, 3)
        x, heads = problem.shared_values(), problem.head_values()
        aggregate = oracles.pcgrad_sum(order)
        d, _ = oracles.fs_mtl_gradients(problem.tasks, x, heads, aggregate, 0.5)
        sam = [oracles.fs_mtl_gradients([q], x, [h], oracles.mean, 0.5)[0]
               for q, h in zip(problem.tasks, heads)]  # fmt: skip
        if np.linalg.norm(d - aggregate(np.stack(sam))) > 1e-3 * np.linalg.norm(d):
            check_step(problem, PCGrad(order=torch.from_numpy(order)), aggregate, SAM(0.5), 1e-11)
            return
    raise AssertionError("twenty problems without a conflict")


@pytest.mark.parametrize("name", TOLERANCE)
def test_task_with_zero_gradient(name, rng):
    """It adds nothing, is not perturbed, and poisons nobody; the other tasks go on."""
    weighting, aggregate = methods(rng, 3)[name]
    problem = Problem(rng, 3)
    problem.tasks[1] = oracles.Quadratic(problem.tasks[1].a * 0, problem.tasks[1].b * 0)
    problem.a[1].zero_()
    problem.b[1].zero_()
    shared, heads = problem.shared_values(), problem.head_values()
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=weighting,
                             sharpness=SAM(0.3))  # fmt: skip
    opt.step(problem.losses)
    d, own = oracles.fs_mtl_gradients(problem.tasks, shared, heads, aggregate, 0.3)
    close(problem.shared_grad(), d, TOLERANCE[name])
    assert np.array_equal(values([problem.heads[1]]), heads[1])
    for i in (0, 2):
        close(problem.head_grads()[i], own[i], 1e-12)
    status = opt.last_status()
    assert status["loss"].inactive_task and status["flat"].inactive_task
    assert all(status["finite"].values())


@pytest.mark.parametrize("name", TOLERANCE)
def test_all_gradients_zero(name, rng):
    problem = Problem(rng, 2)
    for a, b in zip(problem.a, problem.b):
        a.zero_(), b.zero_()
    before = snapshot(problem.parameters())
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR),
                             weighting=methods(rng, 2)[name][0], sharpness=SAM(0.3))  # fmt: skip
    opt.step(problem.losses)
    assert untouched(problem.parameters(), before)
    assert opt.last_status()["loss"].no_active_task


def test_opposite_gradients(rng):
    problem = Problem(rng, 2, head=0)
    problem.tasks[1] = problem.tasks[0]
    problem.a[1] = problem.a[0]
    problem.b[1] = problem.b[0]
    before = problem.shared_values()
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=PCGrad())
    opt.step(lambda: [problem.loss(0), -problem.loss(0)])
    close(problem.shared_values(), before, 1e-13)


def test_duplicate_tasks(rng):
    """Three copies of one task under Mean: the step of that task alone."""
    problem = Problem(rng, 3, head=0)
    for i in (1, 2):
        problem.tasks[i], problem.a[i], problem.b[i] = (
            problem.tasks[0], problem.a[0], problem.b[0])  # fmt: skip
    expected = oracles.sam_step(problem.tasks[0], problem.shared_values(), 0.2, LR)
    for weighting in (Mean(), MGDA()):
        x = problem.shared_values()
        expected = oracles.sam_step(problem.tasks[0], x, 0.2, LR)
        opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=weighting,
                                 sharpness=SAM(0.2))  # fmt: skip
        opt.step(problem.losses)
        close(problem.shared_values(), expected, 1e-9)


@pytest.mark.parametrize("name", ["mean", "mgda"])
def test_order_of_the_tasks_does_not_matter(name, rng):
    problem = Problem(rng, 4)
    start = [p.detach().clone() for p in problem.parameters()]
    grads = []
    for permutation in ([0, 1, 2, 3], [2, 0, 3, 1]):
        with torch.no_grad():
            for p, s in zip(problem.parameters(), start):
                p.copy_(s)
        opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR),
                                 weighting=methods(rng, 4)[name][0], sharpness=SAM(0.2))  # fmt: skip
        opt.step(lambda p=permutation: [problem.loss(i) for i in p])
        grads.append(problem.shared_grad())
    close(grads[0], grads[1], TOLERANCE[name])


def test_more_tasks_than_parameters(rng):
    weighting, aggregate = methods(rng, 8)["pcgrad"]
    check_step(Problem(rng, 8, shared=3), weighting, aggregate, SAM(0.1), 1e-10)


def test_no_heads(rng):
    weighting, aggregate = methods(rng, 3)["mgda"]
    check_step(Problem(rng, 3, head=0), weighting, aggregate, SAM(0.2), TOLERANCE["mgda"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision(dtype, tolerance, rng):
    """Shared parameters in float32 and bfloat16: the same step up to their rounding."""
    problem = Problem(rng, 3, dtype=dtype)
    problem.tasks = [oracles.Quadratic(a.double().numpy(), b.double().numpy())
                     for a, b in zip(problem.a, problem.b)]  # fmt: skip
    d, own = oracles.fs_mtl_gradients(
        problem.tasks, problem.shared_values(), problem.head_values(), oracles.mean, 0.5
    )
    opt = MultiTaskOptimizer(torch.optim.SGD(problem.parameters(), lr=LR), weighting=Mean(),
                             sharpness=SAM(0.5))  # fmt: skip
    opt.step(problem.losses)
    grad = torch.cat([p.grad.reshape(-1) for p in problem.shared])
    assert grad.dtype == dtype
    close(grad.double().numpy(), d, tolerance)
    close(problem.heads[0].grad.double().numpy(), own[0], tolerance)
