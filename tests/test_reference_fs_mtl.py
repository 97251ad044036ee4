"""The float64 reference trainer against closed forms, finite differences and the numpy oracles."""

from __future__ import annotations

import copy

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import reference_fs_mtl as ref
import torch
import training_nets as nets
from quadratics import Problem, values
from reference_fs_mtl import Reference, Sharpness
from torch import nn

LR = 0.01
METHODS = {
    "mean": (ref.mean, oracles.mean, 1e-12),
    "pcgrad": (ref.pcgrad(ref.cyclic_order(3)), oracles.pcgrad_sum(ref.cyclic_order(3)), 1e-11),
    "mgda": (ref.mgda, oracles.mgda, 1e-6),
}


class Module(nn.Module):
    """A quadratic problem as a module."""

    def __init__(self, problem: Problem, names: tuple[str, ...] = ("weight", "bias")) -> None:
        super().__init__()
        for name, p in zip(names, problem.shared):
            self.register_parameter(name, p)
        self.heads = nn.ParameterList(problem.heads)


def trainer(problem: Problem, weights, sharpness=None, **options) -> Reference:
    net = Module(problem)
    return Reference(net, weights, torch.optim.SGD(net.parameters(), lr=LR), sharpness, **options)


def close(a, b, tolerance: float = 1e-11) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (a, b)


def gradients(problem: Problem, x: np.ndarray, heads: list[np.ndarray]) -> list[np.ndarray]:
    return [q.gradient(np.concatenate([x, h])) for q, h in zip(problem.tasks, heads)]


# ---- the weights ---------------------------------------------------------------------------------


def test_pcgrad_in_coefficients_is_pcgrad_on_vectors(rng):
    for tasks in (1, 2, 3, 6):
        jac = rng.standard_normal((tasks, 4))
        jac[rng.integers(tasks)] *= rng.integers(2)  # sometimes a zero row
        order = np.stack([rng.permutation(tasks) for _ in range(tasks)])
        close(ref.pcgrad(order)(jac @ jac.T) @ jac, oracles.pcgrad(jac, order), 1e-10)


def test_optimality_of_the_weights(rng):
    for _ in range(5):
        jac = rng.standard_normal((4, 9))
        gram = jac @ jac.T
        assert ow.mgda_residual(gram, ref.mgda(gram), ref.RIDGE).strict < 1e-9
        assert ow.fair_residual(gram, ref.fairgrad(gram), 2.0, ridge=ref.RIDGE).strict < 1e-9
        assert ow.cagrad_residual(gram, ref.cagrad(gram), 0.4).strict < 1e-7
        nash = ref.nash(gram)
        assert np.sqrt(nash @ gram @ nash) == pytest.approx(1, rel=1e-12)
        product = (gram @ nash) * nash  # proportional to (G w) w = 1
        close(product / product[0], np.ones(4), 1e-8)


def test_zero_rows_have_no_weight(rng):
    jac = rng.standard_normal((4, 9))
    jac[2] = 0
    for weights in (ref.mean, ref.mgda, ref.fairgrad, ref.nash, ref.cagrad,
                    ref.pcgrad(ref.cyclic_order(4)), ref.constant([1.0, 2, 3, 4])):  # fmt: skip
        w = weights(jac @ jac.T)
        assert w[2] == 0 and np.isfinite(w).all() and w.any()
        assert not weights(np.zeros((4, 4))).any()


# ---- one step on quadratics ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "sharpness",
    [
        None,
        Sharpness(0.3),
        Sharpness(0.3, 0.8),
        Sharpness(0.7, adaptive=True),
        Sharpness(0.7, 0.2, adaptive=True, eta=0.1),
    ],
    ids=["plain", "sam", "rho_task", "asam", "asam_eta"],
)
def test_steps_on_quadratics(name, sharpness, rng):
    weights, aggregate, tolerance = METHODS[name]
    problem = Problem(rng, 3)
    reference = trainer(problem, weights, sharpness)
    for _ in range(3):
        shared, heads = problem.shared_values(), problem.head_values()
        s = sharpness or Sharpness(0.0)
        d, own = oracles.fs_mtl_gradients(
            problem.tasks, shared, heads, aggregate, sharpness and s.rho, s.rho_task,
            s.adaptive, s.eta,
        )  # fmt: skip
        expected = [q.loss(np.append(shared, h)) for q, h in zip(problem.tasks, heads)]
        losses = reference.step(problem.losses)
        close(torch.stack(losses), expected)
        close(problem.shared_values(), shared - LR * d, tolerance)
        for i in range(3):
            close(problem.head_values()[i], heads[i] - LR * own[i])


def test_joint_norm(rng):
    problem = Problem(rng, 2)
    x, heads = problem.shared_values(), problem.head_values()
    n, expected, own = len(x), [], []
    for g, q in zip(gradients(problem, x, heads), problem.tasks):
        s = g + q.a.T @ q.a @ (0.4 * g / np.linalg.norm(g))
        expected.append(s[:n])
        own.append(s[n:])
    trainer(problem, ref.mean, Sharpness(0.4, joint_norm=True)).step(problem.losses)
    close(problem.shared_grad(), np.mean(expected, axis=0))
    close(problem.head_grads()[1], own[1])


def test_exempt_bias(rng):
    problem = Problem(rng, 2, head=0)
    x, cut = problem.shared_values(), problem.shared[0].numel()
    metric = np.where(np.arange(len(x)) < cut, np.abs(x) + 0.05, 1.0)
    expected = []
    for q in problem.tasks:
        g = q.gradient(x)
        eps = 0.6 * metric**2 * g / np.linalg.norm(metric * g)
        expected.append(g + q.a.T @ q.a @ eps)
    sharpness = Sharpness(0.6, adaptive=True, eta=0.05, exempt_bias=True)
    trainer(problem, ref.mean, sharpness).step(problem.losses)
    close(problem.shared_grad(), np.mean(expected, axis=0))


@pytest.mark.parametrize("name", ["mean", "mgda"])
def test_modes(name, rng):
    weights, aggregate, tolerance = METHODS[name]
    for mode in ("direct", "second", "each"):
        problem = Problem(rng, 3)
        x, heads = problem.shared_values(), problem.head_values()
        n, g, s = len(x), [], []
        for full, q in zip(gradients(problem, x, heads), problem.tasks):
            eps = [0.5 * part / np.linalg.norm(part) for part in (full[:n], full[n:])]
            g.append(full[:n])
            s.append((full + q.a.T @ q.a @ np.concatenate(eps))[:n])
        g, s = np.stack(g), np.stack(s)
        d = {
            "direct": lambda: aggregate(s),
            "second": lambda: aggregate(np.stack([aggregate(g), aggregate(s - g)])),
            "each": lambda: aggregate(
                np.stack([aggregate(np.stack([a, b - a])) for a, b in zip(g, s)])
            ),
        }[mode]()
        trainer(problem, weights, Sharpness(0.5, aggregate=mode)).step(problem.losses)
        close(problem.shared_grad(), d, tolerance)


def test_one_task_is_plain_sam(rng):
    problem = Problem(rng, 1)
    x = values(problem.parameters())
    reference = trainer(problem, ref.pcgrad(np.zeros((1, 1), int)), Sharpness(0.3))
    for _ in range(5):
        x = oracles.sam_step(problem.tasks[0], x, 0.3, LR)
        reference.step(problem.losses)
    close(values(problem.parameters()), x)


def test_warmup(rng):
    problem = Problem(rng, 2, head=0)
    reference = trainer(problem, ref.mean, Sharpness(0.8, warmup=4))
    for step in range(6):
        x, rho = problem.shared_values(), 0.8 * min(1, (step + 1) / 4)
        d, _ = oracles.fs_mtl_gradients(problem.tasks, x, [np.zeros(0)] * 2, oracles.mean, rho)
        reference.step(problem.losses)
        close(problem.shared_grad(), d)


def test_every(rng):
    """Between two perturbed steps the flat part is that of the last one."""
    problem = Problem(rng, 2)
    reference = trainer(problem, ref.mean, Sharpness(0.5, every=3))
    for step in range(7):
        x, heads = problem.shared_values(), problem.head_values()
        g, own = oracles.fs_mtl_gradients(problem.tasks, x, heads, oracles.mean, None)
        if step % 3 == 0:
            d, sam = oracles.fs_mtl_gradients(problem.tasks, x, heads, oracles.mean, 0.5)
            flat, flat_own = d - g, [a - b for a, b in zip(sam, own)]
        reference.step(problem.losses)
        close(problem.shared_grad(), g + flat)
        close(problem.head_grads()[0], own[0] + flat_own[0])


def test_weights_every(rng):
    """Between two solves: one shared perturbation along the weighted gradient (Eq. 9)."""
    w = np.array([0.5, 2.0, 1.0])
    problem = Problem(rng, 3)
    reference = trainer(problem, ref.constant(w), Sharpness(0.5, 0.2), weights_every=2)
    reference.step(problem.losses)
    x, heads = problem.shared_values(), problem.head_values()
    full, n = gradients(problem, x, heads), len(x)
    g = w @ np.stack([f[:n] for f in full])
    d, own = g.copy(), []
    for i, (q, f) in enumerate(zip(problem.tasks, full)):
        eps = np.concatenate([0.5 * g / np.linalg.norm(g), 0.2 * f[n:] / np.linalg.norm(f[n:])])
        change = q.a.T @ q.a @ eps
        d += w[i] * change[:n]
        own.append((f + change)[n:])
    reference.step(problem.losses)
    close(problem.shared_grad(), d)
    close(problem.head_grads()[2], own[2])


def test_weights_every_keeps_the_weights(rng):
    problem = Problem(rng, 3)
    reference = trainer(problem, ref.mgda, weights_every=3)
    for step in range(4):
        x, heads = problem.shared_values(), problem.head_values()
        g = np.stack([f[: len(x)] for f in gradients(problem, x, heads)])
        if step % 3 == 0:
            w, _ = oracles.mgda_enumerate(oracles.gram(g))
        reference.step(problem.losses)
        close(problem.shared_grad(), w @ g, 1e-6)


# ---- on networks ---------------------------------------------------------------------------------


def built(name: str, seed: int, weights, sharpness=None, base=torch.optim.SGD, **options):
    net = nets.make(name, seed, torch.float64)
    return net, Reference(net, weights, base(net.parameters(), lr=LR), sharpness, **options)


@pytest.mark.parametrize("name", nets.NETS)
def test_gradients_by_finite_differences(name, rng):
    """Along random directions: each task's gradient, and its perturbed gradient at theta + eps."""
    seed = int(rng.integers(1 << 30))
    (batch,) = nets.batches(name, seed, 1)
    for sharpness in (None, Sharpness(0.1, 0.3)):
        net, reference = built(name, seed, ref.mean, sharpness)
        reference.weights = ref.constant(np.eye(type(net).tasks)[0])  # of task 0 alone
        at = copy.deepcopy(net)
        reference.step(lambda: net.losses(batch))
        mine = reference.shared + reference.own[0]
        params = list(at.parameters())
        if sharpness is not None:  # move to theta + eps by hand, in the shared and the own part
            grads = torch.autograd.grad(at.losses(batch)[0], [params[k] for k in mine])
            cut = len(reference.shared)
            for index, part, rho in [
                (mine[:cut], grads[:cut], 0.1), (mine[cut:], grads[cut:], 0.3)
            ]:  # fmt: skip
                norm = torch.cat([g.reshape(-1) for g in part]).norm() if part else 1.0
                with torch.no_grad():
                    for k, g in zip(index, part):
                        params[k] += rho * g / norm
        # decomposed with the weights (1, 0, 0) on both families is g_0 + f_0 = s_0
        for _ in range(3):
            direction = [torch.randn_like(params[k]) for k in mine]
            slopes = []
            for h in (1e-4, -1e-4):
                moved = copy.deepcopy(at)
                target = list(moved.parameters())
                with torch.no_grad():
                    for k, v in zip(mine, direction):
                        target[k] += h * v
                slopes.append(float(moved.losses(batch)[0].detach()))
            slope = sum(
                float((reference.params[k].grad * v).sum()) for k, v in zip(mine, direction)
            )
            scale = sum(float((reference.params[k].grad * v).abs().sum())
                        for k, v in zip(mine, direction))  # fmt: skip
            assert abs((slopes[0] - slopes[1]) / 2e-4 - slope) < 1e-6 * scale


@pytest.mark.parametrize("name", nets.NETS)
def test_roles(name, rng):
    net, reference = built(name, 0, ref.mean)
    (batch,) = nets.batches(name, 1, 1)
    reference.step(lambda: net.losses(batch))
    names = {n: k for k, n in enumerate(reference.names)}
    heads = [k for n, k in names.items() if n.startswith("heads")]
    assert sorted(reference.shared) == sorted(set(names.values()) - set(heads))
    assert sorted(k for own in reference.own for k in own) == sorted(heads)


def test_running_statistics_are_those_of_the_clean_pass():
    seed = 3
    (batch,) = nets.batches("cnn", seed, 1)
    net, reference = built("cnn", seed, ref.mean, Sharpness(0.2))
    twin = copy.deepcopy(net)
    reference.step(lambda: net.losses(batch))
    twin.losses(batch)
    for a, b in zip(net.buffers(), twin.buffers()):
        assert torch.equal(a, b)
    assert net.trunk[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", nets.NETS)
def test_linear_weights_make_direct_of_decomposed(name):
    batch = nets.batches(name, 5, 3)
    results = []
    for mode in ("decomposed", "direct"):
        net, reference = built(name, 4, ref.mean, Sharpness(0.1, aggregate=mode))
        for b in batch:
            reference.step(lambda: net.losses(b))
        results.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", nets.NETS)
def test_learns(name):
    """A hundred steps on a few batches lower the sum of the losses."""
    batch = nets.batches(name, 5, 4)
    net, reference = built(name, 4, ref.mean, Sharpness(0.02), torch.optim.Adam)
    first = [float(sum(x.detach() for x in net.losses(b))) for b in batch]
    for step in range(100):
        reference.step(lambda: net.losses(batch[step % 4]))
    last = [float(sum(x.detach() for x in net.losses(b))) for b in batch]
    assert sum(last) < 0.8 * sum(first)


def test_copy_from_continues_to_the_bit():
    batch = nets.batches("cnn", 5, 6)
    net, reference = built("cnn", 4, ref.mean, Sharpness(0.1, every=2), torch.optim.Adam)
    other, copied = built("cnn", 9, ref.mean, Sharpness(0.1, every=2), torch.optim.Adam)
    for b in batch[:3]:
        reference.step(lambda: net.losses(b))
    copied.copy_from(reference)
    for b in batch[3:]:
        reference.step(lambda: net.losses(b))
        copied.step(lambda: other.losses(b))
    for p, q in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.equal(p, q)
