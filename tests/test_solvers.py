"""solve_pcgrad and solve_mgda against the oracles, for every body."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from problems import FAMILIES, family

TASKS = [1, 2, 3, 4, 8, 16, 40, 64, 100]
NO_ACTIVE, SOME_INACTIVE, NOT_CONVERGED, RIDGE_RAISED = 1, 2, 4, 8
RIDGE = 1e-10
GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1]])

families = pytest.mark.parametrize("name", FAMILIES)
task_counts = pytest.mark.parametrize("tasks", TASKS)


def orders(rng: np.random.Generator, tasks: int, batch: int = 1) -> np.ndarray:
    """[batch, T, T]"""
    return np.stack(
        [np.stack([rng.permutation(tasks) for _ in range(tasks)]) for _ in range(batch)]
    )


def grams(jac: np.ndarray, body, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[1, T, T]"""
    return torch.from_numpy(oracles.gram(jac))[None].to(dtype).to(body.device)


def solve_pcgrad(body, gram: torch.Tensor, order: np.ndarray):
    """One problem: weights [T], coefficients [T, T], status, as numpy."""
    w, k, status = body.public.solve_pcgrad(gram, torch.from_numpy(order).to(body.device))
    assert w.dtype == k.dtype == torch.float64 and status.dtype == torch.int64
    return w[0].cpu().numpy(), k[0].cpu().numpy(), int(status[0])


def solve_mgda(body, gram: torch.Tensor, ridge: float = RIDGE):
    w, status, residual = body.public.solve_mgda(gram, ridge)
    assert w.dtype == residual.dtype == torch.float64 and status.dtype == torch.int64
    return w[0].cpu().numpy(), int(status[0]), float(residual[0])


def check_pcgrad(jac: np.ndarray, order: np.ndarray, w, k, tolerance: float) -> None:
    """K J against the vectors projected one by one, every row in its own scale."""
    rows = oracles.pcgrad_rows(jac, order)
    norms = oracles.row_norms(np.nan_to_num(jac, posinf=0, neginf=0))
    clean = np.where(np.isfinite(jac), jac, 0.0)
    for i in range(len(jac)):
        error = np.linalg.norm(k[i] @ clean - rows[i])
        assert error <= tolerance * norms[i], f"row {i}: {error / norms[i]:.2e}"
    np.testing.assert_allclose(w, k.sum(axis=0), rtol=1e-12, atol=1e-12 * np.abs(k).max())


def check_mgda(gram: np.ndarray, w: np.ndarray, tolerance: float) -> None:
    """(Gw)_i >= w'Gw for every i, up to the tolerance and to what float64 can tell of (Gw)_i."""
    assert np.isfinite(w).all() and (w >= 0).all()
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    value, slope = w @ gram @ w, gram @ w
    norms = np.sqrt(np.diag(gram))
    rounding = 1e-14 * norms * (w @ norms)
    short = (value * (1 - tolerance) - slope - rounding).max()
    assert short <= 0, f"a task is short by {short / value:.2e} of w'Gw"


# ---- PCGrad ----------------------------------------------------------------------------------


@families
@task_counts
def test_pcgrad(body, name, tasks, rng):
    jac, order = family(rng, name, tasks, tasks + 20), orders(rng, tasks)
    w, k, status = solve_pcgrad(body, grams(jac, body), order)
    assert status == 0
    check_pcgrad(jac, order[0], w, k, 1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_pcgrad_conflicts_do_happen(tasks, rng):
    """Without conflicts the tests above would pass with K = I."""
    jac = family(rng, "iid", tasks, tasks + 20)
    jac[1] = -jac[0] + 0.1 * jac[1]
    rows = oracles.pcgrad_rows(jac, orders(rng, tasks)[0])
    assert np.abs(rows - jac).max() > 0.1


@task_counts
def test_pcgrad_float32_gram(body, tasks, rng):
    jac, order = family(rng, "iid", tasks, tasks + 20), orders(rng, tasks)
    w, k, status = solve_pcgrad(body, grams(jac, body, torch.float32), order)
    assert status == 0
    check_pcgrad(jac, order[0], w, k, 1e-4)


def test_pcgrad_golden(body):
    w, k, status = solve_pcgrad(body, grams(GOLDEN, body), np.array([[[0, 1], [1, 0]]]))
    np.testing.assert_allclose(w, [2.222222, 1.578947], atol=1e-6)
    np.testing.assert_allclose(w @ GOLDEN, [0.584795, 3.801170, 3.801170], atol=1e-5)
    np.testing.assert_allclose(k, [[1, 22 / 38], [22 / 18, 1]], rtol=1e-14)
    assert status == 0


def test_pcgrad_two_tasks_closed_form(body, rng):
    for _ in range(10):
        jac = family(rng, "scales", 2, 3)
        g = oracles.gram(jac)
        w, _, _ = solve_pcgrad(body, grams(jac, body), orders(rng, 2))
        expected = [1 - g[0, 1] / g[0, 0], 1 - g[0, 1] / g[1, 1]] if g[0, 1] < 0 else [1, 1]
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_pcgrad_no_conflict_is_the_sum(body, rng):
    jac = np.abs(family(rng, "iid", 7, 30))
    w, k, _ = solve_pcgrad(body, grams(jac, body), orders(rng, 7))
    assert (w == 1).all() and (k == np.eye(7)).all()


def test_pcgrad_depends_on_the_order(body, rng):
    """And follows the order it is given: two orders, each right by the oracle, differ."""
    # three directions in a plane, 120 degrees apart: every pair conflicts
    angles = 2 * np.pi * np.arange(3) / 3 + 0.1
    jac = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [2], [3]])
    forward, backward = np.array([[[0, 1, 2]] * 3]), np.array([[[2, 1, 0]] * 3])
    results = []
    for order in (forward, backward):
        w, k, _ = solve_pcgrad(body, grams(jac, body), order)
        check_pcgrad(jac, order[0], w, k, 1e-12)
        results.append(w)
    assert np.abs(results[0] - results[1]).max() > 0.1


def test_pcgrad_uses_the_row_of_its_own_task(body, rng):
    """Every task has its own order: swapping two rows of the order changes the result."""
    jac, order = family(rng, "stationary", 6, 12), orders(rng, 6)
    w, k, _ = solve_pcgrad(body, grams(jac, body), order)
    other = order[:, [1, 0, 2, 3, 4, 5]]
    _, k2, _ = solve_pcgrad(body, grams(jac, body), other)
    check_pcgrad(jac, other[0], k2.sum(axis=0), k2, 1e-9)
    assert np.array_equal(k[2:], k2[2:])


# ---- MGDA ------------------------------------------------------------------------------------


@families
@task_counts
@pytest.mark.parametrize("ridge", [RIDGE, 1e-6])
def test_mgda_optimality(body, name, tasks, ridge, rng):
    """KKT of the problem as stated: the ridge is on the diagonal of the cosine matrix."""
    jac = family(rng, name, tasks, tasks + 20)
    g = oracles.gram(jac)
    w, status, residual = solve_mgda(body, grams(jac, body), ridge)
    check_mgda(g + ridge * np.diag(np.diag(g)), w, 1e-6)
    assert residual >= 0
    # exactly stationary and next to no ridge: w'Gw is all rounding, the relative residual as well
    if name != "low_rank" or ridge > 1e-8:
        assert status == 0 and residual < 1e-6


@families
@pytest.mark.parametrize("tasks", [1, 2, 4, 8, 16, 40])
def test_mgda_without_ridge(body, name, tasks, rng):
    """Singular problems too: a point of the simplex, and right unless the status says otherwise."""
    jac = family(rng, name, tasks, tasks + 20)
    w, status, residual = solve_mgda(body, grams(jac, body), 0.0)
    assert np.isfinite(w).all() and np.isfinite(residual), (w, residual, status)
    assert (w >= 0).all() and w.sum() == pytest.approx(1.0, abs=1e-12)
    assert not status & ~(NOT_CONVERGED | RIDGE_RAISED)
    if status == 0:
        check_mgda(oracles.gram(jac), w, 1e-6)


@families
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 6, 8])
def test_mgda_against_all_supports(body, name, tasks, rng):
    jac = family(rng, name, tasks, tasks + 20)
    w, status, _ = solve_mgda(body, grams(jac, body))
    if name == "low_rank":
        assert not status & ~(NOT_CONVERGED | RIDGE_RAISED)
    else:
        assert status == 0
    g = oracles.gram(jac)
    _, best = oracles.mgda_enumerate(g)
    value = ((w @ jac) ** 2).sum()
    # the ridge may cost up to ridge * sum (w n)^2 over the optimum
    slack = (1e-6 if status & RIDGE_RAISED else RIDGE) * (w**2 * np.diag(g)).sum()
    assert value <= best * (1 + 1e-6) + slack + 1e-14 * (w**2 * np.diag(g)).sum()


@pytest.mark.parametrize("tasks", [16, 40])
def test_mgda_against_frank_wolfe(body, tasks, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    g = oracles.gram(jac)
    w, _, _ = solve_mgda(body, grams(jac, body))
    _, other = oracles.mgda_frank_wolfe(g, 3000)
    assert w @ g @ w == pytest.approx(other, rel=1e-4)
    assert w @ g @ w <= other * (1 + 1e-9)


@task_counts
def test_mgda_float32_gram(body, tasks, rng):
    jac = family(rng, "iid", tasks, 3 * tasks)
    w, status, _ = solve_mgda(body, grams(jac, body, torch.float32), 1e-6)
    assert not status & ~(
        NOT_CONVERGED | RIDGE_RAISED
    )  # the tolerance may lie below the rounding of the Gram
    check_mgda(oracles.gram(jac), w, 1e-3)


def test_mgda_golden(body):
    w, status, _ = solve_mgda(body, grams(GOLDEN, body))
    np.testing.assert_allclose(w, [0.6, 0.4], atol=1e-8)
    np.testing.assert_allclose(w @ GOLDEN, [0, 1, 1], atol=1e-7)
    assert status == 0


def test_mgda_interior(body, rng):
    """w = G^-1 1 / (1' G^-1 1) where that is positive; orthogonal rows: w ~ 1 / n^2."""
    basis = np.linalg.qr(rng.standard_normal((9, 6)))[0].T
    norms = 10 ** rng.uniform(-2, 2, 6)
    w, _, _ = solve_mgda(body, grams(basis * norms[:, None], body))
    np.testing.assert_allclose(w, norms**-2 / (norms**-2).sum(), rtol=1e-8)
    shift = basis + 0.2 * basis.sum(axis=0)
    inverse = np.linalg.solve(oracles.gram(shift), np.ones(6))
    assert (inverse > 0).all()
    w, _, _ = solve_mgda(body, grams(shift, body))
    np.testing.assert_allclose(w, inverse / inverse.sum(), rtol=1e-7)


def test_mgda_vertex(body):
    w, _, _ = solve_mgda(body, grams(np.array([[1.0, 2], [3, 6]]), body))
    np.testing.assert_allclose(w, [1, 0], atol=1e-9)
    w, _, _ = solve_mgda(body, grams(np.array([[5.0, 1, 0], [1, 0, 0], [4, 0, 1]]), body))
    np.testing.assert_allclose(w, [0, 1, 0], atol=1e-9)


def test_mgda_exact_stationarity(body):
    g1, g2, g3 = np.array([1.0, 2, -1, 0]), np.array([0.5, -1, 3, 1]), np.array([0.0, 1, 1, -2])
    jac = np.stack([g1, g2, g3, -(g1 + 2 * g2 + 0.5 * g3)])
    w, _, _ = solve_mgda(body, grams(jac, body))
    np.testing.assert_allclose(w, np.array([1, 2, 0.5, 1]) / 4.5, atol=1e-5)
    assert np.linalg.norm(w @ jac) < 1e-4


def test_mgda_residual_tells_the_truth(body, rng):
    """The residual it reports is small where its answer is right, in every scale."""
    for scale in (1e-8, 1.0, 1e8):
        jac = scale * family(rng, "iid", 9, 40)
        w, status, residual = solve_mgda(body, grams(jac, body))
        assert status == 0 and residual < 1e-9
        check_mgda(oracles.gram(jac), w, 1e-6)


# ---- both: degenerate problems, batches ------------------------------------------------------


def solve_both(body, jac: np.ndarray, rng) -> list[tuple[np.ndarray, int]]:
    w, _, status = solve_pcgrad(body, grams(jac, body), orders(rng, len(jac)))
    v, status2, _ = solve_mgda(body, grams(jac, body))
    return [(w, status), (v, status2)]


def test_one_task(body, rng):
    for w, status in solve_both(body, family(rng, "iid", 1, 9), rng):
        assert list(w) == [1.0] and status == 0


@pytest.mark.parametrize("tasks", [1, 2, 5, 64, 70])
def test_all_zero(body, tasks, rng):
    for w, status in solve_both(body, np.zeros((tasks, 5)), rng):
        assert (w == 0).all() and status & NO_ACTIVE


@pytest.mark.parametrize("tasks", [2, 3, 9, 65])
@pytest.mark.parametrize("bad", ["zero", "nan", "inf"])
def test_one_inactive_task(body, tasks, bad, rng):
    """The others get what they would get alone."""
    jac, order = family(rng, "iid", tasks, tasks + 20), orders(rng, tasks)
    at = int(rng.integers(tasks))
    others = [i for i in range(tasks) if i != at]
    jac[at] = 0
    if bad != "zero":
        jac[at, 3] = float(bad)
    with np.errstate(invalid="ignore"):
        g = grams(jac, body)
    w, k, status = solve_pcgrad(body, g, order)
    assert status == SOME_INACTIVE and w[at] == 0 and (k[at] == 0).all() and (k[:, at] == 0).all()
    check_pcgrad(jac, order[0], w, k, 1e-9)
    w, status, _ = solve_mgda(body, g)
    assert status & SOME_INACTIVE and not status & (NO_ACTIVE | NOT_CONVERGED) and w[at] == 0
    check_mgda(oracles.gram(jac[others]), w[others], 1e-6)


def test_all_but_one_inactive(body, rng):
    jac = np.zeros((4, 3))
    jac[2] = rng.standard_normal(3)
    for w, status in solve_both(body, jac, rng):
        assert list(w) == [0, 0, 1, 0] and status == SOME_INACTIVE


def test_opposite_gradients(body, rng):
    g = rng.standard_normal(10)
    (w, _), (v, _) = solve_both(body, np.stack([g, -g]), rng)
    assert np.linalg.norm(w @ np.stack([g, -g])) <= 1e-12 * np.linalg.norm(g)
    np.testing.assert_allclose(v, [0.5, 0.5], atol=1e-9)


def test_gram_not_quite_symmetric(body, rng):
    """What a float32 matmul may give: the answer moves no more than the Gram does."""
    jac, order = family(rng, "iid", 8, 30), orders(rng, 8)
    g = oracles.gram(jac)
    rough = (g * (1 + 1e-7 * rng.standard_normal((8, 8)))).astype(np.float32)
    assert not np.array_equal(rough, rough.T)
    gram = torch.from_numpy(rough)[None].to(body.device)
    w, k, status = solve_pcgrad(body, gram, order)
    assert status == 0
    check_pcgrad(jac, order[0], w, k, 1e-4)
    w, status, _ = solve_mgda(body, gram, 1e-6)
    assert not status & ~(NOT_CONVERGED | RIDGE_RAISED)
    check_mgda(g, w, 1e-3)


@pytest.mark.parametrize("tasks", [2, 5, 9])
def test_extreme_scale_of_everything(body, tasks, rng):
    """Scaling all gradients by one power of two changes no weight at all."""
    jac, order = family(rng, "iid", tasks, 30), orders(rng, tasks)
    w, _, _ = solve_pcgrad(body, grams(jac, body), order)
    v, _, _ = solve_mgda(body, grams(jac, body))
    for power in (-40, 40):
        scaled = jac * 2.0**power
        w2, _, s1 = solve_pcgrad(body, grams(scaled, body), order)
        v2, s2, _ = solve_mgda(body, grams(scaled, body))
        assert s1 == s2 == 0
        np.testing.assert_allclose(w2, w, rtol=1e-12)
        np.testing.assert_allclose(v2, v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tasks, batch", [(1, 3), (2, 5), (7, 4), (40, 2), (3, 1), (3, 0)])
def test_a_batch_equals_one_by_one(body, tasks, batch, rng):
    names = ["iid", "scales", "duplicates", "stationary", "tiny"]
    jacs = [family(rng, names[b % 5], tasks, tasks + 5) for b in range(batch)]
    if batch > 1:
        jacs[1][:] = 0  # a degenerate one in the middle disturbs nobody
    g = torch.cat([grams(j, body) for j in jacs]) if batch else torch.zeros(
        (0, tasks, tasks), dtype=torch.float64, device=body.device)  # fmt: skip
    order = orders(rng, tasks, batch) if batch else np.zeros((0, tasks, tasks), dtype=np.int64)
    order = torch.from_numpy(order).to(body.device)
    w, k, s = body.solve_pcgrad(g, order)
    v, t, r = body.solve_mgda(g, RIDGE)
    assert w.shape == v.shape == (batch, tasks) and k.shape == (batch, tasks, tasks)
    assert s.shape == t.shape == r.shape == (batch,)
    for b in range(batch):
        w1, k1, s1 = body.solve_pcgrad(g[b : b + 1], order[b : b + 1])
        v1, t1, r1 = body.solve_mgda(g[b : b + 1], RIDGE)
        assert s[b] == s1[0] and t[b] == t1[0]
        if body.name == "reference":  # a batched matmul of torch may round otherwise
            torch.testing.assert_close(w[b], w1[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(v[b], v1[0], rtol=1e-9, atol=1e-12)
            continue
        assert torch.equal(w[b], w1[0]) and torch.equal(k[b], k1[0])
        assert torch.equal(v[b], v1[0])
        assert torch.equal(r[b], r1[0]) or (torch.isnan(r[b]) and torch.isnan(r1[0]))


def test_inputs_are_not_written(body, rng):
    jac = family(rng, "stationary", 8, 20)
    g, order = grams(jac, body), torch.from_numpy(orders(rng, 8)).to(body.device)
    g0, order0 = g.clone(), order.clone()
    body.solve_pcgrad(g, order)
    body.solve_mgda(g, RIDGE)
    assert torch.equal(g, g0) and torch.equal(order, order0)


@families
def test_bodies_agree(name, rng):
    """The C++ solver and its plain torch twin, on problems with a unique answer."""
    import flatmtl.ops.reference as reference

    jac = family(rng, name, 6, 40)
    g = torch.from_numpy(oracles.gram(jac))[None]
    order = torch.from_numpy(orders(rng, 6))
    w, k, _ = torch.ops.flatmtl.solve_pcgrad(g, order)
    w2, k2, _ = reference.solve_pcgrad(g, order)
    norms = torch.from_numpy(oracles.row_norms(jac))
    scale = norms[None, :] / norms[:, None]  # K_ij n_j / n_i: every coefficient in its own scale
    torch.testing.assert_close(k[0] * scale, k2[0] * scale, rtol=1e-9, atol=1e-9)
    v, _, _ = torch.ops.flatmtl.solve_mgda(g, 1e-6)
    v2, _, _ = reference.solve_mgda(g, 1e-6)
    torch.testing.assert_close(v, v2, rtol=1e-5, atol=1e-8)
