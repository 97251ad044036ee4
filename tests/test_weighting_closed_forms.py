"""Weights that are known: golden vectors, closed forms, and identities between the methods."""

from __future__ import annotations

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
import torch
from methods import make
from problems import family

import flatmtl

GRAM = oracles.gram(ow.GOLDEN)


def weights(name: str, jac: np.ndarray, **options) -> np.ndarray:
    weighting = make(name, len(jac), **options)
    return weighting(torch.from_numpy(oracles.gram(jac))).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def aligned_with(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-7) -> None:
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    assert np.linalg.norm(a - b) <= tolerance, (a, b)


def orthogonal(rng, tasks: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    basis = np.linalg.qr(rng.standard_normal((tasks + 5, tasks)))[0].T
    norms = 10 ** rng.uniform(-spread, spread, tasks)
    return basis * norms[:, None], norms


# ---- golden ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, w, d", ow.KNOWN)
def test_golden(name, options, w, d):
    weighting = make(name, 2, **options)
    np.testing.assert_allclose(weighting(torch.from_numpy(GRAM)).numpy(), w, atol=2e-6)
    jac = torch.from_numpy(ow.GOLDEN)
    got = flatmtl.aggregate(jac, make(name, 2, **options)).numpy()
    np.testing.assert_allclose(got, d, atol=6e-5 if name == "nash_mtl" else 5e-6)


def test_golden_means():
    """The published values of the mean forms."""
    half = torch.full((2,), 0.5)
    w = make("aligned_mtl", preference=half)(torch.from_numpy(GRAM)).numpy()
    np.testing.assert_allclose(w, [0.559072, 0.408261], atol=2e-6)
    w = make("pcgrad", reduction="mean")(torch.from_numpy(GRAM)).numpy()
    np.testing.assert_allclose(w, [1.111111, 0.789474], atol=2e-6)


# ---- one task --------------------------------------------------------------------------------


def test_one_task(rng):
    for scale in (1e-6, 1.0, 1e6):
        jac = scale * rng.standard_normal((1, 9))
        n = float(np.linalg.norm(jac))
        for name, options, w in [
            ("mean", {}, 1), ("sum", {}, 1), ("constant", {}, 1), ("pcgrad", {}, 1),
            ("gradvac", {}, 1), ("mgda", {}, 1), ("imtl_g", {}, 1), ("aligned_mtl", {}, 1),
            ("upgrad", {}, 1), ("dualproj", {}, 1), ("config", {}, 1), ("pcd", {}, 1),
            ("sdmgrad", {}, 1), ("modo", {}, 1), ("krum", {}, 1), ("cr_mogm", {}, 1), ("rlw", {}, 1),
            ("nash_mtl", {"max_norm": None}, 1 / n), ("nash_mtl", {}, 1 / n),
            ("fairgrad", {"alpha": 0.5}, n ** (-2 / 3)), ("fairgrad", {"alpha": 1.0}, 1 / n),
            ("fairgrad", {}, n ** (-4 / 3)), ("pivrg", {}, n ** (-4 / 3)),
            ("cagrad", {"c": 0.4}, 1.4), ("cagrad", {"c": 0.4, "rescale": 1}, 1.4 / 1.16),
            ("cagrad", {"c": 0.4, "rescale": 2}, 1), ("cagrad", {"c": 0.0}, 1),
        ]:  # fmt: skip
            got = weights(name, jac, **options)
            np.testing.assert_allclose(got, [w], rtol=1e-9, err_msg=f"{name} {options} {scale}")


# ---- two tasks -------------------------------------------------------------------------------


def test_two_tasks(rng):
    for _ in range(20):
        jac = family(rng, "iid", 2, 4)
        g = oracles.gram(jac)
        n = oracles.row_norms(jac)
        cos = g[0, 1] / n.prod()
        if cos < -1 + 1e-4:
            continue
        near = dict(rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(weights("mgda", jac), ow.mgda_two(g), rtol=1e-5, atol=1e-7)
        nash = weights("nash_mtl", jac, max_norm=None)
        np.testing.assert_allclose(nash, 1 / (n * np.sqrt(1 + cos)), **near)
        np.testing.assert_allclose(weights("imtl_g", jac), n[::-1] / n.sum(), **near)
        aligned_with(nash @ jac, weights("imtl_g", jac) @ jac, 1e-4)
        aligned_with(weights("config", jac) @ jac, nash @ jac, 1e-4)
        surgery = weights("pcgrad", jac)
        expected = [1 - g[0, 1] / g[0, 0], 1 - g[0, 1] / g[1, 1]] if cos < 0 else [1, 1]
        np.testing.assert_allclose(surgery, expected, rtol=1e-12)
        np.testing.assert_allclose(weights("upgrad", jac), surgery / 2, **near)
        np.testing.assert_allclose(weights("gradvac", jac, eps=0.0), surgery, rtol=1e-9)
        unit = jac / n[:, None]
        level = np.sqrt(min(1 - cos, 1 + cos) / (1 + cos))
        if min(1 - cos, 1 + cos) > 1e-3:
            np.testing.assert_allclose(weights("aligned_mtl", unit), [level, level], rtol=1e-6)
        mean = unit.mean(axis=0)
        d = weights("cagrad", unit, c=0.4) @ unit
        if np.linalg.norm(mean) > 1e-2:  # equal norms: (1 + c) g0, at any angle
            np.testing.assert_allclose(d, 1.4 * mean, rtol=1e-5, atol=1e-5)


# ---- orthogonal and identical rows -----------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_orthogonal_rows(tasks, rng):
    jac, n = orthogonal(rng, tasks)
    near = dict(rtol=1e-8)
    for alpha in (0.5, 1.0, 2.0, 5.0):
        w = n ** (-2 * alpha / (1 + alpha))
        np.testing.assert_allclose(weights("fairgrad", jac, alpha=alpha), w, **near)
    np.testing.assert_allclose(weights("nash_mtl", jac, max_norm=None), 1 / n, **near)
    inverse = (1 / n) / (1 / n).sum()
    np.testing.assert_allclose(weights("imtl_g", jac), inverse, **near)
    np.testing.assert_allclose(weights("mgda", jac), n**-2.0 / (n**-2.0).sum(), **near)
    np.testing.assert_allclose(weights("aligned_mtl", jac), n.min() / n, **near)
    np.testing.assert_allclose(weights("pcgrad", jac), np.ones(tasks), **near)
    np.testing.assert_allclose(weights("upgrad", jac) * tasks, np.ones(tasks), **near)
    np.testing.assert_allclose(weights("dualproj", jac) * tasks, np.ones(tasks), **near)
    # u = sum u_i is the direction; sum <g_i, u> / |u|^2 = sum n_i / T
    np.testing.assert_allclose(weights("config", jac), n.sum() / tasks / n, **near)


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_identical_gradients(tasks, rng):
    g = rng.standard_normal(9)
    n = np.linalg.norm(g)
    jac = np.repeat(g[None], tasks, axis=0)
    even = np.full(tasks, 1 / tasks)
    near = dict(rtol=1e-3)  # the ridge alone decides, at a rounding of 1e-16 / 1e-10 a task
    for name in ("mgda", "imtl_g", "upgrad", "dualproj"):
        np.testing.assert_allclose(weights(name, jac), even, err_msg=name, **near)
    for alpha in (0.5, 1.0, 2.0):
        w = (tasks * n**2) ** (-alpha / (1 + alpha))
        got = weights("fairgrad", jac, alpha=alpha)
        np.testing.assert_allclose(got, np.full(tasks, w), **near)
    tight = dict(rtol=1e-7)  # d is well determined
    np.testing.assert_allclose(weights("pcgrad", jac), np.ones(tasks), **tight)
    np.testing.assert_allclose(weights("cagrad", jac, c=0.4) @ jac, 1.4 * g, **tight)
    # d = sum <g_i, d> / |d|^2 d: along g, T times it
    np.testing.assert_allclose(weights("config", jac) @ jac, tasks * g, **tight)


# ---- MGDA ------------------------------------------------------------------------------------


def test_mgda(rng):
    jac, _ = orthogonal(rng, 5, 0.0)
    jac = jac + 0.2 * jac.sum(axis=0)
    inverse = np.linalg.solve(oracles.gram(jac), np.ones(5))
    np.testing.assert_allclose(weights("mgda", jac), inverse / inverse.sum(), rtol=1e-7)
    g = rng.standard_normal(6)
    np.testing.assert_allclose(weights("mgda", np.stack([g, 3 * g])), [1, 0], atol=1e-8)
    others = rng.standard_normal((3, 9))
    jac = np.vstack([others, -(others[0] + 2 * others[1] + 0.5 * others[2])])
    np.testing.assert_allclose(weights("mgda", jac), np.array([1, 2, 0.5, 1]) / 4.5, atol=1e-5)


# ---- alpha-fair ------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 40])
def test_alpha_fair_identities(tasks, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    nash = weights("nash_mtl", jac, max_norm=None)
    d = nash @ jac
    assert d @ d == pytest.approx(tasks, rel=1e-8)
    np.testing.assert_allclose(weights("fairgrad", jac, alpha=1.0), nash, rtol=1e-9)
    clipped = weights("nash_mtl", jac)
    np.testing.assert_allclose(clipped, nash / np.sqrt(tasks), rtol=1e-8)
    for alpha in (0.5, 2.0, 3.0):
        w = weights("fairgrad", jac, alpha=alpha)
        d = w @ jac
        assert d @ d == pytest.approx((w ** (1 - 1 / alpha)).sum(), rel=1e-8)
    np.testing.assert_allclose(  # equal scores are no preference
        weights("pivrg", jac), weights("fairgrad", jac, alpha=2.0), rtol=1e-9
    )


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_alpha_fair_under_scaling(tasks, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    t = 10 ** rng.uniform(-2, 2, tasks)
    w = weights("nash_mtl", jac, max_norm=None)
    v = weights("nash_mtl", jac * t[:, None], max_norm=None)
    np.testing.assert_allclose(v * t, w, rtol=1e-7)
    imtl_g = [make("imtl_g"), make("imtl_g")]
    d, e = (
        weighting(torch.from_numpy(oracles.gram(rows))).numpy() @ rows
        for weighting, rows in zip(imtl_g, (jac, jac * t[:, None]))
    )
    if not any(weighting.last_status().fallback for weighting in imtl_g):
        aligned_with(d, e)
    for alpha in (0.5, 2.0, 4.0):
        d = weights("fairgrad", jac, alpha=alpha) @ jac
        scaled = weights("fairgrad", 100 * jac, alpha=alpha) @ (100 * jac)
        power = (1 - alpha) / (1 + alpha)
        assert np.linalg.norm(scaled - 100**power * d) <= 1e-7 * np.linalg.norm(scaled)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_alpha_fair_limits(tasks, rng):
    """alpha -> 0: the sum, where no task is against it; a larger alpha is nearer to MGDA's direction
    (of orthogonal rows)."""
    jac = np.abs(family(rng, "iid", tasks, tasks + 20))
    np.testing.assert_allclose(weights("fairgrad", jac, alpha=1e-3), np.ones(tasks), atol=0.05)
    jac, norms = orthogonal(rng, tasks)
    jac[0] *= 4 * norms[1] / norms[0]  # not all of one norm
    best = weights("mgda", jac) @ jac
    near, far = (cosine(weights("fairgrad", jac, alpha=a) @ jac, best) for a in (5.0, 0.2))
    assert near > far


def test_pivrg_scores(rng):
    """The weights solve the equations with c = T softmax(scores / temperature)."""
    jac = family(rng, "iid", 4, 24)
    g = torch.from_numpy(oracles.gram(jac))
    weighting = make("pivrg")
    plain = weighting(g).numpy()
    for scores in ([0.0, 10, 20, 30], [5.0, 5, 5, 5.0], [0.0, 1, 2, -1]):
        weighting.scores = torch.tensor(scores)
        c = ow.pivrg_preference(np.array(scores))
        w = weighting(g).numpy()
        np.testing.assert_allclose(w, ow.fair(g.numpy(), 2.0, c), rtol=1e-6)
        if len(set(scores)) == 1:
            np.testing.assert_allclose(w, plain, rtol=1e-9)
    spread = ow.pivrg_preference(np.array([0.0, 50, 100]))
    assert spread.max() / spread.min() == pytest.approx(2)  # the bound


# ---- CAGrad ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("name", ["iid", "scales", "stationary"])
def test_cagrad_identities(tasks, name, rng):
    jac = family(rng, name, tasks, tasks + 20)
    mean = jac.mean(axis=0)
    size = np.linalg.norm(mean)
    np.testing.assert_allclose(weights("cagrad", jac, c=0.0), np.full(tasks, 1 / tasks))
    for c in (0.1, 0.5, 0.9):
        d = weights("cagrad", jac, c=c) @ jac
        # near stationarity the ridge has a part in the length of sum x_i g_i
        near = 1e-2 if name == "stationary" else 1e-6
        assert np.linalg.norm(d - mean) == pytest.approx(c * size, rel=near)
        # no point of the ball does better: not the mean, not points at random
        least = (jac @ d).min()
        assert least >= (jac @ mean).min() - 1e-9 * size * oracles.row_norms(jac).max()
        for _ in range(5):
            step = rng.standard_normal(tasks) @ jac
            other = mean + c * size * step / np.linalg.norm(step)
            assert least >= (jac @ other).min() - 1e-7 * size * oracles.row_norms(jac).max()
    if name == "iid":
        wide = weights("cagrad", jac, c=1e5) @ jac
        aligned_with(wide, weights("mgda", jac) @ jac, 1e-3)


# ---- homogeneity -----------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_common_scale(tasks, rng):
    """G -> t^2 G: the same weights, or a power of t of them."""
    jac = family(rng, "iid", tasks, tasks + 20)
    for t in (1e-6, 3.0, 1e7):
        for name in ("mean", "sum", "pcgrad", "gradvac", "mgda", "cagrad", "imtl_g", "aligned_mtl",
                     "upgrad", "dualproj", "config", "krum", "sdmgrad", "cr_mogm"):  # fmt: skip
            options = {"steps": 3} if name == "sdmgrad" else {}
            w, v = weights(name, jac, **options), weights(name, t * jac, **options)
            tolerance = dict(rtol=1e-6, atol=1e-8 * np.abs(w).max())
            np.testing.assert_allclose(v, w, err_msg=f"{name}, {t}", **tolerance)
        for alpha in (0.5, 1.0, 2.0):
            w, v = (weights("fairgrad", s * jac, alpha=alpha) for s in (1.0, t))
            np.testing.assert_allclose(v * t ** (2 * alpha / (1 + alpha)), w, rtol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_upgrad_is_linear_under_scaling(tasks, rng):
    """d of the rows scaled by one positive t each is linear in t: UPGrad's own property."""
    jac = family(rng, "iid", tasks, tasks + 20)
    s, t = rng.uniform(0.1, 2, (2, tasks))

    def update(scale: np.ndarray) -> np.ndarray:
        return weights("upgrad", jac * scale[:, None]) @ (jac * scale[:, None])

    both, apart = update(2 * s + 3 * t), 2 * update(s) + 3 * update(t)
    assert np.linalg.norm(both - apart) <= 1e-6 * np.linalg.norm(both)


# ---- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 4, 9])
def test_no_conflict(tasks, rng):
    jac = np.abs(family(rng, "iid", tasks, tasks + 20))
    ones = np.ones(tasks)
    np.testing.assert_allclose(weights("pcgrad", jac), ones, rtol=1e-12)
    np.testing.assert_allclose(weights("gradvac", jac), ones, rtol=1e-12)
    np.testing.assert_allclose(weights("upgrad", jac) * tasks, ones, rtol=1e-9)
    np.testing.assert_allclose(weights("dualproj", jac) * tasks, ones, rtol=1e-9)
    np.testing.assert_allclose(weights("pcd", jac), np.arange(tasks) == 0, atol=1e-12)


@pytest.mark.parametrize("tasks", [3, 6])
def test_gradvac_starts_as_pcgrad(tasks, rng):
    jac = family(rng, "stationary", tasks, tasks + 20)
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
    w, v = (weights(name, jac, order=order) for name in ("pcgrad", "gradvac"))
    # eps is 1e-8 of one coefficient, and the coefficients compound
    np.testing.assert_allclose(v, w, rtol=1e-5, atol=1e-6)


def test_pcd_keeps_the_primary_norm(rng):
    for tasks in (2, 5, 9):
        jac = family(rng, "scales", tasks, tasks + 20)
        d = weights("pcd", jac) @ jac
        assert np.linalg.norm(d) == pytest.approx(np.linalg.norm(jac[0]), rel=1e-7)


def test_preferences(rng):
    jac = family(rng, "iid", 3, 23)
    g = oracles.gram(jac)
    p = np.array([1.0, 0.5, 2.0])
    given = torch.from_numpy(p)
    np.testing.assert_allclose(weights("upgrad", jac, preference=given), ow.upgrad(g, p), rtol=1e-7)
    np.testing.assert_allclose(
        weights("dualproj", jac, preference=given), ow.dual_proj(g, p), rtol=1e-7
    )
    np.testing.assert_allclose(
        weights("aligned_mtl", jac, preference=given), ow.aligned(g, p=p)[0], rtol=1e-8
    )
    for number, mode in enumerate(["min", "median", "rmse"]):
        w = weights("aligned_mtl", jac, scale_mode=mode)
        np.testing.assert_allclose(w, ow.aligned(g, number)[0], rtol=1e-8)
    d, best = weights("config", jac, preference=given) @ jac, ow.config(jac, p)
    assert np.linalg.norm(d - best) <= 1e-7 * np.linalg.norm(best)
    assert weights("constant", jac, weights=given).tolist() == p.tolist()


def test_random_loss_weights():
    """Softmax of the seed's normal numbers; another draw at every call."""
    weighting = make("rlw", seed=11)
    gram = torch.eye(5, dtype=torch.float64).expand(2, 5, 5).contiguous()
    for step in range(3):
        w = weighting(gram).numpy()
        for b, z in enumerate(ow.normal(11, step, 5, 2)):
            np.testing.assert_allclose(w[b], ow.softmax(z), rtol=1e-12)


def test_cr_mogm(rng):
    """lambda_k = alpha lambda_(k-1) + (1 - alpha) w_k, from w_1 or from the initial weights."""
    jacs = [family(rng, "iid", 4, 24) for _ in range(4)]
    for initial in (None, torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)):
        weighting = make("cr_mogm", alpha=0.8, initial=initial)
        expected = None if initial is None else initial.numpy()
        for jac in jacs:
            w = weights("mgda", jac)
            expected = w if expected is None else 0.8 * expected + 0.2 * w
            got = weighting(torch.from_numpy(oracles.gram(jac))).numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_pcd_over_steps(rng):
    """The scales follow an average of the squared norms, without the bias of its start."""
    weighting, v, beta = make("pcd", beta=0.9), np.zeros(3), 0.9
    for step in range(1, 5):
        jac = family(rng, "iid", 3, 23) * 10 ** rng.uniform(-1, 1, (3, 1))
        g = oracles.gram(jac)
        s, v = ow.pcd_scales(np.diag(g), 1e-8, beta, v, step)
        best, strain, _ = ow.pcd(g, s, 0.02, 1e-10)
        assert strain < 1e-6
        got = weighting(torch.from_numpy(g)).numpy()
        np.testing.assert_allclose(got, best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name, make_oracle", [
    ("sdmgrad", lambda a, w: ow.sdmgrad(a, w, 0.5, 0.5, 4, 0.3)),
    ("modo", lambda a, w: (ow.modo(a, w, 0.1, 0.1),) * 2),
])  # fmt: skip
def test_cross_gram_methods(name, make_oracle, rng):
    options = {"lr": 0.5, "steps": 4} if name == "sdmgrad" else {}
    weighting, state = make(name, **options), np.full(3, 1 / 3)
    for _ in range(3):
        cross = rng.standard_normal((3, 9)) @ rng.standard_normal((9, 3)) + 9 * np.eye(3)
        best, state = make_oracle(cross, state)
        np.testing.assert_allclose(weighting(torch.from_numpy(cross)).numpy(), best, atol=1e-10)


# ---- scaling of the output -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "mgda", "fairgrad", "upgrad", "pcgrad", "imtl_g"])
@pytest.mark.parametrize("scaling", ["raw", "sum_to_one", "sum_to_tasks"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scaling_option(name, scaling, max_norm, rng):
    jac = family(rng, "iid", 4, 24)
    w = weights(name, jac, scaling=scaling, max_norm=max_norm)
    best = ow.scale_weights(jac, weights(name, jac), scaling, max_norm)
    np.testing.assert_allclose(w, best, rtol=1e-9)
    if max_norm is None and scaling != "raw":
        assert w.sum() == pytest.approx(1 if scaling == "sum_to_one" else 4)
    if max_norm is not None:
        assert np.linalg.norm(w @ jac) <= max_norm * (1 + 1e-9)
