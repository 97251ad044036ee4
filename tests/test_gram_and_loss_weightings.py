"""IMTL, GradNorm and EMTLLike: of Gram matrix and losses, against numpy and known answers."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import torch
from methods import BOTH, FALLBACK, NO_ACTIVE, SOME_INACTIVE, make
from problems import FAMILIES, family
from torch import Tensor

from flatmtl.weighting import IMTL, IMTLG, EMTLLike, GradNorm, Weighting, by_name
from flatmtl.weighting._loss import WithLosses

each = pytest.mark.parametrize("name", BOTH)
learning = pytest.mark.parametrize("name", ["imtl", "gradnorm"])
any_family = pytest.mark.parametrize("kind", FAMILIES)
any_count = pytest.mark.parametrize("tasks", [1, 2, 5, 16])


def tensor(values) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64).copy())


def random_losses(rng, tasks: int, decades: float = 1.0) -> np.ndarray:
    return 10 ** rng.uniform(-decades, decades, tasks)


def problem(rng, tasks: int, kind: str = "iid") -> tuple[Tensor, Tensor]:
    gram = oracles.gram(family(rng, kind, tasks, 30))
    return tensor(gram), tensor(random_losses(rng, tasks))


def given(steps: int, first: int = 0, tasks: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Another Gram matrix and losses at each step, always the same ones."""
    return [problem(np.random.default_rng(k), tasks) for k in range(first, first + steps)]


def base_of(weighting, kind=torch.optim.SGD, lr: float = 0.05, **options):
    return kind(weighting.parameters(), lr=lr, **options)


def step(weighting, base, gram: Tensor, losses: Tensor, there=None, ok=None) -> Tensor:
    """One step as an optimizer makes it: weights, then what is learned."""
    weights = weighting._at_step(gram, losses, there)
    for p, g in zip(weighting.parameters(), weighting._gradients()):
        p.grad = g.clone()
    if ok is None or bool(ok):
        base.step()
    weighting._made(ok)
    return weights


def train(weighting, base, steps: int, first: int = 0) -> list[Tensor]:
    return [step(weighting, base, g, v) for g, v in given(steps, first, weighting.tasks)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=0)


def set_learned(weighting, values) -> None:
    with torch.no_grad():
        weighting.learned.copy_(tensor(values))


# ---- oracles ---------------------------------------------------------------------------------


def imtl_scaled(jac: np.ndarray, losses: np.ndarray, s: np.ndarray):
    """Scaled rows, scaled losses' gradient of s."""
    return np.exp(s)[:, None] * jac, np.exp(s) * losses - 1


def gradnorm_loss(w: np.ndarray, norms: np.ndarray, target: np.ndarray) -> float:
    return float(np.abs(w * norms - target).sum())


def gradnorm_target(w, norms, losses, first, alpha: float) -> np.ndarray:
    rate = (losses / first) / (losses / first).mean()
    return (w * norms).mean() * rate**alpha


def emtl_objective(w: np.ndarray, k: np.ndarray, lam: float) -> float:
    return float(((w - 1) ** 2).sum() + lam * np.var(w * k))


def emtl_kkt(k: np.ndarray, lam: float) -> np.ndarray:
    """The (T + 1) KKT system, dense."""
    tasks = len(k)
    center = np.eye(tasks) - np.full((tasks, tasks), 1 / tasks)
    system = np.ones((tasks + 1, tasks + 1))
    system[-1, -1] = 0
    system[:tasks, :tasks] = 2 * np.eye(tasks) + 2 * lam / tasks * k[:, None] * center * k
    return np.linalg.solve(system, np.append(np.full(tasks, 2.0), tasks))[:tasks]


def relative(norms: np.ndarray, losses: np.ndarray, contribution: str) -> np.ndarray:
    k = norms / losses if contribution == "norm_over_loss" else losses / norms
    return k / k.mean()


# ---- IMTL ------------------------------------------------------------------------------------


@any_family
@any_count
def test_imtl_projections(kind, tasks, rng):
    """The scaled gradients project alike on the update; sum of w e^-s is 1."""
    jac = family(rng, kind, tasks, 40)
    s, losses = rng.uniform(-3, 3, tasks), random_losses(rng, tasks)
    weighting = IMTL(tasks)
    set_learned(weighting, s)
    w = weighting(tensor(oracles.gram(jac)), tensor(losses)).numpy()
    rows, slope = imtl_scaled(jac, losses, s)
    close(weighting._gradients()[0], slope, 1e-12)
    close(weighting._own_weights(None), np.exp(s), 1e-12)
    gram, alpha = oracles.gram(rows), w / np.exp(s)
    if int(weighting.last_status().bits) & FALLBACK:
        n = np.sqrt(np.diag(gram))
        close(alpha, n.min() / n / (n.min() / n).sum(), 1e-9)
        return
    ridges = (1e-8, 1e-6) if weighting.last_status().ridge_raised else (1e-10,)
    assert min(ow.imtl_g_residual(gram, alpha, r).rows for r in ridges) <= 1e-8


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_imtl_against_the_formula_of_the_paper(tasks, rng):
    jac = 3 * np.ones((tasks, 1)) + rng.standard_normal((tasks, 40))  # no fallback
    s, losses = rng.uniform(-1, 1, tasks), random_losses(rng, tasks)
    weighting = IMTL(tasks)
    set_learned(weighting, s)
    w = weighting(tensor(oracles.gram(jac)), tensor(losses))
    close(w, ow.imtl_g_paper(imtl_scaled(jac, losses, s)[0]) * np.exp(s), 1e-6)


@any_family
def test_imtl_begins_as_imtl_g(kind, rng):
    gram, losses = problem(rng, 5, kind)
    weighting, plain = IMTL(5), IMTLG()
    close(weighting(gram, losses), plain(gram), 1e-14)
    assert torch.equal(weighting.last_status().bits, plain.last_status().bits)


def test_imtl_keeps_the_direction_of_imtl_g(rng):
    """Its gradients' scales do not turn it."""
    jac = 2 + rng.standard_normal((4, 30))
    gram, losses = tensor(oracles.gram(jac)), tensor(random_losses(rng, 4))
    weighting = IMTL(4)
    set_learned(weighting, rng.uniform(-8, 8, 4))
    w, plain = weighting(gram, losses), IMTLG()(gram)
    close(w / w.sum(), plain / plain.sum(), 1e-7)


def test_imtl_is_invariant_to_the_losses_scales(rng):
    """Loss i times k_i and s_i less log k_i: the same update, gradient of s and heads' weights."""
    jac, losses = 1 + rng.standard_normal((4, 30)), random_losses(rng, 4)
    s, k = rng.uniform(-1, 1, 4), 10 ** rng.uniform(-4, 4, 4)
    one, two = IMTL(4), IMTL(4)
    set_learned(one, s), set_learned(two, s - np.log(k))
    w = one(tensor(oracles.gram(jac)), tensor(losses)).numpy()
    v = two(tensor(oracles.gram(jac * k[:, None])), tensor(losses * k)).numpy()
    close(v @ (jac * k[:, None]), w @ jac, 1e-6)
    close(two._own_weights(None) * tensor(k), one._own_weights(None), 1e-12)
    np.testing.assert_allclose(two._gradients()[0], one._gradients()[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss", [4.0, 0.3])
def test_imtl_learns_the_losses_logarithm(loss):
    weighting = IMTL(2)
    base = base_of(weighting, lr=0.2)
    for _ in range(150):
        step(weighting, base, torch.eye(2).double(), torch.tensor([loss, 1.0]).double())
    np.testing.assert_allclose(weighting.learned.detach(), [-math.log(loss), 0], atol=1e-9)
    assert float(weighting._gradients()[0].abs().max()) < 1e-9  # the fixed point


def test_imtl_slope_is_the_derivative(rng):
    s, losses = rng.uniform(-2, 2, 5), random_losses(rng, 5)
    weighting = IMTL(5)
    set_learned(weighting, s)
    weighting(torch.eye(5), tensor(losses))
    variable = tensor(s).requires_grad_()
    (variable.exp() * tensor(losses) - variable).sum().backward()
    np.testing.assert_allclose(weighting._gradients()[0], variable.grad, rtol=1e-12, atol=1e-13)


def test_imtl_with_factors_that_would_overflow(rng):
    jac = 1 + rng.standard_normal((2, 30))
    weighting = IMTL(2)
    set_learned(weighting, [400.0, 401.0])
    w = weighting(tensor(oracles.gram(jac)), torch.ones(2))
    assert weighting.last_status().ok
    shared = IMTL(2)
    set_learned(shared, [0.0, 1.0])
    close(w / w[0], (v := shared(tensor(oracles.gram(jac)), torch.ones(2))) / v[0], 1e-12)


# ---- GradNorm --------------------------------------------------------------------------------


@any_family
@any_count
def test_gradnorm_against_numpy(kind, tasks, rng):
    """Weights before the step, the slope of L_grad, and w after it."""
    alpha, lr = float(rng.uniform(0, 2)), 0.025
    weighting = GradNorm(tasks, alpha=alpha)
    base = base_of(weighting, lr=lr)
    w, first = np.ones(tasks), None
    for _ in range(4):
        gram, losses = oracles.gram(family(rng, kind, tasks, 20)), random_losses(rng, tasks)
        first = losses if first is None else first
        norms = np.sqrt(np.diag(gram))
        used = step(weighting, base, tensor(gram), tensor(losses))
        close(used, w, 1e-9)
        close(weighting._own_weights(used), w, 1e-9)
        target = gradnorm_target(w, norms, losses, first, alpha)
        slope = np.sign(w * norms - target) * norms / norms.mean()
        sure = np.abs(w * norms - target) > 1e-9 * target  # rounding decides the others
        close(weighting._gradients()[0].numpy()[sure], slope[sure], 1e-9)
        w = np.maximum(w - lr * weighting._gradients()[0].numpy(), 1e-4)
        w *= tasks / w.sum()
        close(weighting.learned.detach(), w, 1e-9)


def test_gradnorm_slope_is_a_finite_difference(rng):
    """Of L_grad with its targets held; over the mean norm."""
    gram, losses = problem(rng, 6)
    first, norms = random_losses(rng, 6), gram.diagonal().sqrt().numpy()
    weighting = GradNorm(6)
    weighting(gram, tensor(first))
    w = rng.uniform(0.2, 2, 6)
    w *= 6 / w.sum()
    set_learned(weighting, w)
    weighting(gram, losses)
    target = gradnorm_target(w, norms, losses.numpy(), first, 1.5)
    for i, h in enumerate(1e-7 * np.eye(6)):
        if abs(w[i] * norms[i] - target[i]) < 1e-6 * norms[i]:
            continue  # across the kink
        rise = gradnorm_loss(w + h, norms, target) - gradnorm_loss(w - h, norms, target)
        close(weighting._gradients()[0][i], rise / 2e-7 / norms.mean(), 1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_gradnorm_leaves_identical_tasks_alone(kind, rng):
    row = rng.standard_normal(9)
    gram = tensor(oracles.gram(np.stack([row] * 3)))
    weighting = GradNorm(3)
    base = base_of(weighting, kind)
    for k in range(5):
        step(weighting, base, gram * (k + 1), torch.full((3,), 2.0 / (k + 1)))
        np.testing.assert_allclose(weighting.learned.detach(), np.ones(3), rtol=1e-14)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_gradnorm_lowers_a_doubled_task(kind):
    weighting = GradNorm(3)
    gram = torch.diag(torch.tensor([4.0, 1, 1])).double()
    step(weighting, base_of(weighting, kind, lr=0.025), gram, torch.ones(3))
    w = weighting.learned.detach()
    assert w[0] < 1 < w[1] and w[1] == w[2]
    assert abs(float(w.sum()) - 3) < 1e-14


def test_gradnorm_raises_a_slow_task():
    """Norms alike: who has come less far gets more."""
    weighting = GradNorm(2)
    base = base_of(weighting)
    step(weighting, base, torch.eye(2), torch.tensor([1.0, 5.0]))
    before = weighting.learned.detach().clone()
    step(weighting, base, torch.eye(2), torch.tensor([0.9, 2.0]))
    assert weighting.learned[0] > before[0]


def test_gradnorm_balances_the_norms(rng):
    """alpha = 0: w_i n_i become alike."""
    norms = torch.tensor([4.0, 1.0, 0.5]).double()
    gram = torch.diag((10 ** rng.uniform(-8, 8) * norms) ** 2)
    weighting = GradNorm(3, alpha=0)
    base = base_of(weighting)
    for k in range(400):
        base.param_groups[0]["lr"] = 0.02 / (1 + k / 25)
        step(weighting, base, gram, torch.ones(3))
    balanced = weighting.learned.detach() * norms
    np.testing.assert_allclose(balanced / balanced.mean(), np.ones(3), atol=0.02)


def test_gradnorm_slope_does_not_see_a_common_scale(rng):
    gram, losses = problem(rng, 5)
    slopes = []
    for scale in (2.0**-26, 1.0, 2.0**26):
        weighting = GradNorm(5)
        weighting(gram * scale**2, losses)
        slopes.append(weighting._gradients()[0])
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[1], slopes[2])
    assert (slopes[0].abs() <= 5).all()  # at most T: no step throws w far


def test_gradnorm_w_stays_above_0_of_sum_t(rng):
    weighting = GradNorm(4)
    base = base_of(weighting, lr=3.0)  # far too much
    for _ in range(30):
        norms = tensor(10 ** rng.uniform(-8, 8, 4))
        step(weighting, base, torch.diag(norms**2), tensor(random_losses(rng, 4, 8)))
        w = weighting.learned.detach()
        assert (w > 0).all() and abs(float(w.sum()) - 4) < 1e-13


def test_gradnorm_first_losses(rng):
    """Of a missing task, the first that comes; of a loss that is 0, the first above it."""
    gram = problem(rng, 3)[0]
    weighting = GradNorm(3)
    there = torch.tensor([True, False, True])
    weighting(gram, torch.tensor([2.0, 7.0, 0.0]), there)
    first = weighting.state_dict()["first"]
    assert first[0] == 2 and first[1:].isnan().all()
    assert weighting._gradients()[0].isfinite().all()
    weighting(gram, torch.tensor([1.0, 5.0, 0.5]))
    assert weighting.state_dict()["first"].tolist() == [2.0, 5.0, 0.5]
    weighting(gram, torch.zeros(3))
    assert weighting.state_dict()["first"].tolist() == [2.0, 5.0, 0.5]
    assert weighting._gradients()[0].isfinite().all()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_gradnorm_keeps_the_w_of_a_missing_task(kind, rng):
    """To the bit, also where the base optimizer's momentum would move it; the sum stays T."""
    weighting = GradNorm(4)
    base = base_of(weighting, kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    train(weighting, base, 3)
    before = weighting.learned.detach().clone()
    gram, losses = problem(rng, 4)
    for k, there in enumerate([torch.tensor([True, True, False, True]), None]):
        if there is None:  # no gradient, and no finite one
            gram[2], gram[:, 2] = math.nan, math.nan
            gram[1], gram[:, 1] = 0, 0
            before = weighting.learned.detach().clone()
        w = step(weighting, base, gram, losses, there)
        after = weighting.learned.detach()
        for i in range(4):
            if i == 2 or (k == 1 and i == 1):
                assert after[i] == before[i] and w[i] == 0
            else:
                assert after[i] != before[i] and w[i] == before[i]
        assert abs(float(after.sum()) - 4) < 1e-13


def test_gradnorm_of_a_step_that_is_not_made(rng):
    """Nothing moves where ``ok`` is false, and what is kept goes back by ``_tensors``."""
    weighting = GradNorm(4)
    base = base_of(weighting)
    train(weighting, base, 2)
    gram, losses = problem(rng, 4)
    before = weighting.learned.detach().clone()
    step(weighting, base, gram, losses, ok=torch.tensor(False))
    assert torch.equal(weighting.learned.detach(), before)
    weighting(gram, losses)
    with torch.no_grad():
        weighting.learned.mul_(torch.tensor([2.0, 1, 1, 1]))  # as by momentum
    weighting._made(torch.tensor(False))
    assert torch.equal(weighting.learned.detach(), before)
    with torch.no_grad():
        weighting.learned.mul_(0.5)  # no call before: not this method's step
    weighting._made(None)
    assert torch.equal(weighting.learned.detach(), before * 0.5)
    fresh = GradNorm(4)
    (kept,) = fresh._tensors(gram)
    assert kept.isnan().all()
    copied = kept.clone()
    fresh(gram, losses)
    assert not kept.isnan().any()  # it is the state itself
    kept.copy_(copied)
    fresh(gram, losses * 3)
    assert torch.equal(fresh.state_dict()["first"], losses * 3)


def test_gradnorm_negative_losses(rng):
    with pytest.raises(ValueError, match=r"at least 0 for GradNorm, got -1.0 for task 1"):
        GradNorm(2)(torch.eye(2), torch.tensor([0.0, -1.0]))


# ---- EMTLLike --------------------------------------------------------------------------------


@pytest.mark.parametrize("contribution", ["norm_over_loss", "loss_over_norm"])
@any_count
def test_emtl_like_solves_its_kkt_system(contribution, tasks, rng):
    for _ in range(20):
        norms, losses = 10 ** rng.uniform(-1, 1, tasks), random_losses(rng, tasks)
        lam = float(10 ** rng.uniform(-3, 3))
        weighting = EMTLLike(lambda_=lam, contribution=contribution)
        w = weighting(tensor(np.diag(norms**2)), tensor(losses)).numpy()
        k = relative(norms, losses, contribution)
        np.testing.assert_allclose(w, emtl_kkt(k, lam), rtol=1e-8, atol=1e-9)
        assert abs(w.sum() - tasks) <= 1e-12 * tasks and (w > 0).all()
        least = emtl_objective(w, k, lam)
        for _ in range(5):  # no feasible step lowers it
            move = rng.standard_normal(tasks)
            move -= move.mean()
            assert emtl_objective(w + 1e-3 * move, k, lam) >= least * (1 - 1e-9) - 1e-12


@pytest.mark.parametrize("contribution", ["norm_over_loss", "loss_over_norm"])
def test_emtl_like_at_the_ends(contribution, rng):
    gram, losses = problem(rng, 5)
    weighting = EMTLLike(lambda_=0, contribution=contribution)
    assert torch.equal(weighting(gram, losses), torch.ones(5, dtype=torch.float64))
    k = relative(gram.diagonal().sqrt().numpy(), losses.numpy(), contribution)
    w = EMTLLike(lambda_=1e14, contribution=contribution)(gram, losses).numpy()
    close(w, 5 / k / (1 / k).sum(), 1e-9)
    close(w * k, np.full(5, (w * k).mean()), 1e-9)


def test_emtl_like_by_hand():
    """k = (1/2, 3/2), w_2 = 2 - w_1: 2(w_1 - 1)^2 + 2 (2 w_1 - 3)^2 / 4 is least where 8 w_1 = 10."""
    w = EMTLLike(lambda_=2.0)(torch.diag(torch.tensor([1.0, 9.0])), torch.tensor([1.0, 1.0]))
    close(w, [1.25, 0.75], 1e-14)


def test_emtl_like_of_wide_scales(rng):
    """Norms and losses over 1e-8..1e8: each weight against the same formula in exact fractions."""
    from fractions import Fraction

    for _ in range(10):
        norms, losses = 10 ** rng.uniform(-8, 8, 6), random_losses(rng, 6, 8)
        lam = float(10 ** rng.uniform(-3, 6))
        w = EMTLLike(lambda_=lam)(tensor(np.diag(norms**2)), tensor(losses))
        k = [Fraction(float(np.sqrt(n * n))) / Fraction(float(v)) for n, v in zip(norms, losses)]
        k = [x / (sum(k) / 6) for x in k]
        rate = Fraction(lam) / 6
        # (1 + rate k_i^2) w_i - rate k_i mean(c) = nu: w_i = (nu + rate k_i m) / d_i, by elimination
        d = [1 + rate * x * x for x in k]
        one, two = sum(1 / x for x in d), sum(x / y for x, y in zip(k, d))
        three = sum(x * x / y for x, y in zip(k, d))
        # sum w = 6: nu one + rate m two = 6;  sum k w = 6 m: nu two + rate m three = 6 m
        m = 6 * two / (one * (6 - rate * three) + rate * two * two)
        nu = (6 - rate * m * two) / one
        exact = [float((nu + rate * x * m) / y) for x, y in zip(k, d)]
        close(w, exact, 1e-12)


def test_emtl_like_does_not_see_common_scales(rng):
    gram, losses = problem(rng, 5)
    w = EMTLLike()(gram, losses)
    close(EMTLLike()(gram * 1e16, losses * 1e-8), w, 1e-13)
    close(EMTLLike()(gram * 1e-16, losses * 1e8), w, 1e-13)


def test_emtl_like_leaves_tasks_out_as_if_they_were_not_there(rng):
    gram, losses = problem(rng, 5)
    expected = EMTLLike()(gram[:3, :3], losses[:3])
    there = torch.tensor([True, True, True, False, True])
    bad = losses.clone()
    bad[3] = math.nan
    gram[4], gram[:, 4] = 0, 0
    weighting = EMTLLike()
    w = weighting(gram, bad, there)
    close(w[:3], expected, 1e-14)
    assert (w[3:] == 0).all()


@pytest.mark.parametrize("tasks", [1, 4])
def test_emtl_like_compiles(tasks, rng):
    weighting, eager = EMTLLike(lambda_=0.7), EMTLLike(lambda_=0.7)
    torch._dynamo.reset()
    compiled = torch.compile(lambda g, v: weighting(g, v), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        gram, losses = problem(rng, tasks)
        torch.testing.assert_close(compiled(gram, losses), eager(gram, losses), rtol=1e-13, atol=0)


# ---- all three -------------------------------------------------------------------------------


@each
def test_names(name):
    kind = {"imtl": IMTL, "gradnorm": GradNorm, "emtl_like": EMTLLike}[name]
    options = {"tasks": 3} if name != "emtl_like" else {}
    for spelling in (name, name.upper(), name.replace("_", "-"), name.replace("_", "")):
        assert type(by_name(spelling, **options)) is kind
    assert issubclass(kind, WithLosses) and len(kind.__doc__) > 80 and not kind.one_pass
    assert ("norms" in kind.needs) == kind.diagonal_only
    if name != "emtl_like":
        with pytest.raises(TypeError, match="tasks"):
            by_name(name)


def test_the_reconstruction_says_so():
    assert "reconstruction" in EMTLLike.__doc__ and "not the paper's" in EMTLLike.__doc__


@each
def test_one_task(name):
    weighting = make(name, 1)
    gram, losses = torch.tensor([[9.0]]), torch.tensor([2.0])
    for _ in range(3):
        if weighting.parameters():
            step(weighting, base_of(weighting), gram, losses)
        w = weighting(gram, losses)
        expected = math.exp(weighting.learned.item()) if name == "imtl" else 1.0
        assert w.shape == (1,) and abs(float(w) - expected) < 1e-14


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(name, dtype, loss_dtype, rng):
    gram, losses = problem(rng, 4)
    gram, losses = gram.to(dtype), losses.to(loss_dtype)
    w = make(name)(gram, losses)
    assert w.dtype == torch.float64 and w.shape == (4,)
    close(w, make(name)(gram.double(), losses.double()), 1e-3 if name == "imtl" else 1e-12)


@each
def test_graphs_end_here(name, rng):
    gram, losses = problem(rng, 4)
    w = make(name)(gram, losses.clone().requires_grad_())
    assert not w.requires_grad


@each
def test_the_arguments_are_not_written(name, rng):
    gram, losses = problem(rng, 4)
    copies = gram.clone(), losses.clone()
    make(name)(gram, losses)
    assert torch.equal(gram, copies[0]) and torch.equal(losses, copies[1])


@each
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_task_without_a_gradient(name, bad, rng):
    gram, losses = problem(rng, 4)
    gram[2], gram[:, 2] = bad, bad
    weighting = make(name)
    w = weighting(gram, losses)
    assert w[2] == 0 and w.isfinite().all() and (w != 0).any()
    status = weighting.last_status()
    assert status.inactive_task and not status.no_active_task and not status.ok
    assert all(g.isfinite().all() for g in weighting._gradients())
    own = weighting._own_weights(w)
    assert own is None or (own > 0).all()  # its own parameters may have one


@each
def test_no_gradients_at_all(name):
    weighting = make(name, 3)
    w = weighting(torch.zeros(3, 3), torch.ones(3))
    assert (w == 0).all() and weighting.last_status().no_active_task
    assert all((g == 0).all() for g in weighting._gradients())
    weighting._made(None)
    assert weighting.state_dict().get("w", torch.ones(3)).tolist() == [1, 1, 1]


@each
def test_a_missing_task(name, rng):
    """Its loss and its row may be anything; the others are as if it had no gradient."""
    gram, losses = problem(rng, 4)
    there = torch.tensor([True, False, True, True])
    zeroed = gram.clone()
    zeroed[1], zeroed[:, 1] = 0, 0
    found = []
    for g, v in [(zeroed, 1.0), (gram, math.nan), (gram, -3.0), (zeroed, math.inf)]:
        mine = losses.clone()
        mine[1] = v
        weighting = make(name)
        found.append(weighting(g, mine, there))
        assert found[-1][1] == 0
        assert all(s[1] == 0 for s in weighting._gradients())
    close(torch.stack(found)[:, [0, 2, 3]], torch.stack(found[:1] * 4)[:, [0, 2, 3]], 1e-12)
    weighting = make(name)
    for p in weighting.parameters():
        p.data = tensor([0.5, 1.5, 0.7, 1.3])
    weighting(gram, losses, there)
    assert all(s[1] == 0 and s[0] != 0 for s in weighting._gradients())
    weighting(gram, losses, torch.zeros(4, dtype=torch.bool))
    assert all((s == 0).all() for s in weighting._gradients())


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite(name, bad, rng):
    gram, losses = problem(rng, 4)
    losses[3] = bad
    with pytest.raises(ValueError, match=r"losses must be finite.* for task 3"):
        make(name)(gram, losses)


@pytest.mark.parametrize("name", ["imtl", "emtl_like"])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_are_not_above_0(name, bad, rng):
    gram, losses = problem(rng, 4)
    losses[3] = bad
    with pytest.raises(ValueError, match=r"losses must be above 0 .* for task 3"):
        make(name)(gram, losses)


@each
def test_wrong_arguments(name, rng):
    gram, losses = problem(rng, 4)
    with pytest.raises(TypeError, match="losses"):
        make(name)(gram)
    with pytest.raises(TypeError, match="losses"):
        make(name)(gram, [1.0] * 4)
    with pytest.raises(TypeError, match="losses"):
        make(name)(gram, losses.long())
    for wrong in (losses[:3], losses.reshape(2, 2), losses[0]):
        with pytest.raises(ValueError, match="losses"):
            make(name)(gram, wrong)
    with pytest.raises(ValueError, match="gram"):
        make(name)(gram.expand(2, 4, 4), losses)
    with pytest.raises(ValueError, match="there"):
        make(name)(gram, losses, torch.ones(4))


@learning
def test_another_number_of_tasks(name, rng):
    with pytest.raises(ValueError, match=r"losses must have one entry for each of the 3 tasks"):
        make(name, 3)(*problem(rng, 4))


@pytest.mark.parametrize("name, options, match", [
    ("imtl", {"tasks": 0}, "tasks"), ("imtl", {"tasks": 2.0}, "tasks"),
    ("gradnorm", {"tasks": True}, "tasks"), ("imtl", {"lr": "fast"}, "lr"),
    ("gradnorm", {"lr": -1.0}, "lr"), ("gradnorm", {"alpha": -1}, "alpha"),
    ("gradnorm", {"alpha": math.nan}, "alpha"), ("emtl_like", {"lambda_": -1.0}, "lambda_"),
    ("emtl_like", {"lambda_": math.inf}, "lambda_"), ("emtl_like", {"lambda_": "1"}, "lambda_"),
    ("emtl_like", {"contribution": "both"}, "contribution"), ("imtl", {"scaling": "x"}, "scaling"),
    ("gradnorm", {"max_norm": 0}, "max_norm"),
])  # fmt: skip
def test_wrong_options(name, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make(name, **options)


@each
def test_scaling_and_max_norm(name, rng):
    gram, losses = problem(rng, 4)
    raw = make(name)(gram, losses)
    if raw.sum() > 0:
        close(make(name, scaling="sum_to_tasks")(gram, losses), raw * 4 / raw.sum(), 1e-12)
    weighting = make(name, max_norm=0.01)
    assert not weighting.diagonal_only
    w = weighting(gram, losses)
    assert float(w @ gram @ w) <= 1e-4 * (1 + 1e-9)


@each
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scales(name, scale, rng):
    """Norms and losses far apart: finite, and of a status that says what happened."""
    tasks = 5
    jac = family(rng, "mixed_norms", tasks, 30)
    for losses in (random_losses(rng, tasks, 8), scale * random_losses(rng, tasks)):
        weighting = make(name, tasks)
        base = base_of(weighting, torch.optim.Adam) if weighting.parameters() else None
        for _ in range(5):
            if base:
                w = step(weighting, base, tensor(oracles.gram(jac * scale)), tensor(losses))
            else:
                w = weighting(tensor(oracles.gram(jac * scale)), tensor(losses))
            assert w.isfinite().all() and (w != 0).all()
            assert not int(weighting.last_status().bits) & (NO_ACTIVE | SOME_INACTIVE)
            assert all(p.isfinite().all() for p in weighting.parameters())


# ---- what is learned and kept ----------------------------------------------------------------


@learning
def test_the_learnable(name):
    weighting = make(name, 3)
    (p,) = weighting.parameters()
    assert isinstance(p, torch.nn.Parameter) and p.dtype == torch.float64 and p.shape == (3,)
    assert p is weighting.learned and weighting.tasks == 3
    assert weighting.lr == (0.025 if name == "gradnorm" else None)
    assert (weighting._gradients()[0] == 0).all()  # nothing to move before the first call
    assert not any(t is p for t in weighting._tensors(torch.eye(3)))  # not undone


def test_nothing_is_learned_or_kept_by_emtl_like():
    assert EMTLLike().parameters() == [] and EMTLLike().state_dict() == {}
    assert EMTLLike()._tensors(torch.eye(3)) == []


@learning
@pytest.mark.parametrize("before", [0, 1, 4])
def test_resumes_to_the_bit(name, before):
    weighting = make(name)
    base = base_of(weighting, torch.optim.Adam)
    train(weighting, base, before)
    stream = io.BytesIO()
    torch.save([weighting.state_dict(), base.state_dict()], stream)
    expected = train(weighting, base, 5, before)
    stream.seek(0)
    saved, base_saved = torch.load(stream, weights_only=True)
    resumed = make(name)
    again = base_of(resumed, torch.optim.Adam)
    train(resumed, again, 2, first=50)
    p = resumed.learned
    resumed.load_state_dict(saved), again.load_state_dict(base_saved)
    assert resumed.learned is p  # in place
    assert same(expected, train(resumed, again, 5, before))
    assert torch.equal(resumed.learned, weighting.learned)


@learning
def test_a_saved_state_is_a_snapshot(name):
    weighting = make(name)
    base = base_of(weighting)
    train(weighting, base, 2)
    state = weighting.state_dict()
    expected = train(weighting, base, 3, 2)
    for _ in range(2):
        weighting.load_state_dict(state)
        assert same(expected, train(weighting, base, 3, 2))


@learning
def test_reset(name):
    weighting = make(name)
    base, p = base_of(weighting), weighting.learned
    first = train(weighting, base, 4)
    weighting.reset()
    assert weighting.learned is p and (weighting._gradients()[0] == 0).all()
    assert same(first, train(weighting, base, 4))


@learning
def test_twin(name):
    """A learnable and a state of its own, as new."""
    weighting, control = make(name), make(name)
    base, control_base = base_of(weighting), base_of(control)
    train(weighting, base, 3), train(control, control_base, 3)
    twin = weighting.twin()
    assert isinstance(twin.learned, torch.nn.Parameter) and twin.learned is not weighting.learned
    assert twin.learned.data_ptr() != weighting.learned.data_ptr()
    fresh = make(name)
    assert same(train(twin, base_of(twin), 4), train(fresh, base_of(fresh), 4))
    assert same(train(weighting, base, 3, 3), train(control, control_base, 3, 3))


@learning
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_copied_together_with_a_base_optimizer(name, way, kind):
    """The copy's base optimizer holds the copy's learnable, and both go on as these do."""
    weighting = make(name)
    base = base_of(weighting, kind)
    train(weighting, base, 3)
    pair = (weighting, base)
    other, other_base = (
        copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert other_base.param_groups[0]["params"][0] is other.parameters()[0]
    assert other.parameters()[0] is not weighting.parameters()[0]
    assert same(train(weighting, base, 3, 3), train(other, other_base, 3, 3))
    assert torch.equal(weighting.learned, other.learned)


@learning
@pytest.mark.parametrize("wrong", [
    {}, {"nonsense": 1}, "more", "types", "shapes", "dtypes", "nan", "size",
])  # fmt: skip
def test_a_wrong_state_is_refused_and_nothing_is_taken_up(name, wrong):
    weighting, expected = make(name), make(name)
    base, expected_base = base_of(weighting), base_of(expected)
    train(weighting, base, 2), train(expected, expected_base, 2)
    state = weighting.state_dict()
    if wrong == "more":
        wrong = {**state, "more": torch.zeros(1)}
    elif wrong == "types":
        wrong = {k: "text" for k in state}
    elif wrong == "shapes":
        wrong = {k: v.reshape(2, 2) for k, v in state.items()}
    elif wrong == "dtypes":
        wrong = {k: v.float() for k, v in state.items()}
    elif wrong == "nan":
        wrong = {k: torch.full_like(v, math.nan) for k, v in state.items()}
    elif wrong == "size":
        wrong = make(name, 3).state_dict()
    with pytest.raises(ValueError, match="state"):
        weighting.load_state_dict(wrong)
    assert same(train(weighting, base, 2, 2), train(expected, expected_base, 2, 2))


@pytest.mark.parametrize("w", [[2.0, 2, 0, 0], [1.0, 1, 1, 2], [3.0, 3, -1, -1]])
def test_gradnorm_refuses_a_w_that_is_none(w):
    weighting = GradNorm(4)
    with pytest.raises(ValueError, match="'w'"):
        weighting.load_state_dict({"w": tensor(w), "first": None})
    with pytest.raises(ValueError, match="'first'"):
        weighting.load_state_dict({"w": torch.ones(4).double(), "first": torch.ones(3).double()})


@learning
def test_the_learnable_moves_to_the_losses_device_in_place(name, device, rng):
    weighting = make(name)
    p = weighting.learned
    gram, losses = problem(rng, 4)
    w = weighting(gram.to(device), losses.to(device))
    assert weighting.learned is p and p.device.type == device and w.device.type == device


@each
def test_on_a_gpu_a_wrong_loss_is_a_task_that_is_not_there(name, device, rng):
    if device == "cpu":
        pytest.skip("an error there")
    gram, losses = problem(rng, 4)
    losses[1] = -1.0
    weighting = make(name)
    w = weighting(gram.to(device), losses.to(device))
    assert w[1] == 0 and weighting.last_status().invalid_loss


def test_the_last_status_is_not_copied(rng):
    for name in BOTH:
        weighting = make(name)
        weighting(*problem(rng, 4))
        with pytest.raises(RuntimeError):
            copy.deepcopy(weighting).last_status()
        assert isinstance(weighting, Weighting)
