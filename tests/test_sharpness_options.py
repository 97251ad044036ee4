"""Every option of SAM and SAMO against closed forms: on quadratics g_SAM = g + A'A eps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import reference_fs_mtl as ref
import torch
from quadratics import Problem, snapshot, untouched, values
from torch import nn

import flatmtl
from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import (
    MGDA,
    CAGrad,
    Constant,
    FairGrad,
    Mean,
    NashMTL,
    PCGrad,
    Sum,
    Weighting,
)

LR = 0.01
TASKS = [1, 2, 3, 5]
MODES = ["decomposed", "direct", "second", "each"]
TOLERANCE = {"mean": 1e-11, "sum": 1e-11, "pcgrad": 1e-10, "mgda": 1e-6, "nash": 1e-6,
             "fairgrad": 1e-6, "cagrad": 1e-5}  # fmt: skip
task_counts = pytest.mark.parametrize("tasks", TASKS)
modes = pytest.mark.parametrize("mode", MODES)
all_methods = pytest.mark.parametrize("name", TOLERANCE)

Aggregate = Callable[[np.ndarray], np.ndarray]


def make(name: str, tasks: int) -> tuple[Weighting, Aggregate]:
    """A weighting and its formula. Two tasks leave PCGrad no choice of an order."""
    order = ref.cyclic_order(tasks)
    weighting, weights = {
        "mean": lambda: (Mean(), ref.mean),
        "sum": lambda: (Sum(), lambda gram: np.ones(len(gram))),
        "pcgrad": lambda: (
            PCGrad(order=None if tasks <= 2 else torch.from_numpy(order)), ref.pcgrad(order)
        ),
        "mgda": lambda: (MGDA(), ref.mgda),
        "nash": lambda: (NashMTL(), ref.nash),
        "fairgrad": lambda: (FairGrad(), ref.fairgrad),
        "cagrad": lambda: (CAGrad(), ref.cagrad),
    }[name]()  # fmt: skip
    if name == "pcgrad" and tasks <= 2:

        def weights(gram):
            return ref.pcgrad(ref.cyclic_order(len(gram)))(gram)

    return weighting, lambda rows: weights(rows @ rows.T) @ rows


class Module(nn.Module):
    """A problem with names: shared "trunk.weight" and "trunk.bias", "heads.i.weight" or ".bias_h"."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.trunk = nn.Module()
        self.trunk.weight, self.trunk.bias = problem.shared
        self.heads = nn.ModuleList()
        for i, p in enumerate(problem.heads):
            self.heads.append(nn.Module())
            self.heads[i].register_parameter("bias_h" if i % 2 else "weight", p)


class Quadratics:
    """What numpy knows of a problem: clean and perturbed gradients, in the shared and the own part.

    With one task everything is shared.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.count = problem, problem.count
        alone = problem.count == 1
        self.shared = problem.parameters() if alone else problem.shared
        self.heads = [] if alone else problem.heads
        self.n = sum(p.numel() for p in self.shared)

    def x(self, i: int) -> np.ndarray:
        return values([*self.shared, *self.heads[i : i + 1]])

    def clean(self) -> list[np.ndarray]:
        return [self.problem.tasks[i].gradient(self.x(i)) for i in range(self.count)]

    def after(self, i: int, eps: np.ndarray) -> np.ndarray:
        q = self.problem.tasks[i]
        return q.gradient(self.x(i) + eps)

    def metric(self, i: int, adaptive: bool, eta: float, exempt: bool) -> np.ndarray:
        if not adaptive:
            return np.ones_like(self.x(i))
        t = np.abs(self.x(i)) + eta
        if exempt:
            cut = self.problem.shared[0].numel()
            t[cut : self.n if self.heads else self.n - self.head_size()] = 1.0
            if i % 2 and self.heads:
                t[self.n :] = 1.0
        return t

    def head_size(self) -> int:
        return self.problem.heads[0].numel() if self.problem.heads else 0

    def eps(self, i, rho, rho_task=None, adaptive=False, eta=0.0, exempt_bias=False,
            joint_norm=False) -> np.ndarray:  # fmt: skip
        """rho T^2 g / ||T g||, shared and own apart or over one norm."""
        g, t, n = self.clean()[i], self.metric(i, adaptive, eta, exempt_bias), self.n
        lengths = [np.linalg.norm(part) for part in ((t * g)[:n], (t * g)[n:])]
        if joint_norm:
            lengths = [float(np.hypot(*lengths))] * 2
        out = np.zeros_like(g)
        for part, radius, length in zip(
            (slice(0, n), slice(n, None)), (rho, rho if rho_task is None else rho_task), lengths
        ):
            if length > 0:
                out[part] = radius * (t * t * g)[part] / length
        return out

    def rows(self, rho, **options):
        """g [T, n], s [T, n], own clean and own perturbed gradients."""
        g = self.clean()
        s = [self.after(i, self.eps(i, rho, **options)) for i in range(self.count)]
        n = self.n
        return (np.stack([r[:n] for r in g]), np.stack([r[:n] for r in s]), [r[n:] for r in g],
                [r[n:] for r in s])  # fmt: skip

    # what torch has

    def shared_grad(self) -> np.ndarray:
        return np.concatenate([p.grad.numpy().reshape(-1) for p in self.shared])

    def check(self, d: np.ndarray, own: list[np.ndarray], tolerance: float) -> None:
        close(self.shared_grad(), d, tolerance)
        for head, expected in zip(self.heads, own):
            close(head.grad.numpy(), expected, 1e-11)


def close(a: np.ndarray, b: np.ndarray, tolerance: float, scale: float = 0.0) -> None:
    assert a.shape == b.shape
    size = max(float(np.linalg.norm(b)), scale)
    assert np.linalg.norm(a - b) <= tolerance * size, (a, b)


def by_mode(mode: str, aggregate: Aggregate, g: np.ndarray, s: np.ndarray) -> np.ndarray:
    f = s - g
    if mode == "decomposed":
        return aggregate(g) + aggregate(f)
    if mode == "direct":
        return aggregate(s)
    if mode == "second":
        return aggregate(np.stack([aggregate(g), aggregate(f)]))
    return aggregate(np.stack([aggregate(np.stack([a, b])) for a, b in zip(g, f)]))


def wrap(problem: Problem, weighting: Weighting, sharpness=None, base=torch.optim.SGD, lr=LR,
         **options) -> MultiTaskOptimizer:  # fmt: skip
    return MultiTaskOptimizer(base(problem.parameters(), lr=lr), weighting=weighting,
                              sharpness=sharpness, **options)  # fmt: skip


def counted(problem: Problem):
    """A closure that keeps the tasks that it was asked for."""

    def closure(tasks=None):
        closure.calls.append(tasks)
        return problem.losses(tasks)

    closure.calls = []
    return closure


def fits(name: str, tasks: int, mode: str) -> bool:
    """A fixed order is one for T rows: "second" and "each" aggregate two."""
    return name != "pcgrad" or tasks <= 2 or mode in ("decomposed", "direct")


# ---- perturbation options ------------------------------------------------------------------------

OPTIONS = {
    "rho_task": dict(rho=0.3, rho_task=0.9),
    "rho_task_zero": dict(rho=0.3, rho_task=0.0),
    "rho_zero": dict(rho=0.0, rho_task=0.4),
    "joint": dict(rho=0.5, joint_norm=True),
    "joint_rho_task": dict(rho=0.5, rho_task=0.2, joint_norm=True),
    "asam": dict(rho=0.7, adaptive=True),
    "asam_author": dict(rho=0.7, adaptive=True, eta=0.05, exempt_bias=True),
    "asam_exempt": dict(rho=0.7, rho_task=0.3, adaptive=True, exempt_bias=True),
    "asam_joint": dict(rho=0.7, adaptive=True, eta=0.2, joint_norm=True),
    "asam_joint_exempt": dict(rho=0.7, rho_task=1.1, adaptive=True, exempt_bias=True,
                              joint_norm=True),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda", "fairgrad"])
@task_counts
def test_perturbation(name, options, tasks, rng):
    weighting, aggregate = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    opt = wrap(problem, weighting, SAM(**options), model=Module(problem))
    for _ in range(3):
        g, s, _, own = q.rows(**options)
        opt.step(problem.losses)
        q.check(aggregate(g) + aggregate(s - g), own, TOLERANCE[name])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_perturbed_points_themselves(options, rng):
    """Where the perturbed passes run: theta + eps in the shared and the own part, nothing else moved."""
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    seen = {}

    def closure(tasks=None):
        if tasks is not None:
            seen[tasks[0]] = values(problem.shared), problem.head_values()
        return problem.losses(tasks)

    opt = wrap(problem, Mean(), SAM(**options), model=Module(problem))
    eps = [q.eps(i, **options) for i in range(3)]
    x, heads = problem.shared_values(), problem.head_values()
    opt.step(closure)
    assert set(seen) == {0, 1, 2}
    for i, (at, at_heads) in seen.items():
        close(at - x, eps[i][: q.n], 1e-10, scale=1e-3)
        close(at_heads[i] - heads[i], eps[i][q.n :], 1e-10, scale=1e-3)
        assert all(np.array_equal(at_heads[j], heads[j]) for j in range(3) if j != i)


def test_without_own_parameters_joint_is_separate(rng):
    results = []
    for joint in (False, True):
        problem = Problem(np.random.default_rng(3), 3, head=0)
        wrap(problem, Mean(), SAM(0.3, joint_norm=joint)).step(problem.losses)
        results.append(problem.shared_grad())
    close(*results, 1e-14)


@pytest.mark.parametrize("options", [
    dict(eta=0.1), dict(exempt_bias=True), dict(rho_task=-1.0), dict(rho_task=float("nan")),
    dict(rho_task="x"), dict(aggregate="both"), dict(aggregate=None), dict(every=0),
    dict(every=1.5), dict(every=-1), dict(warmup=-1), dict(warmup=0.5), dict(adaptive=True, eta=-1.0),
    dict(every=2, aggregate="direct"), dict(every=2, aggregate="second"),
    dict(every=3, aggregate="each"),
], ids=str)  # fmt: skip
def test_options_that_do_not_fit(options, rng):
    word = "|".join(options)
    with pytest.raises((ValueError, TypeError), match=word):
        sharpness = SAM(0.1, **options)
        wrap(Problem(rng), Mean(), sharpness)


def test_exempt_bias_needs_names(rng):
    with pytest.raises((ValueError, TypeError), match="model"):
        problem = Problem(rng, 2)
        opt = wrap(problem, Mean(), SAM(0.1, adaptive=True, exempt_bias=True))
        opt.step(problem.losses)


# ---- the radii in the groups ---------------------------------------------------------------------


class RhoScheduler:
    """What users write: a schedule that edits the groups, in the style of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer, key: str, factor: float) -> None:
        self.optimizer, self.key, self.factor = optimizer, key, factor
        self.start = [group[key] for group in optimizer.param_groups]
        self.epoch = 0

    def step(self) -> None:
        self.epoch += 1
        for group, start in zip(self.optimizer.param_groups, self.start):
            group[self.key] = start * self.factor**self.epoch


@pytest.mark.parametrize("on_base", [False, True])
def test_radii_by_a_schedule(on_base, rng):
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    opt = wrap(problem, Mean(), SAM(0.8, rho_task=0.4))
    assert opt.param_groups[0]["rho"] == 0.8
    assert opt.param_groups[0]["rho_task"] == 0.4
    target = opt.base_optimizer if on_base else opt
    schedules = [RhoScheduler(target, "rho", 0.5), RhoScheduler(target, "rho_task", 1.5)]
    lr = torch.optim.lr_scheduler.ExponentialLR(target, 0.9)
    for step in range(4):
        g, s, _, own = q.rows(0.8 * 0.5**step, rho_task=0.4 * 1.5**step)
        opt.step(problem.losses)
        q.check(s.mean(axis=0), own, 1e-11)
        for schedule in (*schedules, lr):
            schedule.step()


def test_radii_of_groups(rng):
    """Shared parameters go by their group's rho, own ones by their group's rho_task, or its rho."""
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    base = torch.optim.SGD(
        [{"params": problem.shared, "rho": 0.4, "rho_task": 5.0},
         {"params": problem.heads[:1], "rho": 0.2},
         {"params": problem.heads[1:2], "rho": 7.0, "rho_task": 0.6},
         {"params": problem.heads[2:], "rho": 0.3, "rho_task": None}],
        lr=LR,
    )  # fmt: skip
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAM(0.05))
    for rho, radii in [(0.4, (0.2, 0.6, 0.3)), (0.0, (0.2, 0.0, 0.3)), (0.1, (0.9, 0.6, 0.0))]:
        base.param_groups[0]["rho"] = rho
        base.param_groups[1]["rho"] = radii[0]
        base.param_groups[2]["rho_task"] = radii[1]
        base.param_groups[3]["rho"] = radii[2]
        every = [q.rows(rho, rho_task=r) for r in radii]
        opt.step(problem.losses)
        s = np.stack([every[i][1][i] for i in range(3)])
        q.check(s.mean(axis=0), [every[i][3][i] for i in range(3)], 1e-11)


def test_sams_rho_task_reaches_groups_that_name_rho_only(rng):
    """A group without "rho_task" gets SAM's."""
    problem = Problem(rng, 2)
    q = Quadratics(problem)
    base = torch.optim.SGD(
        [{"params": problem.shared, "rho": 0.5}, {"params": problem.heads}], lr=LR
    )
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAM(0.1, rho_task=0.7))
    _, s, _, own = q.rows(0.5, rho_task=0.7)
    opt.step(problem.losses)
    q.check(s.mean(axis=0), own, 1e-11)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "1"])
def test_bad_rho_task_in_a_group(bad, rng):
    problem = Problem(rng)
    opt = wrap(problem, Mean(), SAM(0.1))
    opt.param_groups[0]["rho_task"] = bad
    before = snapshot(problem.parameters())
    with pytest.raises((ValueError, TypeError), match="rho_task"):
        opt.step(problem.losses)
    assert untouched(problem.parameters(), before)


def test_warmup(rng):
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    opt = wrap(problem, Mean(), SAM(0.8, rho_task=0.2, warmup=4))
    for step in range(7):
        factor = min(1, (step + 1) / 4)
        _, s, _, own = q.rows(0.8 * factor, rho_task=0.2 * factor)
        opt.step(problem.losses)
        q.check(s.mean(axis=0), own, 1e-11)
    assert opt.param_groups[0]["rho"] == 0.8  # the user's number stays the user's


def test_warmup_goes_on_after_a_resume(rng):
    """The number of steps made is part of the saved state."""
    problem = Problem(rng, 2)
    q = Quadratics(problem)
    opt = wrap(problem, Mean(), SAM(0.8, warmup=10))
    for _ in range(3):
        opt.step(problem.losses)
    resumed = wrap(problem, Mean(), SAM(0.8, warmup=10))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    _, s, _, own = q.rows(0.8 * 4 / 10)
    resumed.step(problem.losses)
    q.check(s.mean(axis=0), own, 1e-11)


# ---- aggregation ---------------------------------------------------------------------------------


@all_methods
@modes
@task_counts
def test_modes(name, mode, tasks, rng):
    if not fits(name, tasks, mode):
        pytest.skip("a fixed order is one for T rows")
    weighting, aggregate = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    opt = wrap(problem, weighting, SAM(0.5, 0.2, aggregate=mode))
    g, s, _, own = q.rows(0.5, rho_task=0.2)
    opt.step(problem.losses)
    # what the pieces are long, not their sum: opposite pieces cancel
    scale = 1e-3 * float(np.linalg.norm(g))
    close(q.shared_grad(), by_mode(mode, aggregate, g, s), TOLERANCE[name], scale)
    for head, expected in zip(q.heads, own):
        close(head.grad.numpy(), expected, 1e-11)


@pytest.mark.parametrize("name", ["mean", "sum", "constant"])
@task_counts
def test_linear_weightings_make_direct_of_decomposed(name, tasks, rng):
    start = rng.bit_generator.state
    results = []
    for mode in ("decomposed", "direct"):
        rng.bit_generator.state = start
        problem = Problem(rng, tasks)
        weighting = {"mean": Mean(), "sum": Sum(),
                     "constant": Constant(weights=torch.arange(1.0, tasks + 1))}[name]  # fmt: skip
        opt = wrap(problem, weighting, SAM(0.5, aggregate=mode), lr=1e-3)
        for _ in range(5):
            opt.step(problem.losses)
        results.append(values(problem.parameters()))
    close(*results, 1e-11)


def test_the_modes_differ(rng):
    """Each from each, by some method on some problem: the tests above can tell them apart."""
    apart = np.zeros(6)
    for name in ("mgda", "nash", "pcgrad"):
        for _ in range(60):
            g, s, _, _ = Quadratics(Problem(rng, 2)).rows(1.5)
            found = [by_mode(mode, make(name, 2)[1], g, s) for mode in MODES]
            distances = [np.linalg.norm(a - b) for k, a in enumerate(found) for b in found[:k]]
            apart = np.maximum(apart, distances / np.linalg.norm(g))
    assert (apart > 1e-4).all(), apart


@modes
@pytest.mark.parametrize("kind", ["pcgrad", "mgda", "nash", "fairgrad", "pcgrad_random"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_is_the_plain_method_to_the_bit(mode, kind, adaptive):
    results = []
    for sharpness in (None, SAM(0.0, adaptive=adaptive, aggregate=mode)):
        problem = Problem(np.random.default_rng(5), 4, shared=5)
        weighting = PCGrad(seed=4) if kind == "pcgrad_random" else make(kind, 4)[0]
        closure = counted(problem)
        opt = wrap(problem, weighting, sharpness, torch.optim.Adam)
        for _ in range(5):
            opt.step(closure)
        assert closure.calls == [None] * 5  # no perturbed pass
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


def davda54(params, loss, rho: float, adaptive: bool) -> None:
    """The two steps of davda54/sam, .grad left at the perturbed point's; parameters put back."""
    grads = torch.autograd.grad(loss(), params)
    scaled = [(p.detach().abs() if adaptive else 1.0) * g for p, g in zip(params, grads)]
    norm = torch.stack([g.norm() for g in scaled]).norm()
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads):
            p.add_((p.pow(2) if adaptive else 1.0) * g * (rho / norm))
    grads = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, g, old in zip(params, grads, kept):
            p.copy_(old)
            p.grad = g


@modes
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_one_task_is_plain_sam(mode, adaptive, base, rng):
    """One task, no heads: davda54's SAM, whatever the mode (the sum of g and s - g is s)."""
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    seed = int(rng.integers(1 << 30))

    def network():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    mine, theirs = network(), network()
    rho = 0.5 if adaptive else 0.1
    opt = MultiTaskOptimizer(base(mine.parameters(), lr=0.01), weighting=Sum(),
                             sharpness=SAM(rho, adaptive=adaptive, aggregate=mode))  # fmt: skip
    other = base(theirs.parameters(), lr=0.01)
    params = list(theirs.parameters())
    for _ in range(10):
        opt.step(lambda: [nn.functional.mse_loss(mine(x), y)])
        davda54(params, lambda: nn.functional.mse_loss(theirs(x), y), rho, adaptive)
        other.step()
    for p, q in zip(mine.parameters(), params):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# ---- degenerate tasks ----------------------------------------------------------------------------


@modes
@all_methods
def test_the_order_of_the_tasks_does_not_matter(mode, name, rng):
    tasks = 2 if name == "pcgrad" else 4
    problem = Problem(rng, tasks)
    start = [p.detach().clone() for p in problem.parameters()]
    found = []
    for turn in (range(tasks), rng.permutation(tasks)):
        with torch.no_grad():
            for p, old in zip(problem.parameters(), start):
                p.copy_(old)
        opt = wrap(problem, make(name, tasks)[0], SAM(0.3, aggregate=mode))
        opt.step(lambda turn=turn: [problem.loss(int(i)) for i in turn])
        found.append((problem.shared_grad(), np.concatenate(problem.head_grads())))
    scale = 1e-3 * float(np.linalg.norm(np.stack(Quadratics(problem).rows(0.3)[0])))
    close(found[0][0], found[1][0], 2 * TOLERANCE[name], scale)
    close(found[0][1], found[1][1], 1e-12)


@pytest.mark.parametrize("mode", ["decomposed", "direct"])
def test_permuted_tasks_with_permuted_orders_of_pcgrad(mode, rng):
    problem, tasks = Problem(rng, 4, shared=5), 4
    start = [p.detach().clone() for p in problem.parameters()]
    order = np.stack([rng.permutation(tasks) for _ in range(tasks)])
    turn = rng.permutation(tasks)  # place k holds task turn[k]
    place = np.argsort(turn)
    found = []
    for tasks_here, order_here in ((np.arange(4), order), (turn, place[order[turn]])):
        with torch.no_grad():
            for p, old in zip(problem.parameters(), start):
                p.copy_(old)
        opt = wrap(problem, PCGrad(order=torch.from_numpy(order_here.copy())),
                   SAM(0.3, aggregate=mode))  # fmt: skip
        opt.step(lambda: [problem.loss(int(i)) for i in tasks_here])
        found.append(problem.shared_grad())
    close(*found, 1e-10)


@modes
@pytest.mark.parametrize("name", ["mean", "mgda"])
def test_duplicate_tasks(mode, name, rng):
    """Three copies of a task, no heads: that task's own SAM step (its mean of g and f in "each"...)."""
    problem = Problem(rng, 3, head=0)
    for i in (1, 2):
        problem.tasks[i], problem.a[i], problem.b[i] = (
            problem.tasks[0], problem.a[0], problem.b[0])  # fmt: skip
    aggregate = make(name, 3)[1]
    g, s, _, _ = Quadratics(problem).rows(0.3)
    one = by_mode(mode, aggregate, g[:1], s[:1])
    wrap(problem, make(name, 3)[0], SAM(0.3, aggregate=mode)).step(problem.losses)
    close(problem.shared_grad(), one, 1e-6)


@modes
@pytest.mark.parametrize("name", ["mean", "sum", "pcgrad", "mgda"])
def test_opposite_tasks(mode, name, rng):
    """L and -L: the gradients cancel, the flat parts A'A eps agree."""
    problem = Problem(rng, 1, head=0)
    a, x = problem.tasks[0].a, problem.shared_values()
    g = problem.tasks[0].gradient(x)
    flat = a.T @ a @ (0.4 * g / np.linalg.norm(g))
    rows, sam = np.stack([g, -g]), np.stack([g + flat, -g + flat])
    aggregate = make(name, 2)[1]
    opt = wrap(problem, make(name, 2)[0], SAM(0.4, aggregate=mode))
    opt.step(lambda: [problem.loss(0), -problem.loss(0)])
    expected = by_mode(mode, aggregate, rows, sam)
    close(problem.shared_grad(), expected, TOLERANCE[name], scale=float(np.linalg.norm(g)))


@modes
@all_methods
def test_a_task_without_gradient(mode, name, rng):
    """It is not perturbed, has no weight, and its parameters stay."""
    tasks = 2 if name == "pcgrad" else 3
    problem = Problem(rng, tasks)
    problem.tasks[1] = oracles.Quadratic(problem.tasks[1].a * 0, problem.tasks[1].b * 0)
    problem.a[1].zero_()
    problem.b[1].zero_()
    weighting, aggregate = make(name, tasks)
    q = Quadratics(problem)
    g, s, _, own = q.rows(0.3)
    if name == "sum":
        aggregate = lambda rows: rows.sum(axis=0)  # noqa: E731
    still = snapshot([problem.heads[1]])
    opt = wrap(problem, weighting, SAM(0.3, aggregate=mode))
    opt.step(problem.losses)
    scale = 1e-3 * float(np.linalg.norm(g))
    close(q.shared_grad(), by_mode(mode, aggregate, g, s), TOLERANCE[name], scale)
    close(problem.heads[0].grad.numpy(), own[0], 1e-11)
    assert untouched([problem.heads[1]], still)


@modes
@all_methods
def test_no_task_has_a_gradient(mode, name, rng):
    problem = Problem(rng, 2)
    for t in (*problem.a, *problem.b):
        t.zero_()
    still = snapshot(problem.parameters())
    wrap(problem, make(name, 2)[0], SAM(0.3, aggregate=mode)).step(problem.losses)
    assert untouched(problem.parameters(), still)


@modes
@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda"])
def test_more_tasks_than_parameters(mode, name, rng):
    if name == "pcgrad" and mode in ("second", "each"):
        pytest.skip("a fixed order is one for T rows")
    for _ in range(10):  # MGDA's update often is next to zero here: the norm of the sums is noise
        weighting, aggregate = make(name, 8)
        problem = Problem(rng, 8, shared=3)
        q = Quadratics(problem)
        g, s, _, own = q.rows(0.2)
        wrap(problem, weighting, SAM(0.2, aggregate=mode)).step(problem.losses)
        d = by_mode(mode, aggregate, g, s)
        scale = 1e-3 * float(np.linalg.norm(g))
        close(q.shared_grad(), d, 1e-5 if name == "mgda" else 1e-9, scale)
        close(problem.heads[7].grad.numpy(), own[7], 1e-11)


# ---- every: the flat part of an earlier step -------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda", "fairgrad"])
@pytest.mark.parametrize("every", [1, 2, 3])
@task_counts
def test_every(name, every, tasks, rng):
    weighting, aggregate = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    closure = counted(problem)
    opt = wrap(problem, weighting, SAM(0.5, 0.2, every=every), lr=1e-3)
    for step in range(2 * every + 2):
        g, s, own, own_sam = q.rows(0.5, rho_task=0.2)
        if step % every == 0:
            flat = aggregate(s - g)
            own_flat = [b - a for a, b in zip(own, own_sam)]
        closure.calls.clear()
        opt.step(closure)
        assert len(closure.calls) == (1 + tasks if step % every == 0 else 1)
        q.check(aggregate(g) + flat, [a + b for a, b in zip(own, own_flat)], TOLERANCE[name])


def test_every_with_the_radius_turned_off_in_between(rng):
    """All radii zero is the plain method's step, whatever flat part is kept."""
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    opt = wrap(problem, Mean(), SAM(0.5, every=3))
    opt.step(problem.losses)
    opt.param_groups[0]["rho"] = 0.0
    for _ in range(3):
        g, _, own, _ = q.rows(0.0)
        opt.step(problem.losses)
        q.check(g.mean(axis=0), own, 1e-11)


def test_every_resumes_with_its_flat_part(rng):
    """Between two perturbed steps the flat part must be part of the saved state."""
    start = rng.bit_generator.state

    def fresh():
        rng.bit_generator.state = start
        problem = Problem(rng, 2)
        return problem, wrap(problem, PCGrad(), SAM(0.5, every=3), torch.optim.Adam)

    problem, opt = fresh()
    for _ in range(2):
        opt.step(problem.losses)
    other, resumed = fresh()
    with torch.no_grad():
        for p, old in zip(other.parameters(), problem.parameters()):
            p.copy_(old)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        opt.step(problem.losses)
        resumed.step(other.losses)
    assert np.array_equal(values(problem.parameters()), values(other.parameters()))


# ---- weights_every: one backward between two solves ------------------------------------------------


class Counting(nn.Module):
    """A trunk that counts its forwards and the backwards that go through it."""

    def __init__(self, seed: int, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
        self.heads = nn.ModuleList([nn.Linear(6, 2) for _ in range(tasks)]).double()
        self.x = torch.randn(5, 4, dtype=torch.float64)
        self.forwards = self.backwards = 0

    def back(self, _: torch.Tensor) -> None:
        self.backwards += 1

    def losses(self, tasks=None):
        self.forwards += 1
        h = self.trunk(self.x)
        if h.requires_grad:
            h.register_hook(self.back)
        wanted = range(len(self.heads)) if tasks is None else tasks
        return [((-1) ** i * self.heads[i](h) - i).square().mean() for i in wanted]

    def counts(self) -> tuple[int, int]:
        found = self.forwards, self.backwards
        self.forwards = self.backwards = 0
        return found


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("name", ["mean", "pcgrad", "fairgrad"])
def test_passes_are_counted(name, tasks, rng):
    """1 + T forwards and 2T backwards with sharpness, 1 and T without."""
    seed = int(rng.integers(1 << 30))
    for sharpness, expected in (
        (None, (1, tasks)),
        (SAM(0.05), (1 + tasks, 2 * tasks)),
        (SAM(0.05, aggregate="direct"), (1 + tasks, 2 * tasks)),
        (SAM(0.0), (1, tasks)),
    ):
        net = Counting(seed, tasks)
        opt = wrap_net(net, make(name, tasks)[0], sharpness)
        for _ in range(3):
            opt.step(net.losses)
            assert net.counts() == expected


def wrap_net(net: nn.Module, weighting, sharpness=None, **options) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), weighting=weighting,
                              sharpness=sharpness, model=net, **options)  # fmt: skip


BETWEEN = [(None, (1, 1)), ("direct", (2, 2)), ("decomposed", (2, 3))]


@pytest.mark.parametrize("mode, between", BETWEEN)
@pytest.mark.parametrize("every", [2, 4])
def test_passes_are_counted_with_weights_every(mode, between, every, rng):
    tasks = 3
    net = Counting(int(rng.integers(1 << 30)), tasks)
    sharpness = None if mode is None else SAM(0.05, aggregate=mode)
    opt = wrap_net(net, FairGrad(), sharpness, weights_every=every)
    for step in range(2 * every + 1):
        opt.step(net.losses)
        solving = (1, tasks) if mode is None else (1 + tasks, 2 * tasks)
        assert net.counts() == (solving if step % every == 0 else between), step


@all_methods
@pytest.mark.parametrize("every", [1, 2, 3])
@task_counts
def test_weights_every(name, every, tasks, rng):
    """d = sum a_i g_i with the weights of the last solve; own parameters: their own gradient."""
    weighting, _ = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    opt = wrap(problem, weighting, weights_every=every, lr=1e-4)
    solve = weights_of(name, tasks)
    for step in range(2 * every + 1):
        g, _, own, _ = q.rows(0.0)
        if step % every == 0:
            w = solve(g @ g.T)
        opt.step(problem.losses)
        q.check(w @ g, own, 10 * TOLERANCE[name])


@pytest.mark.parametrize("mode", [None, "decomposed", "direct"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_weights_every_without_heads(mode, tasks, rng):
    """Nothing is any task's own: the mean stays the mean, plain and perturbed along itself."""
    problem = Problem(rng, tasks, head=0)
    q = Quadratics(problem)
    sharpness = None if mode is None else SAM(0.4, aggregate=mode)
    opt = wrap(problem, Mean(), sharpness, weights_every=2, lr=1e-3)
    for step in range(4):
        g, s, _, _ = q.rows(0.0 if mode is None else 0.4)
        if mode is not None and step % 2:
            mean = g.mean(axis=0)
            s = np.stack([q.after(i, 0.4 * mean / np.linalg.norm(mean)) for i in range(tasks)])
        opt.step(problem.losses)
        q.check(s.mean(axis=0), [], 1e-10)


@pytest.mark.parametrize("tasks", [1, 3])
def test_samo_without_heads(tasks, rng):
    problem = Problem(rng, tasks, head=0)
    q = Quadratics(problem)
    opt = wrap(problem, Mean(), flatmtl.SAMO(rho=0.3, beta=0.0), lr=1e-3)
    for _ in range(2):
        gm = np.mean(q.clean(), axis=0)
        s = [q.after(i, 0.3 * gm / np.linalg.norm(gm)) for i in range(tasks)]
        opt.step(problem.losses)
        q.check(np.mean(s, axis=0), [], 1e-10)


def weights_of(name: str, tasks: int) -> ref.Weights:
    return {"mean": ref.mean, "sum": lambda gram: np.ones(len(gram)),
            "pcgrad": ref.pcgrad(ref.cyclic_order(tasks)), "mgda": ref.mgda, "nash": ref.nash,
            "fairgrad": ref.fairgrad, "cagrad": ref.cagrad}[name]  # fmt: skip


@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda", "fairgrad"])
@pytest.mark.parametrize("mode", ["decomposed", "direct"])
@pytest.mark.parametrize("adaptive", [False, True])
@task_counts
def test_weights_every_with_sharpness(name, mode, adaptive, tasks, rng):
    """Between two solves one shared perturbation along sum a_i g_i, own ones along their own."""
    weighting, _ = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    sharp = dict(rho=0.4, rho_task=0.2, adaptive=adaptive, eta=0.1 if adaptive else 0.0)
    opt = wrap(problem, weighting, SAM(aggregate=mode, **sharp), weights_every=3, lr=1e-4)
    solve, n = weights_of(name, tasks), q.n
    for step in range(7):
        g, s, own, own_sam = q.rows(**sharp)
        if step % 3 == 0:
            if mode == "direct":
                a = b = solve(s @ s.T)
            else:
                a, b = solve(g @ g.T), solve((s - g) @ (s - g).T)
            d = b @ s if mode == "direct" else a @ g + b @ (s - g)
        else:
            g_a, t = a @ g, q.metric(0, adaptive, sharp["eta"], False)[:n]
            # no direction, no perturbation
            eps = 0.4 * t**2 * g_a / np.linalg.norm(t * g_a) if np.any(g_a) else 0 * g_a
            s, own_sam = [], []
            for i in range(tasks):
                both = q.after(i, np.concatenate([eps, q.eps(i, **sharp)[n:]]))
                s.append(both[:n])
                own_sam.append(both[n:])
            s = np.stack(s)
            d = b @ s if mode == "direct" else g_a + b @ (s - g)
        opt.step(problem.losses)
        close(q.shared_grad(), d, 100 * TOLERANCE[name], 1e-3 * float(np.linalg.norm(g)))
        for head, expected in zip(q.heads, own_sam):
            close(head.grad.numpy(), expected, 1e-6)


@pytest.mark.parametrize("every, weights_every", [(2, 3), (3, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", ["mean", "fairgrad"])
def test_every_and_weights_every(name, every, weights_every, rng):
    """Both intervals at once: weights of the last solve, flat part of the last perturbed pass."""
    weighting, _ = make(name, 3)
    problem = Problem(rng, 3)
    q, solve = Quadratics(problem), weights_of(name, 3)
    sharp = dict(rho=0.4, rho_task=0.2)
    opt = wrap(problem, weighting, SAM(every=every, **sharp), weights_every=weights_every, lr=1e-4)
    for step in range(13):
        g, s, own, own_sam = q.rows(**sharp)
        solving, due = step % weights_every == 0, step % every == 0
        if solving:
            a = solve(g @ g.T)
        if due and solving:
            b = solve((s - g) @ (s - g).T)
        elif due:  # one perturbation along sum a_i g_i
            g_a = a @ g
            eps = 0.4 * g_a / np.linalg.norm(g_a)
            both = [q.after(i, np.append(eps, q.eps(i, **sharp)[q.n :])) for i in range(3)]
            s, own_sam = np.stack([x[: q.n] for x in both]), [x[q.n :] for x in both]
        if due:
            flat, own_flat = b @ (s - g), [y - x for x, y in zip(own, own_sam)]
        opt.step(problem.losses)
        close(q.shared_grad(), a @ g + flat, 100 * TOLERANCE[name])
        for i in range(3):
            close(problem.heads[i].grad.numpy(), own[i] + own_flat[i], 1e-6)


def test_own_parameters_of_a_task_with_weight_zero(rng):
    """MGDA often drops a task; its head still gets its own gradient, not 0 / 0."""
    problem = Problem(rng, 3)
    q = Quadratics(problem)
    zero = Constant(weights=torch.tensor([1.0, 0.0, 2.0]))
    opt = wrap(problem, zero, weights_every=5, lr=1e-5)
    for _ in range(3):
        g, _, own, _ = q.rows(0.0)
        opt.step(problem.losses)
        q.check(g[0] + 2 * g[2], own, 1e-10)


@pytest.mark.parametrize("mode", ["second", "each"])
def test_weights_every_has_two_modes_only(mode, rng):
    with pytest.raises(ValueError, match="weights_every|aggregate"):
        wrap(Problem(rng), Mean(), SAM(0.1, aggregate=mode), weights_every=2)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None])
def test_bad_weights_every(bad, rng):
    with pytest.raises((ValueError, TypeError), match="weights_every"):
        wrap(Problem(rng), Mean(), weights_every=bad)


def test_weights_every_resumes_with_its_weights(rng):
    start = rng.bit_generator.state

    def fresh():
        rng.bit_generator.state = start
        problem = Problem(rng, 3)
        return problem, wrap(problem, FairGrad(), SAM(0.1), torch.optim.Adam, weights_every=4)

    problem, opt = fresh()
    for _ in range(2):
        opt.step(problem.losses)
    other, resumed = fresh()
    with torch.no_grad():
        for p, old in zip(other.parameters(), problem.parameters()):
            p.copy_(old)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(5):
        opt.step(problem.losses)
        resumed.step(other.losses)
    assert np.array_equal(values(problem.parameters()), values(other.parameters()))


# ---- SAMO ------------------------------------------------------------------------------------------


class Spy:
    """A closure that keeps where it was called: task, whether with gradients, shared and own values."""

    def __init__(self, problem: Problem, module: nn.Module | None = None) -> None:
        self.problem, self.module = problem, module
        self.points: list[tuple] = []

    def __call__(self, tasks=None):
        self.points.append((
            None if tasks is None else tasks[0], torch.is_grad_enabled(),
            self.problem.shared_values(), self.problem.head_values(),
            self.module is None or self.module.training,
        ))  # fmt: skip
        return self.problem.losses(tasks)

    def clean(self) -> list[tuple]:
        return [p for p in self.points if p[0] is None]

    def probes(self, task: int) -> list[tuple]:
        return [p for p in self.points if p[0] == task and not p[1]]

    def perturbed(self, task: int) -> tuple:
        (point,) = [p for p in self.points if p[0] == task and p[1]]
        return point


def samo_direction(q: Quadratics, g: np.ndarray, gm: np.ndarray, z: np.ndarray, beta: float):
    """Per tensor n: (1 - beta) gm + beta ||gm|| zhat / ||zhat||, zhat = <g_i, z> z exactly."""
    zhat = (g @ z) * z
    out, at = np.zeros(q.n), 0
    for p in q.shared:
        n = slice(at, at + p.numel())
        at += p.numel()
        length = np.linalg.norm(zhat[n])
        random_part = zhat[n] / length if length > 0 else 0 * zhat[n]
        out[n] = (1 - beta) * gm[n] + beta * np.linalg.norm(gm[n]) * random_part
    return out


@pytest.mark.parametrize("name", ["mean", "pcgrad", "mgda", "fairgrad"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_samo_without_random_part(name, tasks, rng):
    """beta = 0: everybody goes rho along the mean gradient, then one aggregation of the s."""
    weighting, aggregate = make(name, tasks)
    problem = Problem(rng, tasks)
    q = Quadratics(problem)
    opt = wrap(problem, weighting, flatmtl.SAMO(rho=0.3, rho_task=0.1, beta=0.0))
    for _ in range(3):
        full, n = q.clean(), q.n
        gm = np.mean([f[:n] for f in full], axis=0)
        s = []
        for i, f in enumerate(full):
            own = 0.1 * f[n:] / np.linalg.norm(f[n:])
            s.append(q.after(i, np.concatenate([0.3 * gm / np.linalg.norm(gm), own])))
        opt.step(problem.losses)
        q.check(aggregate(np.stack([r[:n] for r in s])), [r[n:] for r in s], TOLERANCE[name])


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tasks", [2, 3])
def test_samo(beta, adaptive, tasks, rng):
    """The points where the closure is called obey the formulas, and so does the step."""
    problem = Problem(rng, tasks, shared=9)
    q, n = Quadratics(problem), 9
    probe = 0.02
    opt = wrap(problem, Sum(), flatmtl.SAMO(rho=0.3, beta=beta, spsa_eps=probe, adaptive=adaptive))
    for _ in range(2):
        spy = Spy(problem)
        x, heads, full = problem.shared_values(), problem.head_values(), q.clean()
        gm = np.mean([f[:n] for f in full], axis=0)
        opt.step(spy)
        expected, drawn = np.zeros(n), []
        assert len(spy.clean()) == 1
        assert spy.clean()[0][1]
        for i in range(tasks):
            first, second = spy.probes(i)
            close(first[2] - x, x - second[2], 1e-10)  # +- the same z
            assert all(np.array_equal(a, b) for p in (first, second) for a, b in zip(p[3], heads))
            z = (first[2] - x) / probe
            drawn.append(z)
            direction = samo_direction(q, full[i][:n], gm, z, beta)
            t = np.abs(x) if adaptive else np.ones(n)
            eps = 0.3 * t**2 * direction / np.linalg.norm(t * direction)
            at = spy.perturbed(i)
            close(at[2] - x, eps, 1e-7)
            if not adaptive:
                assert np.linalg.norm(at[2] - x) == pytest.approx(0.3, rel=1e-10)
            own = full[i][n:]
            th = np.abs(heads[i]) if adaptive else np.ones_like(own)
            close(at[3][i] - heads[i], 0.3 * th**2 * own / np.linalg.norm(th * own), 1e-9)
            assert all(np.array_equal(at[3][j], heads[j]) for j in range(tasks) if j != i)
            s = problem.tasks[i].gradient(np.concatenate([at[2], at[3][i]]))
            expected += s[:n]
            close(problem.heads[i].grad.numpy(), s[n:], 1e-9)
        close(problem.shared_grad(), expected, 1e-9)
        assert not np.allclose(drawn[0], drawn[1])  # a z of its own for each task


def test_samo_draws_normal_numbers(rng):
    problem = Problem(rng, 2, shared=2000, head=1)
    opt = wrap(problem, Mean(), flatmtl.SAMO(rho=1e-3, spsa_eps=0.01), lr=0.0)
    drawn = []
    for _ in range(3):
        spy = Spy(problem)
        x = problem.shared_values()
        opt.step(spy)
        drawn += [(spy.probes(i)[0][2] - x) / 0.01 for i in range(2)]
    z = np.concatenate(drawn)  # 12000 numbers; the bounds are at six standard errors
    assert abs(z.mean()) < 6 / np.sqrt(len(z))
    assert abs(z.var() - 1) < 6 * np.sqrt(2 / len(z))
    assert abs((z**4).mean() - 3) < 6 * np.sqrt(96 / len(z))
    correlations = np.corrcoef(np.stack(drawn)) - np.eye(6)
    assert np.abs(correlations).max() < 6 / np.sqrt(2000)


def test_samo_leaves_the_global_generators_alone(rng):
    problem = Problem(rng, 2)
    opt = wrap(problem, Mean(), flatmtl.SAMO())
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for _ in range(2):
        opt.step(problem.losses)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def samo_run(seed: int, steps: int, resume_at: int | None = None) -> np.ndarray:
    def fresh(seed):
        problem = Problem(np.random.default_rng(3), 2)
        return problem, wrap(problem, PCGrad(), flatmtl.SAMO(rho=0.1, seed=seed), torch.optim.Adam)

    problem, opt = fresh(seed)
    for step in range(steps):
        if step == resume_at:
            other, resumed = fresh(seed + 1)
            with torch.no_grad():
                for p, old in zip(other.parameters(), problem.parameters()):
                    p.copy_(old)
            resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
            problem, opt = other, resumed
        opt.step(problem.losses)
    return values(problem.parameters())


def test_samo_repeats_by_its_seed_and_resumes():
    assert np.array_equal(samo_run(1, 4), samo_run(1, 4))
    assert not np.array_equal(samo_run(1, 4), samo_run(2, 4))
    assert np.array_equal(samo_run(1, 4), samo_run(1, 4, resume_at=2))


@pytest.mark.parametrize("tasks", [2, 4])
def test_samo_passes_are_counted(tasks, rng):
    """1 + 2T + T forwards, 1 + T backwards; the probes in eval mode, which ends with them."""
    net = Counting(int(rng.integers(1 << 30)), tasks)
    net.trunk.append(nn.BatchNorm1d(6, dtype=torch.float64))
    asleep = nn.Dropout(0.5).eval()
    net.heads[0] = nn.Sequential(asleep, net.heads[0])
    modes_seen = []
    net.trunk[-1].register_forward_pre_hook(
        lambda m, _: modes_seen.append((torch.is_grad_enabled(), m.training))
    )
    opt = wrap_net(net, Mean(), flatmtl.SAMO(rho=0.1))
    for step in range(3):
        modes_seen.clear()
        opt.step(net.losses)
        assert net.counts() == (1 + 3 * tasks, 1 + tasks)
        assert modes_seen.count((False, False)) == 2 * tasks
        assert modes_seen.count((True, True)) == 1 + tasks
        assert net.trunk[-1].num_batches_tracked == step + 1
    assert net.training
    assert net.trunk.training
    assert not asleep.training


def test_samo_rho_zero_is_the_plain_method(rng):
    results = []
    for sharpness in (None, flatmtl.SAMO(rho=0.0)):
        problem = Problem(np.random.default_rng(5), 3)
        opt = wrap(problem, PCGrad(seed=2), sharpness, torch.optim.Adam)
        for _ in range(4):
            opt.step(problem.losses)
        results.append(values(problem.parameters()))
    assert np.array_equal(*results)


def test_samo_where_a_tensor_or_a_task_has_no_gradient(rng):
    """No 0 / 0: a tensor with gm = 0 is not perturbed, a flat task neither spoils nor moves."""
    problem = Problem(rng, 2)
    problem.a[0][:, : problem.shared[0].numel()] = 0
    problem.a[1].zero_()
    problem.b[1].zero_()
    spy = Spy(problem)
    x = problem.shared_values()
    opt = wrap(problem, Mean(), flatmtl.SAMO(rho=0.2, beta=0.5))
    opt.step(spy)
    assert np.isfinite(values(problem.parameters())).all()
    assert np.isfinite(problem.shared_grad()).all()
    cut = problem.shared[0].numel()
    for i in range(2):
        moved = spy.perturbed(i)[2] - x
        assert not moved[:cut].any()
        assert np.linalg.norm(moved) == pytest.approx(0.2, rel=1e-9)


def test_samo_warmup_and_live_radius(rng):
    problem = Problem(rng, 2)
    opt = wrap(problem, Mean(), flatmtl.SAMO(rho=0.4, warmup=4))
    for step in range(6):
        spy = Spy(problem)
        x = problem.shared_values()
        opt.step(spy)
        radius = opt.param_groups[0]["rho"] * min(1, (step + 1) / 4)
        assert np.linalg.norm(spy.perturbed(1)[2] - x) == pytest.approx(radius, rel=1e-9)
        opt.param_groups[0]["rho"] *= 0.7


@pytest.mark.parametrize("options", [
    dict(rho=-1.0), dict(beta=-0.1), dict(beta=1.1), dict(beta=float("nan")), dict(spsa_eps=0.0),
    dict(spsa_eps=-1.0), dict(warmup=-1), dict(seed=1.5), dict(rho_task="x"),
], ids=str)  # fmt: skip
def test_bad_options_of_samo(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        flatmtl.SAMO(**options)
