"""Degenerate problems, every status bit, and bad input."""

from __future__ import annotations

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import torch
from methods import (
    ALL,
    CROSS,
    EXACT,
    FALLBACK,
    INVALID,
    NO_ACTIVE,
    NOT_CONVERGED,
    RIDGE_RAISED,
    SOME_INACTIVE,
    STATEFUL,
    fallback_weights,
    make,
)
from problems import family

from flatmtl import ops

RIDGE = 1e-10
each = pytest.mark.parametrize("name", ALL)
methods = pytest.mark.parametrize("method", EXACT)


def run(body, method: str, gram: np.ndarray, ridge: float = RIDGE):
    """One problem as [T, T]: weights, status, residual."""
    w, status, residual = EXACT[method].solve(body, torch.from_numpy(gram).to(body.device), ridge)
    assert w.shape == gram.shape[:1] and status.shape == residual.shape == ()
    return w.cpu().numpy(), int(status), float(residual)


# ---- every exact op, every body --------------------------------------------------------------


@methods
@pytest.mark.parametrize("tasks", [1, 2, 5, 17])
def test_all_zero(body, method, tasks):
    w, status, residual = run(body, method, np.zeros((tasks, tasks)))
    assert (w == 0).all() and status == NO_ACTIVE | SOME_INACTIVE and residual == 0


@methods
@pytest.mark.parametrize("tasks", [2, 3, 9])
@pytest.mark.parametrize("bad", ["zero", "nan", "inf"])
def test_one_inactive_task(body, method, tasks, bad, rng):
    """The others get what they would get alone; but a preference counts all T tasks."""
    jac = np.abs(family(rng, "iid", tasks, tasks + 20))
    at = int(rng.integers(1, tasks))  # 0 is PCD's primary
    others = [i for i in range(tasks) if i != at]
    jac[at] = 0
    if bad != "zero":
        jac[at, 3] = float(bad)
    with np.errstate(invalid="ignore"):
        g = oracles.gram(jac)
    w, status, residual = run(body, method, g)
    assert w[at] == 0 and status == SOME_INACTIVE and residual <= 1e-9
    rest = g[np.ix_(others, others)]
    if method in ("upgrad", "dualproj"):  # no conflict
        np.testing.assert_allclose(w[others], 1 / tasks, rtol=1e-9)
    elif method == "cagrad":
        x = w[others] - 1 / tasks
        mean = jac[others].sum(axis=0) / tasks
        assert (x > -1e-15).all()
        length = np.linalg.norm(x @ jac[others])
        assert length == pytest.approx(0.4 * np.linalg.norm(mean), rel=1e-7)
    elif method != "pivrg":  # whose preference is for T tasks
        alone, _, _ = run(body, method, rest)
        np.testing.assert_allclose(w[others], alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_pcd_without_its_primary(body, bad):
    gram = np.diag([bad, 1.0, 2.0])
    w, status, _ = run(body, "pcd", gram)
    assert (w == 0).all() and status & SOME_INACTIVE


@methods
def test_duplicate_rows(body, method, rng):
    """Copies of one task: none is better than another."""
    if method == "pivrg":
        return  # prefers one of the copies
    jac = family(rng, "iid", 3, 23)[[0, 1, 1, 2]]
    w, status, residual = run(body, method, oracles.gram(jac))
    assert not status & (NOT_CONVERGED | FALLBACK) and residual <= 1e-9
    assert abs(w[1] - w[2]) <= 1e-4 * np.abs(w).max()


@methods
def test_opposite_gradients(body, method, rng):
    g = rng.standard_normal(9)
    jac = np.stack([g, -g])
    w, status, _ = run(body, method, oracles.gram(jac))
    n = np.linalg.norm(g)
    assert np.isfinite(w).all() and not status & (NOT_CONVERGED | INVALID)
    if method == "pcd":  # the other task is the constraint: d turns round, at the length of g
        assert status == 0
        np.testing.assert_allclose(w @ jac, -g, rtol=1e-6)
        return
    # what the weights give is nothing, next to what they weigh
    assert np.linalg.norm(w @ jac) <= 1e-4 * n * max(1, np.abs(w).max())
    if method in ("mgda", "imtl_g"):
        np.testing.assert_allclose(w, [0.5, 0.5], rtol=1e-5)


@methods
@pytest.mark.parametrize("tasks", [3, 4, 9])
def test_exact_stationarity(body, method, tasks, rng):
    """0 is in the convex hull: finite weights, no task gains, and the status tells of trouble."""
    jac = family(rng, "iid", tasks, tasks + 20)
    jac[-1] = -(rng.uniform(0.5, 2, tasks - 1) @ jac[:-1])
    g = oracles.gram(jac)
    w, status, residual = run(body, method, g)
    n = oracles.row_norms(jac)
    assert np.isfinite(w).all() and np.isfinite(residual) and not status & INVALID
    assert bool(status & NOT_CONVERGED) or residual <= 1e-9
    d = w @ jac
    if method == "cagrad":
        mean = jac.mean(axis=0)
        assert np.linalg.norm(d - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-6)
    elif method == "pcd":
        assert w.tolist() == [1.0] + [0.0] * (tasks - 1) or np.linalg.norm(d) <= 1.001 * n[0]
    elif method in ("mgda", "upgrad", "dualproj"):
        assert np.linalg.norm(d) <= 1e-4 * (w @ n)


@methods
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_below_tasks(body, method, rank, rng):
    """Parallel or coplanar gradients that agree: not stationary, so every method has an answer."""
    jac = rng.uniform(0.2, 1, (6, rank)) @ np.eye(rank, 9)
    w, status, residual = run(body, method, oracles.gram(jac))
    assert np.isfinite(w).all() and not status & NOT_CONVERGED and residual <= 1e-9
    assert not status & FALLBACK or method == "imtl_g"
    if method in ("mgda", "nash", "fair_half", "fair_one", "fair_two", "upgrad", "dualproj", "pcd"):
        assert (jac @ (w @ jac) > 0).all()


@methods
@pytest.mark.parametrize("noise", [1e-8, 1e-7, 1e-6])
def test_slightly_indefinite(body, method, noise, rng):
    """Rounding of float32, and not symmetric by it: no complaint, finite weights."""
    jac = family(rng, "low_rank", 8, 28)
    g = oracles.gram(jac)
    n = np.sqrt(np.diag(g))
    rough = g + noise * rng.standard_normal((8, 8)) * np.outer(n, n)
    w, status, residual = run(body, method, rough, 1e-6)
    assert np.isfinite(w).all() and np.isfinite(residual) and not status & INVALID
    assert bool(status & NOT_CONVERGED) == (residual > 1e-9)


@pytest.mark.parametrize("method", ["nash", "fair_half", "fair_one", "fair_two", "mgda", "upgrad"])
def test_no_solution(body, method):
    """Indefinite beyond the largest ridge: the residual and a bit say so."""
    scale = np.array([1.0, 2, 4])
    gram = (1.5002 * np.eye(3) - 0.5002) * np.outer(scale, scale)
    w, status, residual = run(body, method, gram)
    assert status & NOT_CONVERGED and residual > 1e-9 and (w > 0).all() and np.isfinite(w).all()
    assert bool(status & FALLBACK) == (residual > 1e-2)
    if status & FALLBACK:
        np.testing.assert_allclose(w, fallback_weights(gram), rtol=1e-12)


def test_imtl_g_of_negative_sum(body):
    """C y = 1 whose weights have a negative sum, which would turn the update round: 1 / n."""
    # u_3 nearly in the span of the others, so that y has entries of both signs; n_3 is small
    jac = np.array([[1.0, 0, 0], [0, 1, 0], [0.9, 0.9, 0.1]])
    jac /= oracles.row_norms(jac)[:, None]
    y = np.linalg.solve(oracles.gram(jac), np.ones(3))
    jac *= np.where(y < 0, 1e-3, 1.0)[:, None]
    gram = oracles.gram(jac)
    assert y.min() < 0 and (y / np.sqrt(np.diag(gram))).sum() < 0
    w, status, residual = run(body, "imtl_g", gram)
    assert status == FALLBACK and residual <= 1e-9
    np.testing.assert_allclose(w, fallback_weights(gram), rtol=1e-12)


def test_nash_falls_back_on_its_last_weights(body):
    bad = torch.tensor(1.5002 * np.eye(3) - 0.5002).to(body.device)
    good = torch.diag(torch.tensor([1.0, 4, 9], dtype=torch.float64)).to(body.device)
    last = torch.zeros(4, dtype=torch.float64, device=body.device)
    w, status, _ = body.solve_nash_(bad, last, 1, 0.0, RIDGE)  # nothing to go back to
    assert int(status) & NOT_CONVERGED and (w > 0).all()
    assert last.tolist() == [0, 0, 0, 1]
    w, status, _ = body.solve_nash_(good, last, 1, 0.0, RIDGE)
    assert int(status) == 0
    np.testing.assert_allclose(w.cpu().numpy(), [1, 1 / 2, 1 / 3], rtol=1e-9)
    for calls in (3, 4):
        again, status, _ = body.solve_nash_(bad, last, 1, 0.0, RIDGE)
        assert torch.equal(again, w) and last[3] == calls
        assert int(status) & (NOT_CONVERGED | FALLBACK) == NOT_CONVERGED | FALLBACK


def test_nash_reuse(body):
    """every = 3: the solve of call 0 serves calls 1 and 2, masked by who is active then."""
    first, second = (torch.diag(torch.tensor(d, dtype=torch.float64)).to(body.device)
                     for d in ([1.0, 4, 16], [4.0, 0, 1]))  # fmt: skip
    last = torch.zeros(4, dtype=torch.float64, device=body.device)
    expected = [[1, 0.5, 0.25], [1, 0, 0.25], [1, 0.5, 0.25], [0.5, 0, 1]]
    for gram, w in zip((first, second, first, second), expected):
        got, status, residual = body.solve_nash_(gram, last, 3, 0.0, RIDGE)
        np.testing.assert_allclose(got.cpu().numpy(), w, rtol=1e-9)
        assert bool(int(status) & SOME_INACTIVE) == (0 in w) and float(residual) <= 1e-9
    nothing = torch.zeros(3, 3, dtype=torch.float64, device=body.device)
    before = last.clone()
    got, status, _ = body.solve_nash_(nothing, last, 3, 0.0, RIDGE)
    assert (got == 0).all() and int(status) & NO_ACTIVE
    assert torch.equal(last[:3], before[:3]) and last[3] == 5  # the call counts


@pytest.mark.parametrize("method", ["mgda", "nash", "imtl_g", "config"])
def test_raised_ridge_is_visible(body, method):
    """Indefinite by 1e-7: the answer of a larger ridge, and a bit that says so."""
    gram = 1.5 * np.eye(3) - 0.5 - 1e-7
    w, status, residual = run(body, method, gram)
    if status & RIDGE_RAISED:
        assert not status & NOT_CONVERGED and residual <= 1e-9
        rows = EXACT[method].residual(gram, w, 1e-6).rows
        assert min(rows, EXACT[method].residual(gram, w, 1e-8).rows) <= 1e-9
    else:
        assert method in ("imtl_g", "config")  # an indefinite system may well be solved
    assert np.abs(w / w[0] - 1).max() <= 1e-4


INVALID_GRAMS = {
    "not symmetric": [[1.0, 0.2], [0.3, 1.0]],
    "beyond Cauchy-Schwarz": [[1.0, 1.2], [1.2, 1.0]],
    "negative norm": [[1.0, 0.0], [0.0, -1.0]],
    "indefinite": (1.9 * np.eye(3) - 0.9).tolist(),
    "indefinite in scales": (
        (1.9 * np.eye(3) - 0.9) * np.outer([1e-6, 1, 1e6], [1e-6, 1, 1e6])
    ).tolist(),
}
invalid = pytest.mark.parametrize("kind", INVALID_GRAMS)


@invalid
@methods
def test_invalid_gram(body, method, kind):
    gram = torch.tensor(INVALID_GRAMS[kind], dtype=torch.float64, device=body.device)
    if body.name == "cuda":  # nothing is read on the host
        w, status, residual = EXACT[method].solve(body, gram, RIDGE)
        assert (w == 0).all() and int(status) & INVALID and float(residual) == 0
        return
    with pytest.raises(ValueError if body.name == "reference" else (ValueError, RuntimeError),
                       match="gram must be"):  # fmt: skip
        EXACT[method].solve(body, gram, RIDGE)


@invalid
@each
def test_invalid_gram_of_a_weighting(name, kind):
    gram = torch.tensor(INVALID_GRAMS[kind], dtype=torch.float64)
    if name in CROSS or name in ("mean", "sum", "constant", "rlw"):
        return  # any matrix, or only its diagonal
    for given in (gram, torch.stack([torch.eye(len(gram), dtype=torch.float64), gram])):
        with pytest.raises(ValueError, match="gram must be"):
            make(name, len(gram))(given)


@pytest.mark.parametrize("kind", ["symmetric", "semi-definite", "Cauchy-Schwarz"])
@each
def test_a_rounded_gram_is_valid(name, kind, rng):
    """What float32 and bfloat16 products may do is no mistake of the caller's."""
    g = oracles.gram(family(rng, "duplicates", 6, 26))
    n = np.sqrt(np.diag(g))
    error = {"symmetric": 4e-5, "semi-definite": 1e-3, "Cauchy-Schwarz": 5e-3}[kind]
    noise = error * rng.uniform(-1, 1, (6, 6)) * np.outer(n, n)
    if kind != "symmetric":
        noise = (noise + noise.T) / 2 * (1 - np.eye(6))
    if kind == "symmetric":
        noise = np.triu(noise, 1)
    weighting = make(name, 6)
    assert torch.isfinite(weighting(torch.from_numpy(g + noise))).all()
    assert not weighting.last_status().invalid_gram


# ---- every weighting -------------------------------------------------------------------------


@each
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_extreme_norms(name, scale, rng):
    jac = scale * family(rng, "iid", 5, 25)
    weighting = make(name, 5)
    w = weighting(torch.from_numpy(oracles.gram(jac)))
    assert torch.isfinite(w).all() and (w != 0).any()
    status = weighting.last_status()
    assert status.ok or (name == "imtl_g" and status.fallback)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_norms(name, dtype, rng):
    jac = family(rng, "mixed_norms", 5, 25)
    weighting = make(name, 5)
    w = weighting(torch.from_numpy(oracles.gram(jac)).to(dtype))
    assert torch.isfinite(w).all() and not weighting.last_status().inactive_task


@each
def test_bits_of_a_batch(name, rng):
    """One problem with a zero task, one with none: each has its own bits."""
    g = oracles.gram(np.abs(family(rng, "iid", 5, 25)))
    half, none = g.copy(), np.zeros((5, 5))
    half[2], half[:, 2] = 0, 0
    weighting = make(name, 5)
    w = weighting(torch.from_numpy(np.stack([g, half, none])))
    status = weighting.last_status()
    bits = status.bits.tolist()
    inactive = [b & (NO_ACTIVE | SOME_INACTIVE) for b in bits]
    assert inactive == [0, SOME_INACTIVE, NO_ACTIVE | SOME_INACTIVE]
    assert w[1, 2] == 0 and (w[2] == 0).all() and (w[0] != 0).any() and (w[1] != 0).any()
    assert status.no_active_task and status.inactive_task and not status.ok
    assert not status.invalid_gram and not status.not_converged


@pytest.mark.parametrize("name", CROSS)
def test_a_spoiled_task_of_a_cross_gram(name, rng):
    """NaN in one batch or in both: that task alone is left out."""
    for first, second in ((True, False), (False, True), (True, True)):
        a, b = rng.standard_normal((2, 4, 9))
        if first:
            a[1, 2] = np.nan
        if second:
            b[1, 2] = np.inf
        with np.errstate(invalid="ignore"):
            cross = a @ b.T
        weighting = make(name, 4)
        w = weighting(torch.from_numpy(cross))
        assert w[1] == 0 and torch.isfinite(w).all() and weighting.last_status().inactive_task
        assert (w[[0, 2, 3]] > 0).any()
        assert not weighting.last_status().no_active_task


@pytest.mark.parametrize("name", CROSS)
def test_a_zero_column_of_a_cross_gram_is_inactive_too(name, rng):
    cross = rng.standard_normal((4, 4)) + 3 * np.eye(4)
    cross[:, 1] = 0
    w = make(name, 4)(torch.from_numpy(cross))
    # (w + lambda q) / (1 + lambda), with task 1's part of q left out
    total = 1 - 0.3 / 4 / 1.3 if name == "sdmgrad" else 1
    assert w[1] == 0 and w.sum() == pytest.approx(total)


@each
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_task_that_fails_for_one_step(name, bad, rng):
    """After good steps: weight 0 while it lasts, and no trace of it in the state."""
    weighting = make(name, 4)
    good = [torch.from_numpy(oracles.gram(family(rng, "iid", 4, 24))) for _ in range(4)]
    spoiled = good[1].clone()
    spoiled[2], spoiled[:, 2] = bad, bad
    weighting(good[0])
    w = weighting(spoiled)
    assert w[2] == 0 and torch.isfinite(w).all() and (w != 0).any()
    assert weighting.last_status().inactive_task
    for g in good[2:]:
        w = weighting(g)
        assert torch.isfinite(w).all() and not weighting.last_status().inactive_task
    nothing = weighting(torch.full((4, 4), bad, dtype=torch.float64))
    assert (nothing == 0).all() and weighting.last_status().no_active_task
    assert torch.isfinite(weighting(good[3])).all()
    assert weighting.last_status().ok or weighting.last_status().fallback
    for value in weighting.state_dict().values():
        assert not isinstance(value, torch.Tensor) or torch.isfinite(value).all()


@each
def test_infinity_times_zero_weight(name, rng):
    """max_norm needs w'Gw: a NaN row of weight 0 has no part in it."""
    jac = np.abs(family(rng, "iid", 5, 25))
    jac[2, 3] = np.nan
    weighting = make(name, 5, max_norm=0.1)
    w = weighting(torch.from_numpy(oracles.gram(jac)))
    assert torch.isfinite(w).all() and w[2] == 0
    if name not in CROSS:
        clean = np.nan_to_num(jac)
        assert np.linalg.norm(w.numpy() @ clean) <= 0.1 * (1 + 1e-9)


# ---- bad input -------------------------------------------------------------------------------

NAN = float("nan")
VECTOR = torch.ones(3)
WRONG_OPTIONS = [
    ("cagrad", {"c": -0.1}), ("cagrad", {"c": NAN}), ("cagrad", {"rescale": 3}),
    ("fairgrad", {"alpha": 0.0}), ("fairgrad", {"alpha": -1.0}), ("fairgrad", {"alpha": 5.5}),
    ("fairgrad", {"alpha": NAN}),
    ("gradvac", {"beta": -0.1}), ("gradvac", {"beta": 1.1}), ("gradvac", {"eps": -1e-9}),
    ("pcd", {"beta": 1.0}), ("pcd", {"beta": -0.1}), ("pcd", {"tau": -0.1}), ("pcd", {"tau": 1.1}),
    ("pcd", {"eps": -1.0}),
    ("krum", {"byzantine": -1}), ("krum", {"byzantine": 0, "selected": 0}),
    ("nash_mtl", {"update_every": 0}), ("nash_mtl", {"max_norm": 0.0}),
    ("mgda", {"max_norm": -1.0}), ("mgda", {"max_norm": NAN}), ("mgda", {"scaling": "max"}),
    ("sdmgrad", {"lr": 0.0}), ("sdmgrad", {"momentum": 1.0}), ("sdmgrad", {"momentum": -0.1}),
    ("sdmgrad", {"steps": 0}), ("sdmgrad", {"lambda_": -0.1}),
    ("modo", {"gamma": 0.0}), ("modo", {"rho": -0.1}),
    ("cr_mogm", {"alpha": 1.1}), ("cr_mogm", {"alpha": -0.1}),
    ("aligned_mtl", {"scale_mode": "max"}),
    ("upgrad", {"preference": torch.tensor([1.0, -1.0])}),
    ("dualproj", {"preference": torch.tensor([1.0, NAN])}),
    ("config", {"preference": torch.tensor([1.0, float("inf")])}),
    ("constant", {"weights": torch.tensor([1.0, NAN])}),
    ("pivrg", {"bound": 1.0}), ("pivrg", {"min_temperature": 0.0}),
    ("rlw", {"seed": 1.5}), ("gradvac", {"seed": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", WRONG_OPTIONS)
def test_wrong_option(name, options):
    """The message names the argument. (The last one given is the wrong one.)"""
    with pytest.raises((ValueError, TypeError), match=list(options)[-1]):
        make(name, 2, **options)


@pytest.mark.parametrize("name, options", [
    ("upgrad", {"preference": VECTOR}), ("dualproj", {"preference": VECTOR}),
    ("config", {"preference": VECTOR}), ("aligned_mtl", {"preference": VECTOR}),
    ("sdmgrad", {"preference": VECTOR}), ("constant", {"weights": VECTOR}),
    ("krum", {"byzantine": 3}), ("krum", {"byzantine": 0, "selected": 6}),
    ("cr_mogm", {"initial": VECTOR}), ("gradvac", {"order": torch.tensor([[0, 1], [1, 0]])}),
])  # fmt: skip
def test_option_that_does_not_fit_the_gram(name, options, rng):
    gram = torch.from_numpy(oracles.gram(family(rng, "iid", 5, 25)))
    with pytest.raises(ValueError, match=list(options)[-1]):
        make(name, 5, **options)(gram)


def test_scores_of_another_length(rng):
    weighting = make("pivrg")
    weighting.scores = VECTOR
    with pytest.raises(ValueError, match="scores"):
        weighting(torch.from_numpy(oracles.gram(family(rng, "iid", 5, 25))))


@pytest.mark.parametrize("tasks, byzantine", [(1, 1), (3, 1), (4, 2)])
def test_krum_needs_tasks(tasks, byzantine):
    with pytest.raises(ValueError, match="byzantine"):
        make("krum", tasks, byzantine=byzantine)(torch.eye(tasks))


def test_cr_mogm_wants_a_weighting():
    with pytest.raises((ValueError, TypeError), match="weighting"):
        make("cr_mogm", weighting="mgda")


@pytest.mark.parametrize("name", STATEFUL)
def test_a_gram_of_another_shape(name):
    """State is for one number of tasks and problems; the way out is in the message."""
    weighting = make(name, 4)
    weighting(torch.eye(4))
    for other in (torch.eye(3), torch.eye(4).expand(2, 4, 4).contiguous()):
        with pytest.raises(ValueError, match=r"reset\(\)"):
            weighting(other)
    weighting.reset()
    weighting(torch.eye(3))


@pytest.mark.parametrize("name", ["fairgrad", "nash_mtl"])
def test_wide_spread_is_solved_or_told(name, rng):
    """Large alpha and norms over six decades: right, or a bit; never silently wrong."""
    jac = family(rng, "scales", 8, 28)
    g = oracles.gram(jac)
    alpha = 5.0 if name == "fairgrad" else 1.0
    options = {"alpha": alpha} if name == "fairgrad" else {"max_norm": None}
    weighting = make(name, 8, **options)
    w = weighting(torch.from_numpy(g)).numpy()
    rows = ow.fair_residual(g, w, alpha, ridge=RIDGE).rows
    status = weighting.last_status()
    assert np.isfinite(w).all() and (status.not_converged or status.ridge_raised or rows <= 1e-9)


def test_wrappers_take_what_the_contract_says():
    """ridge None: by the dtype; the float64 op gets the float32 default."""
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    loose, tight = (ops.solve_alpha_fair(g, 1.0)[0] for g in (gram, gram.double()))
    # opposite units: G w = 1 / w, (C_ii - 1) w = 1 / w at w = ridge^-1/2
    np.testing.assert_allclose(loose, [1e3, 1e3], rtol=1e-6)
    np.testing.assert_allclose(tight, [1e5, 1e5], rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_no_graph_behind_the_weights(name, rng):
    jac = torch.from_numpy(rng.standard_normal((4, 9))).requires_grad_()
    weighting = make(name, 4)
    for _ in range(2):
        w = weighting(jac @ jac.mT)
        assert not w.requires_grad and not weighting.last_status().bits.requires_grad
    weighting.twin()
    assert not any(torch.is_tensor(v) and v.requires_grad for v in weighting.state_dict().values())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9, 1e14])
@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_weights_on_the_simplex_at_any_scale(name, size, rng):
    jac = size * torch.from_numpy(rng.standard_normal((4, 20)))
    weighting = make(name, 4)
    for _ in range(3):
        w = weighting(jac @ jac.mT)
        assert (w >= 0).all() and abs(float(w.sum()) - 1) <= 1e-12
