"""The methods that look at losses alone: their formulas, their state, missing tasks, bad input."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from methods import LOSS, make

from flatmtl import weighting as package
from flatmtl.weighting import (
    BMTL,
    DWA,
    FAMO,
    GLS,
    IMTLL,
    SLAW,
    STCH,
    GO4Align,
    RandomLossWeighting,
    ScaleInvariant,
    UncertaintyWeighting,
    by_name,
)
from flatmtl.weighting._loss import LossWeighting

TASKS = 5
STATELESS = ["gls", "si", "bmtl", "stch", "uw", "imtl_l"]
KEEPERS = {
    "slaw": {}, "famo": {}, "dwa": {"steps": 3}, "stch": {"warmup": 6, "average": 4},
    "go4align": {"beta": 0.1}, "uw": {}, "imtl_l": {},
}  # fmt: skip
keepers = pytest.mark.parametrize("name", KEEPERS)
each = pytest.mark.parametrize("name", LOSS)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def positive(rng, tasks: int = TASKS, spread: float = 1.0) -> np.ndarray:
    return 10 ** rng.uniform(-spread, spread, tasks)


def some(rng, tasks: int = TASKS, least: int = 1) -> np.ndarray:
    there = rng.random(tasks) < 0.6
    there[rng.permutation(tasks)[:least]] = True
    return there


def close(got: torch.Tensor, expected: np.ndarray | list, rtol: float = 1e-10) -> None:
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=1e-300)


def step(method: LossWeighting, losses: torch.Tensor, there=None, lr: float = 0.1) -> torch.Tensor:
    """A call, and what moves the method between calls."""
    weights = method(losses, there)
    if isinstance(method, FAMO):
        method.update(losses * torch.linspace(0.7, 1.1, len(losses)), there)
    with torch.no_grad():
        for parameter, gradient in zip(method.parameters(), method._gradients(), strict=True):
            parameter -= lr * gradient
    return weights


def fresh(name: str, tasks: int = TASKS, **options) -> LossWeighting:
    return make(name, tasks, **{**KEEPERS.get(name, {}), **options})


def series(steps: int, first: int = 0) -> list[torch.Tensor]:
    return [
        torch.from_numpy(positive(np.random.default_rng(k), TASKS, 0.3))
        for k in range(first, first + steps)
    ]


def run(method: LossWeighting, steps: int, first: int = 0) -> list[torch.Tensor]:
    return [step(method, losses) for losses in series(steps, first)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- names and the contract of the base class -------------------------------------------------


@each
def test_by_name(name):
    method = make(name)
    assert isinstance(method, LossWeighting) and type(method) is package.METHODS[name]
    assert method.one_pass and method.needs == "losses" and len(type(method).__doc__) > 80
    assert method.looks_back == (name == "famo")
    for spelling in (name.upper(), name.replace("_", "-")):
        options = {"uw": {"tasks": 2}, "imtl_l": {"tasks": 2}, "go4align": {"groups": 1}}
        assert type(by_name(spelling, **options.get(name, {}))) is type(method)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, rng):
    """Weights are float64, of the losses as they are."""
    losses = torch.from_numpy(positive(rng)).to(dtype)
    w = make(name, TASKS)(losses.clone().requires_grad_())
    assert w.dtype == torch.float64 and w.shape == (TASKS,) and not w.requires_grad
    assert torch.equal(w, make(name, TASKS)(losses.double()))


@each
def test_losses_are_not_written(name, rng):
    losses = torch.from_numpy(positive(rng))
    before, method = losses.clone(), fresh(name)
    for _ in range(3):
        w = step(method, losses, torch.from_numpy(some(rng)))
        kept = w.clone()
        step(method, losses)
        assert torch.equal(w, kept) and torch.equal(losses, before)  # nor are weights given out


@each
def test_one_task(name):
    method = fresh(name, 1)
    for value in (3.0, 1.0, 2.0):
        w = step(method, vector(value))
        assert w.shape == (1,) and w.isfinite().all() and w > 0
    if name in ("slaw", "famo", "dwa", "bmtl", "gls"):
        close(w, [1.0])


@each
def test_scaling(name, rng):
    for losses in [positive(rng) for _ in range(3)]:
        raw = make(name, TASKS)(torch.from_numpy(losses))
        one = make(name, TASKS, scaling="sum_to_one")(torch.from_numpy(losses))
        many = make(name, TASKS, scaling="sum_to_tasks")(torch.from_numpy(losses))
        close(one, (raw / raw.sum()).numpy())
        close(many, (TASKS * raw / raw.sum()).numpy())


@each
def test_permutation(name, rng):
    method, other = fresh(name), fresh(name)
    order = torch.from_numpy(rng.permutation(TASKS))
    for _ in range(9):
        losses = torch.from_numpy(positive(rng))
        there = torch.from_numpy(some(rng))
        w, v = method(losses, there), other(losses[order], there[order])
        close(v, w[order].numpy(), rtol=1e-9)
        if name == "famo":
            after = torch.from_numpy(positive(rng))
            method.update(after, there), other.update(after[order], there[order])


@each
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_scales(name, scale, rng):
    """Finite, not negative, some weight; each method's own oracle looks at the values."""
    method = fresh(name, **({"init": np.log(scale)} if name == "uw" else {}),
                   **({"init": -np.log(scale)} if name == "imtl_l" else {}))  # fmt: skip
    for _ in range(5):
        w = step(method, torch.from_numpy(positive(rng) * scale))
        assert w.isfinite().all() and (w >= 0).all() and (w > 0).any()


@each
def test_wildly_different_scales(name, rng):
    method = make(name, TASKS)
    for _ in range(4):
        losses = torch.from_numpy(np.array([1e-8, 1e-4, 1, 1e4, 1e8]) * rng.uniform(0.5, 2, 5))
        w = method(losses)
        assert w.isfinite().all() and (w >= 0).all() and (w > 0).any()


# ---- missing tasks ----------------------------------------------------------------------------


@each
def test_missing_tasks_have_no_weight_and_no_say(name, rng):
    """Whatever stands in their place; for the others it is as if they were not there."""
    a, b = fresh(name), fresh(name)
    there = torch.from_numpy(np.array([True, False, True, False, True])[rng.permutation(5)])
    alone = fresh(name, 3)
    for _ in range(9):
        losses = torch.from_numpy(positive(rng))
        other = losses.clone()
        other[~there] = torch.tensor([float("nan"), -float("inf")], dtype=torch.float64)
        w, v, u = step(a, losses, there), step(b, other, there), alone(losses[there])
        assert (w[~there] == 0).all() and torch.equal(w, v)
        if name == "famo":
            steps = torch.linspace(0.7, 1.1, TASKS)[there]
            alone.update(losses[there] * steps)
        elif name in ("uw", "imtl_l"):
            with torch.no_grad():
                alone.parameters()[0].sub_(0.1 * alone._gradients()[0])
            assert (a._gradients()[0][~there] == 0).all()
        if (
            name == "go4align" or name == "stch" and not fresh(name).warmup
        ):  # q of those there sums to 3/5
            u = u * 3 / 5
        close(w[there], u.numpy(), rtol=1e-9)


@keepers
def test_the_state_of_a_missing_task_stays(name, rng):
    method = fresh(name)
    run(method, 4)
    there = mask(1, 0, 1, 1, 0)
    (entry, before) = next(iter(method.state_dict().items()))
    step(method, torch.from_numpy(positive(rng)), there)
    after = method.state_dict()[entry]
    held = before[..., ~there], after[..., ~there]
    if name == "famo":  # but for the losses of the last call, which it was not in
        held = before[:4, ~there], after[:4, ~there]
        assert after[4, ~there].isnan().all()
    assert torch.equal(held[0].nan_to_num(7), held[1].nan_to_num(7))
    assert not torch.equal(before[..., there], after[..., there])


@each
def test_no_task_there(name):
    method = fresh(name)
    run(method, 3)
    before = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    w = step(method, torch.full((TASKS,), torch.nan), torch.zeros(TASKS, dtype=torch.bool))
    assert (w == 0).all()
    for key, value in before.items():
        got = method.state_dict()[key]
        rows = slice(4) if name == "famo" else slice(None)
        assert torch.equal(got[rows].nan_to_num(7), value[rows].nan_to_num(7))
    assert all(x.isfinite().all() for x in run(method, 2))


# ---- each method's values ---------------------------------------------------------------------


def gradient(total, losses: np.ndarray) -> np.ndarray:
    """Of a total written with torch, by autograd."""
    leaf = torch.from_numpy(losses).requires_grad_()
    total(leaf).backward()
    return leaf.grad.numpy()


TOTALS = {
    "gls": (lambda: GLS(), lambda x: x.prod() ** (1 / len(x))),
    "si": (lambda: ScaleInvariant(), lambda x: x.log().sum()),
    "log1p": (lambda: ScaleInvariant(log1p=True), lambda x: x.log1p().sum()),
    "bmtl": (lambda: BMTL(temperature=0.7), lambda x: TASKS * 0.7 * (x / 0.7).exp().sum().log()),
    "bmtl_unbounded": (
        lambda: BMTL(temperature=3.0, bounded=False), lambda x: (x / 3.0).exp().sum()),
    "stch": (lambda: STCH(mu=0.3), lambda x: 0.3 * (x / TASKS / 0.3).exp().sum().log()),
    "stch_options": (
        lambda: STCH(mu=0.2, preference=[0.1, 0.2, 0.3, 0.0, 0.4], reference=[-1, 0, 0.1, 0, 0.2]),
        lambda x: 0.2 * (torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4], dtype=x.dtype)
                         * (x - vector(-1, 0, 0.1, 0, 0.2)) / 0.2).exp().sum().log()),
    "uw": (lambda: UncertaintyWeighting(TASKS, init=[0.3, -1, 0, 2, 1]),
           lambda x: (0.5 * torch.exp(-vector(0.3, -1, 0, 2, 1)) * x).sum()),
    "imtl_l": (lambda: IMTLL(TASKS, init=0.4), lambda x: (np.exp(0.4) * x - 0.4).sum()),
}  # fmt: skip


@pytest.mark.parametrize("case", TOTALS)
def test_weights_are_the_gradient_of_the_total(case, rng):
    made, total = TOTALS[case]
    for _ in range(5):
        losses = positive(rng)
        close(made()(torch.from_numpy(losses)), gradient(total, losses), rtol=1e-9)


def test_famo_weights_are_the_gradient_of_the_total(rng):
    method = FAMO(min_losses=[0, -1, 0.01, 0, 0])
    run(method, 5)
    z = method.state_dict()["logits"][0].softmax(0)
    low, losses = vector(0, -1, 0.01, 0, 0), positive(rng)
    c = 1 / (z / (torch.from_numpy(losses) - low + 1e-8)).sum()
    expected = gradient(lambda x: c * (z * (x - low + 1e-8).log()).sum(), losses)
    close(method(torch.from_numpy(losses)), expected)


ORACLES = {
    "slaw": (lambda: SLAW(), lambda: oracle.Slaw(TASKS)),
    "slaw_short": (lambda: SLAW(beta=0.8, eps=1e-30), lambda: oracle.Slaw(TASKS, 0.8, 1e-30)),
    "famo": (lambda: FAMO(), lambda: oracle.Famo(TASKS)),
    "famo_options": (
        lambda: FAMO(lr=0.2, weight_decay=0.1, min_losses=[0.1] * TASKS, eps=1e-4),
        lambda: oracle.Famo(TASKS, 0.2, 0.1, 0.1, 1e-4)),
    "dwa": (lambda: DWA(), lambda: oracle.Dwa(TASKS)),
    "dwa_periods": (
        lambda: DWA(temperature=0.5, steps=4), lambda: oracle.Dwa(TASKS, 0.5, 4)),
    "stch": (
        lambda: STCH(mu=0.5, warmup=7), lambda: oracle.StchWarm(TASKS, 0.5, 7, 7)),
    "stch_average": (
        lambda: STCH(mu=0.1, warmup=8, average=3), lambda: oracle.StchWarm(TASKS, 0.1, 8, 3)),
    "go4align": (lambda: GO4Align(2), lambda: oracle.Go4Align(TASKS, 2)),
    "go4align_beta": (lambda: GO4Align(3, beta=0.05), lambda: oracle.Go4Align(TASKS, 3, 0.05)),
}  # fmt: skip


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("case", ORACLES)
def test_a_run_beside_the_oracle(case, missing, rng):
    method, expected = (build() for build in ORACLES[case])
    level = positive(rng)
    for k in range(140 if case.startswith("slaw") else 40):
        losses = level * positive(rng, spread=0.3)
        there = some(rng) if missing else np.ones(TASKS, bool)
        given = torch.from_numpy(there) if missing or k % 2 else None
        close(method(torch.from_numpy(losses), given), expected(losses, there), rtol=1e-8)
        if isinstance(method, FAMO):
            after = losses * rng.uniform(0.5, 1.1, TASKS)
            late = there & (rng.random(TASKS) < 0.9) if missing else there
            method.update(torch.from_numpy(after), torch.from_numpy(late) if missing else None)
            expected.update(after, late)


def test_known_answers_slaw():
    method = SLAW()
    for _ in range(5):
        close(method(vector(3, 7, 0.1)), [1, 1, 1])  # constant
    method = SLAW()
    for k in range(20):
        w = method(vector(3 + (-1) ** k, 5 + 4 * (-1) ** k))
    close(w, [1.6, 0.4])  # deviations 1 : 4
    a, b, k = SLAW(eps=1e-30), SLAW(eps=1e-30), vector(1e-3, 1, 50)
    for losses in series(150):
        v, u = a(losses[:3]), b(losses[:3] * k)
    close(u, (3 * v / k / (v / k).sum()).numpy(), rtol=1e-9)  # w_i as 1 / k_i
    assert abs(float(v.sum()) - 3) < 1e-12


def test_slaw_does_not_cancel(rng):
    """Losses of 1e8 that vary by 1: E[L^2] - E[L]^2 as a difference has no digit left."""
    method, noise = SLAW(), rng.standard_normal((300, 2)) * np.array([1.0, 2.0])
    exact = oracle.Slaw(2)
    for row in noise:
        w = method(torch.from_numpy(1e8 + row))
        e = exact(row, np.ones(2, bool))
    close(w, e, rtol=1e-5)


def test_slaw_eps_decides_for_tiny_losses():
    coarse, fine = SLAW(), SLAW(eps=1e-20)
    for losses in series(10):
        a, b = coarse(losses * 1e-8), fine(losses * 1e-8)
    close(a, np.ones(TASKS))
    assert float((b - 1).abs().max()) > 0.01


def test_slaw_a_task_that_comes_late():
    """Its first loss says nothing about its deviation: weight 1, not 1 / eps."""
    method = SLAW()
    for losses in series(5):
        method(losses, mask(1, 1, 1, 1, 0))
    w = method(series(1, 5)[0])
    assert w[4] == 1.0 and abs(float(w.sum()) - 5) < 1e-12


def test_known_answers_famo():
    method = FAMO(weight_decay=0)
    close(method(vector(1, 3)), [0.75, 0.25], rtol=1e-7)
    method.update(vector(np.exp(-0.2), 3 * np.exp(-0.1)))
    close(method.state_dict()["logits"][0], [-0.025, 0.025], rtol=1e-5)


def test_famo_is_torch_s_adam(rng):
    method, logits = FAMO(weight_decay=0.01), torch.zeros(TASKS, dtype=torch.float64)
    logits.requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=0.01)
    for _ in range(50):
        before, after = torch.from_numpy(positive(rng)), torch.from_numpy(positive(rng))
        method(before)
        method.update(after)
        adam.zero_grad()
        fall = (before + 1e-8).log() - (after + 1e-8).log()
        logits.softmax(0).backward(fall)
        adam.step()
    np.testing.assert_allclose(
        method.state_dict()["logits"][0], logits.detach(), rtol=1e-9, atol=1e-12
    )


def test_famo_at_its_minimum():
    """A loss at or below it: the divisor is eps, nothing is NaN."""
    for value in (1.0, 0.5, -3.0):
        method = FAMO(min_losses=[1.0, 0.0])
        close(method(vector(value, 2.0)), [1, 5e-9], rtol=1e-7)
        method.update(vector(0.5, 1.0))
    assert method.state_dict()["logits"][:4].isfinite().all()


def test_famo_update():
    method = FAMO()
    with pytest.raises(RuntimeError, match="called"):
        method.update(vector(1, 2))
    method(vector(1, 2))
    with pytest.raises(ValueError, match="finite"):
        method.update(vector(1, np.nan))
    with pytest.raises(ValueError, match="reset"):
        method.update(vector(1, 2, 3))
    other = copy.deepcopy(method)
    other._after_step(vector(0.5, 2), None)
    method.update(vector(0.5, 2))
    assert torch.equal(method.state_dict()["logits"], other.state_dict()["logits"])


@pytest.mark.parametrize("kind", [UncertaintyWeighting, IMTLL])
def test_learned_scales_find_their_fixed_point(kind):
    method = kind(2, init=[0.0, 0.3])
    sgd = torch.optim.SGD(method.parameters(), lr=0.3)
    for _ in range(400):
        w = method(vector(4, 0.5))
        method.parameters()[0].grad = method._gradients()[0]
        sgd.step()
    sign = 1 if kind is UncertaintyWeighting else -1
    close(method.state_dict()["s"], sign * np.log([4, 0.5]), rtol=1e-9)
    close(w, [0.125, 1] if kind is UncertaintyWeighting else [0.25, 2], rtol=1e-9)


@pytest.mark.parametrize("kind", [UncertaintyWeighting, IMTLL])
def test_learned_scales_have_the_gradient_of_the_total(kind, rng):
    s, losses = rng.standard_normal(TASKS), positive(rng)
    method = kind(TASKS, init=s)
    w = method(torch.from_numpy(losses))
    x = torch.from_numpy(losses)
    if kind is UncertaintyWeighting:
        expected = oracle.uw(losses, s)
        slope = gradient(lambda t: (0.5 * (-t).exp() * x + 0.5 * t).sum(), s)
    else:
        expected = oracle.imtl_l(losses, s)
        slope = gradient(lambda t: (t.exp() * x - t).sum(), s)
    close(w, expected[0])
    np.testing.assert_allclose(method._gradients()[0], expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(method._gradients()[0], slope, rtol=1e-9, atol=1e-12)


def test_learned_scales_are_one_parameter_for_good():
    method = UncertaintyWeighting(3, init=0.5, lr=0.01)
    (s,) = method.parameters()
    assert isinstance(s, torch.nn.Parameter) and s.dtype == torch.float64 and method.lr == 0.01
    method.load_state_dict({"s": vector(1, 2, 3)})
    assert method.parameters()[0] is s and torch.equal(s.detach(), vector(1, 2, 3))
    method.reset()
    assert method.parameters()[0] is s and torch.equal(s.detach(), vector(0.5, 0.5, 0.5))
    assert method._tensors(vector(1, 1, 1)) == []  # the base step alone moves it
    assert method.twin().parameters()[0] is not s


def test_known_answers_dwa():
    method = DWA()
    close(method(vector(1, 1)), [1, 1])
    close(method(vector(1, 0.5)), [1, 1])
    close(method(vector(9, 9)), 2 * oracle.softmax(np.array([0.5, 0.25])))
    method = DWA(steps=2)
    for losses in ([1, 1], [3, 1], [1, 3], [1, 5], [7, 7]):
        w = method(vector(*losses))
    close(w, 2 * oracle.softmax(np.array([0.25, 2.0])))  # means 2, 1 and 1, 4


def test_identities_of_bmtl(rng):
    losses = positive(rng, spread=0.5)
    given = torch.from_numpy(losses)
    for temperature in (0.3, 2.0, 50.0):
        bounded = BMTL(temperature=temperature)(given)
        free = BMTL(temperature=temperature, bounded=False)(given)
        close(bounded / bounded.sum(), (free / free.sum()).numpy())
        assert abs(float(bounded.sum()) - TASKS) < 1e-12
        close(bounded, oracle.bmtl(losses, temperature, True))
        close(free, oracle.bmtl(losses, temperature, False))
    w = BMTL(temperature=2.0, bounded=False)(vector(3, 1))
    close(w[0] / w[1], np.exp(1.0))
    close(BMTL(temperature=1e12)(given), np.ones(TASKS), rtol=1e-9)
    largest = np.eye(TASKS)[losses.argmax()] * TASKS
    close(BMTL(temperature=1e-9)(given), largest)
    close(BMTL(temperature=5e-324)(given), largest)


def test_bmtl_does_not_overflow():
    w = BMTL(temperature=0.1, bounded=False)(vector(1e8, 1, 0.1))
    assert w.float().isfinite().all() and w[0] > 1e30
    close(w[1:], [10 * np.exp(10), 10 * np.exp(1)])
    close(BMTL(temperature=0.1)(vector(1e8, 1, 0.1)), [3, 0, 0])


def test_gls_does_not_overflow(rng):
    losses = np.full(64, 1e200) * rng.uniform(1, 2, 64)
    close(GLS()(torch.from_numpy(losses)), oracle.gls(losses), rtol=1e-9)
    losses = positive(rng, spread=8)
    close(GLS()(torch.from_numpy(losses)), oracle.gls(losses), rtol=1e-9)
    # the scale-invariant direction, times the geometric mean
    si = ScaleInvariant()(torch.from_numpy(losses))
    close(GLS()(torch.from_numpy(losses)) / si, np.full(5, oracle.gls(losses)[0] * losses[0]), 1e-9)


def test_scale_invariant():
    close(ScaleInvariant()(vector(2, 1e-8, 1e8)), [0.5, 1e8, 1e-8])
    close(ScaleInvariant(log1p=True)(vector(1, 0, -0.5)), [0.5, 1, 1])


def test_stch_of_the_tasks_that_are_there(rng):
    losses, there = positive(rng), some(rng)
    w = STCH(mu=0.2)(torch.from_numpy(losses), torch.from_numpy(there))
    expected = np.zeros(TASKS)
    expected[there] = oracle.softmax(losses[there] / TASKS / 0.2) / TASKS
    close(w, expected)


def test_limits_of_stch(rng):
    losses = positive(rng)
    given = torch.from_numpy(losses)
    largest = np.eye(TASKS)[losses.argmax()] / TASKS
    close(STCH(mu=1e-9)(given), largest)
    close(STCH(mu=5e-324)(given), largest)
    close(STCH(mu=1e12)(given), np.full(TASKS, 1 / TASKS**2), rtol=1e-9)
    preference, reference = rng.random(TASKS), losses - rng.random(TASKS)
    w = STCH(mu=0.1, preference=preference, reference=reference)(given)
    close(w, oracle.stch(losses, 0.1, preference, reference))
    aims = preference * (losses - reference)
    w = STCH(mu=1e-9, preference=preference, reference=reference)(given)
    close(w, np.eye(TASKS)[aims.argmax()] * preference)


def test_stch_after_its_warm_up():
    method = STCH(mu=1.0, warmup=2)
    for losses in ([1, 1], [3, 1]):
        close(method(vector(*losses)), [1 / losses[0], 1 / losses[1]])
    for _ in range(2):  # means 2, 1: relative losses 2, 1
        close(method(vector(4, 1)), [2 * 2 / 3 / 4, 2 / 3])


def test_groups_of_go4align(rng):
    losses = positive(rng, 7)
    given = torch.from_numpy(losses)
    gamma = losses.mean() / losses * oracle.softmax(-1e-4 * losses)
    close(GO4Align(7)(given), gamma, rtol=1e-9)
    close(GO4Align(1)(given), np.full(7, gamma.mean()), rtol=1e-9)
    for groups in range(1, 8):
        w = GO4Align(groups)(given)
        assert len(set(w.tolist())) == groups
        close(w, oracle.k_means(gamma, groups), rtol=1e-9)
    w = GO4Align(2)(vector(1, 1.1, 9, 10, 0.9))
    assert w[0] == w[1] == w[4] and w[2] == w[3] and w[0] > w[2]
    equal = GO4Align(3)(vector(2, 2, 2, 2))
    close(equal, np.full(4, 0.25))


def test_go4align_remembers():
    """beta = 0 does not; else a task whose losses were larger has less weight."""
    method, control = GO4Align(2, beta=0.5), GO4Align(2, beta=0.0)
    for _ in range(4):
        method(vector(1, 2)), control(vector(1, 2))
    close(method(vector(1, 1)), oracle.softmax(-0.5 * np.array([5.0, 9.0])))
    close(control(vector(1, 1)), [0.5, 0.5])
    for _ in range(300):  # q underflows as a number, not as a logarithm
        method(vector(1, 1e3))
    assert method.state_dict()["log_q"].isfinite().all()
    assert method(vector(1, 1)).isfinite().all()


def test_rlw_in_one_pass(rng):
    losses, there = torch.from_numpy(positive(rng, 4)), mask(1, 0, 1, 1)
    for given in (None, there):
        method, control = RandomLossWeighting(seed=5), RandomLossWeighting(seed=5)
        for _ in range(3):
            w = method._at_step(None, losses, given)
            eye = torch.ones(4) if given is None else given.double()
            assert torch.equal(w, control(torch.diag(eye).double()))
            assert method._own_weights(w) is w
    assert (w[1] == 0) and (w[[0, 2, 3]] > 0).all()
    assert RandomLossWeighting().one_pass
    clipped = RandomLossWeighting(max_norm=1.0)  # the norm is the Gram matrix's to tell
    assert not clipped.one_pass and clipped._own_weights(w) is None
    gram = torch.eye(4, dtype=torch.float64) * 9
    assert torch.equal(clipped._at_step(gram, None, None), RandomLossWeighting(max_norm=1.0)(gram))


# ---- state ------------------------------------------------------------------------------------


@keepers
def test_the_state_matters(name):
    method = fresh(name)
    run(method, 8)
    assert not same(run(method, 4), run(fresh(name), 4))


@keepers
@pytest.mark.parametrize("before", [0, 1, 2, 5, 8])
def test_resumes_to_the_bit(name, before):
    method = fresh(name)
    run(method, before)
    stream = io.BytesIO()
    torch.save(method.state_dict(), stream)
    expected = run(method, 9, before)
    stream.seek(0)
    resumed = fresh(name)
    run(resumed, 3, 50)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert same(expected, run(resumed, 9, before))


def test_famo_resumes_between_a_step_and_its_losses():
    method = FAMO()
    run(method, 3)
    method(series(1, 3)[0])
    other = FAMO()
    other.load_state_dict(method.state_dict())
    for m in (method, other):
        m.update(series(1, 4)[0])
    assert same(run(method, 3), run(other, 3))


@keepers
def test_a_saved_state_is_a_snapshot(name):
    method = fresh(name)
    run(method, 5)
    state = method.state_dict()
    expected = run(method, 4, 5)
    for _ in range(2):
        method.load_state_dict(state)
        assert same(expected, run(method, 4, 5))


@keepers
def test_what_an_optimizer_undoes(name):
    """``_tensors`` put back is a call that was not made."""
    method = fresh(name)
    run(method, 5)
    losses = series(1, 5)[0]
    held = method._tensors(losses)
    before = [h.clone() for h in held]
    first = method(losses)
    for h, b in zip(held, before, strict=True):
        h.copy_(b)
    assert torch.equal(first, method(losses))


@each
def test_reset_twin_copies(name):
    method = fresh(name)
    first = run(method, 9)
    copies = [copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    twin = method.twin()
    assert type(twin) is type(method) and same(first, run(twin, 9))
    expected = run(method, 3, 9)
    for other in copies:
        assert same(expected, run(other, 3, 9))
    method.reset()
    assert same(first, run(method, 9))


@keepers
def test_wrong_states(name):
    method, control = fresh(name), fresh(name)
    run(method, 2), run(control, 2)
    entry = next(iter(method.state_dict()))
    for wrong in ({}, {entry: "text"}, {entry: torch.zeros(1, 1, 1, 1, dtype=torch.float64)},
                  {**method.state_dict(), "more": 1}):  # fmt: skip
        with pytest.raises(ValueError, match="state"):
            method.load_state_dict(wrong)
    assert same(run(method, 2, 2), run(control, 2, 2))


@keepers
def test_another_number_of_tasks(name):
    method = fresh(name)
    run(method, 2)
    with pytest.raises(ValueError, match=r"reset\(\)|entry for each"):
        method(vector(1, 2, 3))


# ---- bad input --------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("losses", [
    torch.tensor([]), torch.tensor(1.0), torch.ones(2, 2), torch.ones(5).long(), [1.0, 2.0],
])  # fmt: skip
def test_wrong_losses(name, losses):
    with pytest.raises((ValueError, TypeError), match="losses"):
        fresh(name)(losses)


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_must_be_finite(name, bad):
    losses = torch.ones(TASKS)
    losses[3] = bad
    with pytest.raises(ValueError, match="finite, got .* for task 3"):
        make(name, TASKS)(losses)
    make(name, TASKS)(losses, mask(1, 1, 1, 0, 1))


@each
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_must_be_above_zero_for_some(name, bad):
    losses = vector(1, 2, bad, 1, 1)
    method = fresh(name)
    assert method.positive == (name in ("dwa", "gls", "si", "go4align", "stch"))
    if method.positive:
        with pytest.raises(ValueError, match="above 0 for .*, got .* for task 2"):
            method(losses)
    else:
        assert method(losses).isfinite().all()
    assert STCH()(losses).isfinite().all()  # without a warm-up it takes no logarithm


@each
def test_wrong_there(name):
    for there in (torch.ones(TASKS), mask(1, 0)):
        with pytest.raises(ValueError, match="there"):
            fresh(name)(torch.ones(TASKS), there)


@pytest.mark.parametrize("made", [
    lambda: BMTL(temperature=0), lambda: BMTL(temperature=-1), lambda: BMTL(bounded=1),
    lambda: BMTL(temperature="1"), lambda: DWA(temperature=0.0), lambda: DWA(steps=0),
    lambda: DWA(steps=1.5), lambda: DWA(temperature=float("nan")), lambda: STCH(mu=0),
    lambda: STCH(warmup=-1), lambda: STCH(warmup=3, average=4), lambda: STCH(average=1),
    lambda: STCH(warmup=3, average=0), lambda: STCH(preference=[-1, 1]),
    lambda: STCH(warmup=1, preference=[1, 1]), lambda: STCH(warmup=1, reference=[1, 1]),
    lambda: SLAW(beta=1), lambda: SLAW(eps=0), lambda: SLAW(beta=-0.1), lambda: FAMO(lr=-1),
    lambda: FAMO(weight_decay=-1), lambda: FAMO(eps=0), lambda: FAMO(min_losses=[[1]]),
    lambda: GO4Align(0), lambda: GO4Align(2.0), lambda: GO4Align(2, beta=-1),
    lambda: UncertaintyWeighting(0), lambda: UncertaintyWeighting(2, init=[1]),
    lambda: IMTLL(2, init=float("inf")), lambda: IMTLL("2"), lambda: IMTLL(2, lr=-1),
    lambda: IMTLL(2, init=True), lambda: ScaleInvariant(log1p=1), lambda: GLS(scaling="max"),
])  # fmt: skip
def test_wrong_options(made):
    with pytest.raises((ValueError, TypeError), match=" must "):
        made()


def test_options_of_another_size():
    for method in (FAMO(min_losses=[0, 0]), STCH(preference=[1, 1]), STCH(reference=[1, 1]),
                   UncertaintyWeighting(2), IMTLL(2), GO4Align(4)):  # fmt: skip
        with pytest.raises(ValueError, match="entry for each|at least groups"):
            method(vector(1, 2, 3))


# ---- torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATELESS)
def test_compiles_in_one_graph(name):
    torch._dynamo.reset()
    method = make(name, TASKS)
    compiled = torch.compile(lambda x: method(x), fullgraph=True, backend="aot_eager")
    for losses in series(2):
        close(compiled(losses), make(name, TASKS)(losses).numpy(), rtol=1e-12)
    there = mask(1, 0, 1, 1, 0)
    masked = torch.compile(lambda x: method(x, there), fullgraph=True, backend="aot_eager")
    close(masked(losses), make(name, TASKS)(losses, there).numpy(), rtol=1e-12)
