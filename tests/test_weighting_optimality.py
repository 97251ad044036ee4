"""Every exact method: its optimality conditions from the weights alone, and other solvers' weights."""

from __future__ import annotations

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import torch
from methods import (
    EXACT,
    FALLBACK,
    NOT_CONVERGED,
    RANK,
    RIDGE_RAISED,
    TAU,
    fallback_weights,
    pcd_scales,
    pivrg_preference,
)
from problems import FAMILIES, family

TASKS = [1, 2, 3, 4, 8, 16, 40, 64]
RIDGE, RIDGE32 = 1e-10, 1e-6
REGULAR = ["iid", "scales", "tiny", "huge"]  # condition of the cosines far below 1 / ridge
CONDITIONED = ["iid", "tiny", "huge"]  # and in one scale, so that no sum cancels much
NEARLY_SINGULAR = ["stationary", "parallel", "duplicates"]

methods = pytest.mark.parametrize("method", EXACT)
task_counts = pytest.mark.parametrize("tasks", TASKS)


def problems(rng, tasks: int, body) -> tuple[list[str], np.ndarray]:
    """Names, Grams [B, T, T]: every family; plain torch is slow where T is large."""
    names = FAMILIES if body.name != "reference" or tasks <= 16 else ["iid", "stationary"]
    jacs = [family(rng, name, tasks, tasks + 20) for name in names]
    return names, np.stack([oracles.gram(jac) for jac in jacs])


def run(body, method: str, grams: np.ndarray, ridge: float):
    given = torch.from_numpy(grams).to(body.device)
    before = given.clone()
    w, status, residual = EXACT[method].solve(body, given, ridge)
    batch, tasks, _ = grams.shape
    assert w.shape == (batch, tasks) and status.shape == residual.shape == (batch,)
    assert w.dtype == residual.dtype == torch.float64 and status.dtype == torch.int64
    assert torch.equal(given, before)
    return w.cpu().numpy(), status.tolist(), residual.tolist()


def fallback_is_due(method: str, gram: np.ndarray, w: np.ndarray, ridge: float) -> bool:
    """The documented reasons for a fallback, by the oracle; and the documented weights."""
    tasks = len(w)
    n, c = ow.scaled(gram, ridge)
    if method == "imtl_g":
        v = ow.solve(c, np.ones(tasks)) / n
        return v.sum() <= 1e-6 * np.abs(v).sum() and np.allclose(w, fallback_weights(gram))
    if method == "cagrad":
        v = ow.mgda(gram, ridge)
        return v @ gram @ v <= (1e-5 * n.mean()) ** 2 and np.allclose(w, 1 / tasks, rtol=1e-12)
    if method == "pcd":
        _, strain, left = ow.pcd(gram, pcd_scales(gram), TAU, ridge)
        if not w.any():
            return left < 2e-14
        return strain > 5e-4 and np.allclose(w, np.arange(tasks) == 0, rtol=1e-12, atol=0)
    return False


def check(method: str, name: str, gram: np.ndarray, ridge: float, w, status: int, reported: float):
    """The first complaint, or None."""
    tolerance = 1e-9 if ridge == RIDGE else 1e-5
    if not np.isfinite(w).all() or not np.isfinite(reported):
        return f"weights {w}, residual {reported}"
    if status & FALLBACK:
        due = fallback_is_due(method, gram, w, ridge) and not status & ~(FALLBACK | RIDGE_RAISED)
        return None if due else f"status {status}: no reason to fall back"
    raised = status & RIDGE_RAISED
    if raised and (name != "low_rank" or ridge == RIDGE32):
        return "the ridge was raised"
    residual = min((EXACT[method].residual(gram, w, r) for r in
                    ([1e-8, 1e-6] if raised else [ridge])), key=lambda r: r.rows)  # fmt: skip
    if not residual.rows <= tolerance:
        return f"residual {residual.rows:.1e}, reported {reported:.1e}, status {status}"
    if bool(status & NOT_CONVERGED) or reported > tolerance:
        return f"status {status}, reported {reported:.1e}, in truth {residual.rows:.1e}"
    if method != "aligned" and not residual.rows <= 10 * reported + 1e-12:
        return f"reported {reported:.1e}, in truth {residual.rows:.1e}"
    # rows of 1e-14: nothing but rounding is left
    if name in REGULAR and not (residual.strict <= tolerance or residual.rows <= 1e-14):
        return f"strict residual {residual.strict:.1e}"
    limit = 1e-6 if name in CONDITIONED else 1e-2 if name in NEARLY_SINGULAR else None
    if ridge == RIDGE32 or method == "aligned" or limit is None:
        return None
    if name == "duplicates" and method == "upgrad":
        return None  # the oracle cannot solve it without a ridge
    raw = EXACT[method].residual(gram, w, 0.0)
    if not raw.strict <= limit:
        return f"against the raw Gram {raw.strict:.1e}"
    return None


def check_all(body, method: str, names: list[str], grams: np.ndarray, ridge: float) -> None:
    complaints = []
    for name, gram, *result in zip(names, grams, *run(body, method, grams, ridge)):
        complaint = check(method, name, gram, ridge, *result)
        if complaint:
            complaints.append(f"{name}: {complaint}")
    assert not complaints, "\n".join(complaints)


@methods
@task_counts
def test_float64_gram(body, method, tasks, rng):
    check_all(body, method, *problems(rng, tasks, body), RIDGE)


@methods
@task_counts
def test_float32_gram(body, method, tasks, rng):
    """The rounded Gram is the problem, indefinite as it may be by its rounding."""
    names, grams = problems(rng, tasks, body)
    check_all(body, method, names, grams.astype(np.float32).astype(np.float64), RIDGE32)


@methods
@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_no_silent_failures(method, tasks, rng):
    """1000 random problems a method: the peers' solvers fail on up to a third of them."""
    import flatmtl.ops

    jac = rng.standard_normal((1000, tasks, 2 * tasks + 1))
    gram = torch.from_numpy(jac @ jac.transpose(0, 2, 1))
    w, status, residual = EXACT[method].solve(flatmtl.ops, gram, RIDGE)
    assert int((status != 0).sum()) == int((status == FALLBACK).sum()), status.unique()
    assert float(residual.max()) <= 1e-9 and torch.isfinite(w).all()
    for b in torch.nonzero(status).ravel().tolist():  # equal projections: of no positive sum
        assert fallback_is_due(method, gram[b].numpy(), w[b].numpy(), RIDGE)


# ---- the parts of UPGrad ---------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16])
def test_upgrad_is_the_sum_of_its_projections(body, tasks, rng):
    names, grams = problems(rng, tasks, body)
    gram, u = torch.from_numpy(grams).to(body.device), rng.uniform(0.1, 1, tasks)
    w = body.solve_dual_cone(gram, torch.from_numpy(u).to(body.device), True, RIDGE)[0]
    total = np.zeros(grams.shape[:2])
    for i in range(tasks):
        one = np.where(np.arange(tasks) == i, u, 0.0)
        preference = torch.from_numpy(one).to(body.device)
        v, status, _ = body.solve_dual_cone(gram, preference, False, RIDGE)
        total += v.cpu().numpy()
        for name, g, w_i, s in zip(names, grams, v.cpu().numpy(), status.tolist()):
            if not s & RIDGE_RAISED:
                assert ow.dual_cone_residual(g, w_i, one, RIDGE).rows <= 1e-9, name
    for name, g, mine, sum_ in zip(names, grams, w.cpu().numpy(), total):
        if name != "low_rank":  # a raised ridge may be raised for all parts or for one
            size = np.abs(g) @ np.abs(sum_)
            assert (np.abs(g @ (mine - sum_)) <= 1e-9 * size).all(), name


# ---- other solvers ---------------------------------------------------------------------------

few_tasks = pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 16])


def solved(body, method: str, jac: np.ndarray) -> np.ndarray:
    return run(body, method, oracles.gram(jac)[None], RIDGE)[0][0]


def near(w, best, jac, tolerance: float = 1e-7) -> None:
    """In the unknowns y = n w, where the tasks have one scale."""
    n = oracles.row_norms(jac)
    assert np.abs(n * (w - best)).max() <= tolerance * np.abs(n * best).max(), (w, best)


@few_tasks
@pytest.mark.parametrize("name", ["iid", "scales"])
def test_against_quadprog(body, name, tasks, rng):
    jac = family(rng, name, tasks, tasks + 20)
    g, u = oracles.gram(jac), np.full(tasks, 1 / tasks)
    near(solved(body, "mgda", jac), ow.mgda_quadprog(g), jac)
    near(solved(body, "dualproj", jac), ow.dual_proj_quadprog(g, u), jac)
    if name == "iid":
        near(solved(body, "upgrad", jac), ow.upgrad(g, u, solver=ow.dual_proj_quadprog), jac)
        d = solved(body, "pcd", jac) @ jac
        other = ow.pcd_quadprog(jac, pcd_scales(g), TAU)
        assert np.linalg.norm(d - other) <= 1e-7 * np.linalg.norm(other)


@few_tasks
@pytest.mark.parametrize("name", ["iid", "scales"])
def test_alpha_fair_against_newton_and_scipy(body, name, tasks, rng):
    jac = family(rng, name, tasks, tasks + 20)
    g = oracles.gram(jac)
    c = pivrg_preference(tasks)
    for method, alpha, weight in (
        ("nash", 1.0, 1.0), ("fair_half", 0.5, 1.0), ("fair_two", 2.0, 1.0), ("pivrg", 2.0, c)
    ):  # fmt: skip
        w = solved(body, method, jac)
        near(w, ow.fair(g, alpha, weight), jac)
        if name == "iid":
            near(w, ow.fair_scipy(g, alpha, weight), jac)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 3.0])
def test_cagrad_against_a_scalar_root(body, c, tasks, rng):
    """The other way round: MGDA of g_i + g0 / m; and the duality gap F(v) - min_i <g_i, d>."""
    jac = family(rng, "iid", tasks, tasks + 20)
    g = oracles.gram(jac)
    gram = torch.from_numpy(g[None]).to(body.device)
    w = body.solve_cagrad(gram, c, 0, RIDGE)[0][0].cpu().numpy()
    near(w, ow.cagrad(jac, c), jac)
    x = np.maximum(w - 1 / tasks, 0)
    gap = ow.cagrad_dual_value(g, x / x.sum(), c) - (g @ w).min()
    assert abs(gap) <= 1e-8 * np.sqrt(g.mean()) * oracles.row_norms(jac).mean()
    for rescale, divisor in ((1, 1 + c**2), (2, 1 + c)):
        v = body.solve_cagrad(gram, c, rescale, RIDGE)[0][0].cpu().numpy()
        np.testing.assert_allclose(v * divisor, w, rtol=1e-12)


@pytest.mark.parametrize("c", [0.2, 0.4, 1.0])
def test_cagrad_closed_form_of_two(body, c, rng):
    for _ in range(5):
        jac = family(rng, "iid", 2, 6)
        gram = oracles.gram(jac)
        w = body.solve_cagrad(torch.from_numpy(gram[None]).to(body.device), c, 0, RIDGE)[0][0]
        near(w.cpu().numpy(), ow.cagrad_two(gram, c), jac, 1e-6)


@few_tasks
def test_equal_projections_against_pinv(body, tasks, rng):
    jac = family(rng, "scales", tasks, tasks + 20)
    best = ow.imtl_g(oracles.gram(jac))
    w, status, _ = run(body, "imtl_g", oracles.gram(jac)[None], RIDGE)
    if status == [0]:
        near(w[0], best, jac)
    d, other = solved(body, "config", jac) @ jac, ow.config(jac)
    assert np.linalg.norm(d - other) <= 1e-6 * np.linalg.norm(other)
    p = rng.uniform(0.2, 2, tasks)
    gram = torch.from_numpy(oracles.gram(jac)[None]).to(body.device)
    w = body.solve_config(gram, torch.from_numpy(p).to(body.device), RIDGE)[0][0].cpu().numpy()
    other = ow.config(jac, p)
    assert np.linalg.norm(w @ jac - other) <= 1e-6 * np.linalg.norm(other)


@few_tasks
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_aligned_against_eigh(body, mode, tasks, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    p = rng.uniform(0.2, 2, tasks)
    g = oracles.gram(jac)
    gram, preference = (torch.from_numpy(x).to(body.device) for x in (g[None], p))
    for given, factor in ((None, np.ones(tasks)), (preference, p)):
        w, status, residual = body.solve_aligned(gram, given, mode, RANK)
        best = ow.aligned(g, mode, p=factor, eigh=np.linalg.eigh)[0]
        np.testing.assert_allclose(w[0].cpu().numpy(), best, rtol=1e-9, atol=1e-10)
        assert status.tolist() == [0] and residual.item() <= 1e-12


@pytest.mark.parametrize("tasks", [4, 9])
def test_aligned_cuts_small_eigenvalues(body, tasks, rng):
    """Rank 2, or a higher limit: the smallest eigenvalue that is kept sets the scale."""
    jac = rng.standard_normal((tasks, 2)) @ rng.standard_normal((2, 30))
    for g, limit in ((oracles.gram(jac), RANK), (np.diag(10.0 ** -np.arange(tasks)), 1e-3)):
        best, _, nearest = ow.aligned(g, tolerance=limit)
        w, status, _ = body.solve_aligned(torch.from_numpy(g[None]).to(body.device), None, 0, limit)
        assert status.tolist() == [0] and nearest > 1e-3
        np.testing.assert_allclose(w[0].cpu().numpy(), best, rtol=1e-7, atol=1e-9)


# ---- loops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iid", "scales", "tiny", "huge"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("beta, eps", [(0.01, 1e-8), (0.5, 0.0), (1.0, 0.1)])
def test_gradvac_over_steps(body, name, tasks, beta, eps, rng):
    target, expected = torch.zeros(2, tasks, tasks, dtype=torch.float64), None
    target, expected = target.to(body.device), np.zeros((2, tasks, tasks))
    for _ in range(3):
        jac = np.stack([family(rng, name, tasks, tasks + 20) for _ in range(2)])
        order = np.stack([[rng.permutation(tasks) for _ in range(tasks)] for _ in range(2)])
        gram = torch.from_numpy(jac @ jac.transpose(0, 2, 1)).to(body.device)
        w, status = body.solve_gradvac(
            gram, torch.from_numpy(order).to(body.device), target, beta, eps
        )
        assert status.tolist() == [0, 0]
        for b in range(2):
            d, expected[b] = ow.gradvac(jac[b], order[b], expected[b], beta, eps)
            scale = oracles.row_norms(jac[b]).sum()
            assert np.linalg.norm(w[b].cpu().numpy() @ jac[b] - d) <= 1e-8 * scale
        np.testing.assert_allclose(target.cpu().numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("name", ["stationary", "parallel", "low_rank", "duplicates"])
def test_gradvac_of_one_step(body, name, rng):
    """From phi-hat = 0: PCGrad, where the projected vectors may all but vanish."""
    jac = family(rng, name, 6, 26)
    order = np.stack([rng.permutation(6) for _ in range(6)])
    gram = torch.from_numpy(oracles.gram(jac)).to(body.device)
    target = torch.zeros_like(gram)
    w, status = body.solve_gradvac(gram, torch.from_numpy(order).to(body.device), target, 0.5, 0.0)
    error = np.linalg.norm(w.cpu().numpy() @ jac - oracles.pcgrad(jac, order))
    assert int(status) == 0 and error <= 1e-6 * oracles.row_norms(jac).sum()
    assert (target.abs() <= 0.5).all()


@pytest.mark.parametrize("tasks", [3, 4, 8, 16, 40])
@pytest.mark.parametrize("name", ["iid", "scales"])
def test_krum(body, name, tasks, rng):
    jac = family(rng, name, tasks, tasks + 20)
    gram = torch.from_numpy(oracles.gram(jac)).to(body.device)
    for byzantine in sorted({0, 1, tasks // 3, tasks - 3}):
        for selected in (1, 2, tasks):
            w, status = body.solve_krum(gram, byzantine, selected)
            assert int(status) == 0
            np.testing.assert_allclose(w.cpu().numpy(), ow.krum(jac, byzantine, selected))


def test_krum_leaves_the_outlier(body, rng):
    jac = 1 + 0.1 * rng.standard_normal((5, 30))
    jac[3] *= -10
    w, _ = body.solve_krum(torch.from_numpy(oracles.gram(jac)).to(body.device), 1, 4)
    np.testing.assert_allclose(w.cpu().numpy(), [0.25, 0.25, 0.25, 0, 0.25])


def test_krum_ties_go_to_the_lower_index(body):
    w, _ = body.solve_krum(torch.eye(5, dtype=torch.float64, device=body.device), 1, 2)
    assert w.tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("lr, momentum, steps", [(10.0, 0.5, 2), (0.05, 0.5, 20), (0.3, 0.0, 7)])
def test_sdmgrad(body, tasks, lr, momentum, steps, rng):
    """Few or short steps: the default 20 of length 10 amplify a rounding without bound."""
    cross = rng.standard_normal((2, tasks, tasks + 9)) @ rng.standard_normal((2, tasks + 9, tasks))
    cross += 3 * np.eye(tasks) * (tasks + 9)
    q = rng.dirichlet(np.ones(tasks))
    state = torch.full((2, tasks), 1 / tasks, dtype=torch.float64, device=body.device)
    expected = np.full((2, tasks), 1 / tasks)
    for call in range(2):
        preference = None if call else torch.from_numpy(q).to(body.device)
        w, status = body.solve_sdmgrad_(
            torch.from_numpy(cross).to(body.device), state, preference, lr, momentum, steps, 0.3
        )
        assert status.tolist() == [0, 0]
        for b in range(2):
            best, expected[b] = ow.sdmgrad(
                cross[b], expected[b], lr, momentum, steps, 0.3, None if call else q
            )
            np.testing.assert_allclose(w[b].cpu().numpy(), best, atol=1e-9)
        np.testing.assert_allclose(state.cpu().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 40])
def test_modo(body, tasks, rng):
    state = torch.full((2, tasks), 1 / tasks, dtype=torch.float64, device=body.device)
    expected = np.full((2, tasks), 1 / tasks)
    for _ in range(4):
        cross = rng.standard_normal((2, tasks, 9)) @ rng.standard_normal((2, 9, tasks))
        w, status = body.solve_modo_(torch.from_numpy(cross).to(body.device), state, 0.1, 0.2)
        for b in range(2):
            expected[b] = ow.modo(cross[b], expected[b], 0.1, 0.2)
        np.testing.assert_allclose(w.cpu().numpy(), expected, atol=1e-12)
        assert torch.equal(w, state) and status.tolist() == [0, 0]


@pytest.mark.parametrize("seed, step", [(0, 0), (-1, 5), (2**40 + 3, 9), (7, 2**40 + 1)])
def test_random_weights(body, seed, step):
    """The softmax of Box-Muller numbers from Philox words."""
    state = torch.tensor([seed, step], dtype=torch.int64, device=body.device)
    gram = torch.eye(7, dtype=torch.float64, device=body.device).repeat(3, 1, 1)
    gram[1, 2, 2] = 0
    w, status = body.solve_random_(gram, state)
    assert status.tolist() == [0, 2, 0] and state.tolist() == [seed, step + 1]
    expected = np.stack([ow.softmax(z) for z in ow.normal(seed, step, 7, 3)])
    expected[1, 2] = 0
    np.testing.assert_allclose(w.cpu().numpy(), expected, rtol=1e-12)


def test_random_weights_have_the_moments(body):
    """Differences of log weights are those of independent standard normal numbers."""
    gram = torch.eye(50, dtype=torch.float64, device=body.device).repeat(500, 1, 1)
    w, _ = body.solve_random_(gram, torch.tensor([3, 0], device=body.device))
    z = w.log().cpu().numpy()
    x = ((z[:, ::2] - z[:, 1::2]) / np.sqrt(2)).ravel()
    assert np.isfinite(x).all() and abs(x.mean()) < 0.05 and abs(x.var() - 1) < 0.08
    assert abs((x**3).mean()) < 0.15 and abs((x**4).mean() - 3) < 0.5
    assert abs((x[:-1] * x[1:]).mean()) < 0.05


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_drawn_orders_are_those_of_draw_order(body, tasks, rng):
    """One op in place of two: the same stream, the same weights."""
    jac = np.stack([family(rng, "stationary", tasks, tasks + 20) for _ in range(2)])
    gram = torch.from_numpy(jac @ jac.transpose(0, 2, 1)).to(body.device)
    streams = torch.tensor([[9, 4]] * 4, dtype=torch.int64, device=body.device)
    order = body.draw_order_(streams[0], tasks, 2)
    w, k, _ = body.solve_pcgrad_drawn_(gram, streams[1])
    v, m, _ = body.solve_pcgrad(gram, order)
    assert torch.equal(w, v) and torch.equal(k, m)
    targets = torch.zeros(2, *gram.shape, dtype=torch.float64, device=body.device)
    w, _ = body.solve_gradvac_drawn_(gram, streams[2], targets[0], 0.5, 1e-8)
    v, _ = body.solve_gradvac(gram, order, targets[1], 0.5, 1e-8)
    assert torch.equal(w, v) and torch.equal(targets[0], targets[1])
    alone, _, _ = body.solve_pcgrad_drawn_(gram[0], streams[3])
    torch.testing.assert_close(alone, body.solve_pcgrad(gram[0], order[0])[0], rtol=1e-12, atol=0)
    assert (streams[:, 1] == 5).all()


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e3])
def test_nash_bounds_the_norm(body, max_norm, rng):
    """At every call, of the present gradients; what is kept is not scaled."""
    last = torch.zeros(4, dtype=torch.float64, device=body.device)
    for call in range(4):
        g = oracles.gram(family(rng, "iid", 3, 23))
        given = torch.from_numpy(g).to(body.device)
        w = body.solve_nash_(given, last, 2, max_norm, RIDGE)[0].cpu().numpy()
        kept = last[:3].cpu().numpy()
        if call % 2 == 0:
            np.testing.assert_allclose(kept, ow.fair(g, 1.0), rtol=1e-6)
        length = np.sqrt(kept @ g @ kept)
        factor = max_norm / length if 0 < max_norm < length else 1.0
        np.testing.assert_allclose(w, kept * factor, rtol=1e-9)


@pytest.mark.parametrize("name", ["iid", "scales"])
def test_scale_weights(body, name, rng):
    jac = family(rng, name, 5, 25)
    gram = torch.from_numpy(oracles.gram(jac)).to(body.device)
    for w in (rng.uniform(0, 1, 5), rng.standard_normal(5), np.array([1.0, -1, 0, 0, 0])):
        given = torch.from_numpy(w).to(body.device)
        for code, scaling in enumerate(["raw", "sum_to_one", "sum_to_tasks"]):
            for max_norm in (None, 1e-3, 1e9):
                got = body.scale_weights(gram, given, code, max_norm or 0.0).cpu().numpy()
                best = ow.scale_weights(jac, w, scaling, max_norm)
                np.testing.assert_allclose(got, best, rtol=1e-9, atol=1e-12 * np.abs(best).max())
