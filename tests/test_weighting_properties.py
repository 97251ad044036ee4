"""Properties that hold on any problem, with hypothesis choosing the problems.

Hypothesis draws the family, the number of tasks and a number that seeds the problem together with
FLATMTL_TEST_SEED; the same seed gives the same examples.
"""

from __future__ import annotations

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import torch
from conftest import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from methods import ALL, CROSS, RANDOM, STATEFUL, make
from problems import FAMILIES, family

each = pytest.mark.parametrize("name", ALL)
REGULAR = ["iid", "scales", "tiny", "huge"]


def examples(count: int):
    """Few, without a deadline or a database, the same for the same FLATMTL_TEST_SEED."""

    def wrap(test):
        options = settings(max_examples=count, deadline=None, database=None, derandomize=False,
                           print_blob=False, suppress_health_check=list(HealthCheck))  # fmt: skip
        return seed(SEED)(options(test))

    return wrap


@st.composite
def problems(draw, families=tuple(FAMILIES), least: int = 1, most: int = 8):
    """(family, jac [T, T + 20], generator)"""
    name = draw(st.sampled_from(families))
    tasks = draw(st.integers(least, most))
    rng = np.random.default_rng([SEED, draw(st.integers(0, 2**32 - 1))])
    return name, family(rng, name, tasks, tasks + 20), rng


def gram(jac: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(oracles.gram(jac))


def close(a: torch.Tensor, b: torch.Tensor, jac: np.ndarray, tolerance: float) -> None:
    """In the unknowns n w, where the tasks have one scale."""
    n = oracles.row_norms(jac)
    y, z = n * a.numpy(), n * b.numpy()
    assert np.abs(y - z).max() <= tolerance * max(np.abs(y).max(), np.abs(z).max()), (a, b)


# ---- what every method promises --------------------------------------------------------------


@each
@examples(15)
@given(problem=problems())
def test_finite_deterministic_and_read_only(name, problem):
    """Two fresh weightings give the same bits; the Gram is not written; the status is readable."""
    _, jac, _ = problem
    g = gram(jac)
    before = g.clone()
    first, second = make(name, len(jac)), make(name, len(jac))
    w = first(g)
    assert w.shape == (len(jac),) and w.dtype == torch.float64 and torch.isfinite(w).all()
    assert torch.equal(w, second(g)) and torch.equal(g, before)
    status = first.last_status()
    assert not status.inactive_task and not status.invalid_gram
    assert status.residual is None or torch.isfinite(status.residual).all()


@each
@examples(10)
@given(number=st.integers(0, 2**32 - 1), tasks=st.integers(1, 8), batch=st.integers(1, 5))
def test_a_batch_is_one_by_one(name, number, tasks, batch):
    if name in RANDOM:
        return
    rng = np.random.default_rng([SEED, number])
    names = rng.choice(FAMILIES, batch)
    g = torch.stack([gram(family(rng, str(n), tasks, tasks + 20)) for n in names])
    weighting = make(name, tasks)
    w = weighting(g)
    status = weighting.last_status()
    assert w.shape == (batch, tasks) and status.bits.shape == (batch,)
    for b in range(batch):
        alone = make(name, tasks)
        torch.testing.assert_close(alone(g[b]), w[b], rtol=1e-12, atol=0)
        assert int(alone.last_status().bits) == int(status.bits[b])


@each
@examples(10)
@given(problem=problems(REGULAR))
def test_permutation(name, problem):
    """Tasks in another order: the weights in that order."""
    _, jac, rng = problem
    if name in RANDOM or name in ("constant", "pcd"):
        return
    if name == "krum" and len(jac) < 4:  # of three, two are each other's nearest: a tie
        return
    order = rng.permutation(len(jac))
    options = {"steps": 3} if name == "sdmgrad" else {}
    w = make(name, len(jac), **options)(gram(jac))
    v = make(name, len(jac), **options)(gram(jac[order]))
    close(v, w[torch.from_numpy(order)], jac[order], 1e-6)


@examples(10)
@given(problem=problems(REGULAR, least=2))
def test_pcd_permutation(problem):
    """All but the first may change places."""
    _, jac, rng = problem
    order = np.append(0, 1 + rng.permutation(len(jac) - 1))
    w, v = make("pcd")(gram(jac)), make("pcd")(gram(jac[order]))
    close(v, w[torch.from_numpy(order)], jac[order], 1e-6)


@each
@examples(8)
@given(problem=problems(REGULAR, least=3), scaling=st.sampled_from(["sum_to_one", "sum_to_tasks"]),
       max_norm=st.sampled_from([None, 0.1, 10.0]))  # fmt: skip
def test_scaling_policies(name, problem, scaling, max_norm):
    _, jac, _ = problem
    options = {} if name != "nash_mtl" else {"max_norm": None}  # 1 is its default
    raw = make(name, len(jac), **options)(gram(jac)).numpy()
    options = {"scaling": scaling, "max_norm": max_norm}
    w = make(name, len(jac), **options)(gram(jac)).numpy()
    best = ow.scale_weights(jac, raw, scaling, max_norm)
    np.testing.assert_allclose(w, best, rtol=1e-7, atol=1e-12 * np.abs(best).max())


@each
@examples(8)
@given(problem=problems(REGULAR, least=3), power=st.integers(-40, 40))
def test_a_power_of_two(name, problem, power):
    """Scaling all gradients by it changes no mantissa: at most the weights' own power of two."""
    _, jac, _ = problem
    if name == "pcd":  # its eps has the scale of the gradients
        return
    options = {"max_norm": None} if name == "nash_mtl" else {}
    w = make(name, len(jac), **options)(gram(jac))
    v = make(name, len(jac), **options)(gram(jac * 2.0**power))
    factor = {"nash_mtl": 1.0, "fairgrad": 4 / 3, "pivrg": 4 / 3}.get(name, 0.0)
    if name == "modo":  # a step of a length: not homogeneous, nor meant to be
        return
    close(v * 2.0 ** (factor * power), w, jac, 1e-6)


# ---- descent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mgda", "nash_mtl", "fairgrad", "upgrad", "dualproj"])
@examples(30)
@given(problem=problems())
def test_no_task_is_hurt(name, problem):
    """<g_i, d> >= 0 up to the ridge and the rounding of the terms it is made of."""
    _, jac, _ = problem
    g = oracles.gram(jac)
    weighting = make(name, len(jac))
    w = weighting(torch.from_numpy(g)).numpy()
    assert (w >= 0).all()
    status = weighting.last_status()
    if status.not_converged:  # told; the tests of optimality say where that may be
        return
    tolerance = 2e-6 if status.ridge_raised else 2e-9
    assert (g @ w >= -tolerance * (np.abs(g) @ np.abs(w))).all()


@pytest.mark.parametrize("name", ["cagrad", "imtl_g", "config"])
@examples(10)
@given(problem=problems(("iid", "scales")))
def test_the_mean_or_the_sum_of_projections_descends(name, problem):
    """CAGrad keeps <g0, d> >= (1 - c) ||g0||^2; equal projections are positive ones."""
    _, jac, _ = problem
    weighting = make(name, len(jac))
    d = weighting(gram(jac)).numpy() @ jac
    if name == "cagrad":
        mean = jac.mean(axis=0)
        assert d @ mean >= 0.6 * (mean @ mean) * (1 - 1e-6)
    elif name == "config" or not weighting.last_status().fallback:
        assert (jac @ d > 0).all()


@examples(10)
@given(problem=problems(("iid", "scales")), number=st.integers(0, 2**32 - 1))
def test_nash_scales_task_by_task(problem, number):
    _, jac, _ = problem
    t = 10 ** np.random.default_rng(number).uniform(-3, 3, len(jac))
    w = make("nash_mtl", max_norm=None)(gram(jac))
    v = make("nash_mtl", max_norm=None)(gram(jac * t[:, None]))
    close(v * torch.from_numpy(t), w, jac, 1e-7)


# ---- state does not leak ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STATEFUL, "pcgrad", "rlw"])
@examples(5)
@given(problem=problems(("iid",), least=3))
def test_reset_forgets(name, problem):
    _, jac, rng = problem
    g = gram(jac)
    weighting = make(name, len(jac))
    first = weighting(g)
    weighting(gram(family(rng, "iid", len(jac), 30)))
    weighting.reset()
    assert torch.equal(weighting(g), first)


@pytest.mark.parametrize("name", CROSS)
@examples(10)
@given(number=st.integers(0, 2**32 - 1), tasks=st.integers(1, 8))
def test_cross_methods_stay_on_the_simplex(name, number, tasks):
    rng = np.random.default_rng([SEED, number])
    weighting = make(name, tasks)
    for _ in range(3):
        w = weighting(torch.from_numpy(rng.standard_normal((tasks, tasks))))
        assert (w >= 0).all() and float(w.sum()) == pytest.approx(1, abs=1e-12)
