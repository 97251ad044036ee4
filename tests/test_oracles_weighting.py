"""The weighting oracles against known values and each other: a wrong oracle proves nothing."""

from __future__ import annotations

import numpy as np
import oracles
import oracles_weighting as ow
import pytest
from problems import FAMILIES, family

GRAM = oracles.gram(ow.GOLDEN)
EITHER = np.array([[0, 1], [0, 1]])
RIDGE = 1e-10
small = pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
families = pytest.mark.parametrize("name", FAMILIES)


def known(name: str, **options) -> np.ndarray:
    return np.array(next(w for n, o, w, _ in ow.KNOWN if n == name and o == options))


def test_golden():
    half, ones = np.full(2, 0.5), np.ones(2)
    near = dict(atol=2e-6, rtol=0)
    np.testing.assert_allclose(ow.mgda(GRAM), known("mgda"), **near)
    np.testing.assert_allclose(ow.fair(GRAM, 1.0), known("nash_mtl", max_norm=None), **near)
    np.testing.assert_allclose(ow.fair(GRAM, 2.0), known("fairgrad"), **near)
    np.testing.assert_allclose(ow.imtl_g(GRAM), known("imtl_g"), **near)
    np.testing.assert_allclose(ow.upgrad(GRAM, half), known("upgrad"), **near)
    np.testing.assert_allclose(ow.dual_proj(GRAM, half), known("dualproj"), **near)
    np.testing.assert_allclose(ow.cagrad(ow.GOLDEN, 0.5), known("cagrad", c=0.5), **near)
    rescaled = ow.cagrad(ow.GOLDEN, 0.4) / 1.16
    np.testing.assert_allclose(rescaled, known("cagrad", c=0.4, rescale=1), **near)
    np.testing.assert_allclose(ow.aligned(GRAM, p=ones)[0], known("aligned_mtl"), **near)
    d, target = ow.gradvac(ow.GOLDEN, EITHER, np.zeros((2, 2)), 0.5, 0.0)
    np.testing.assert_allclose(d, known("gradvac") @ ow.GOLDEN, atol=1e-5)
    cos = -22 / np.sqrt(18 * 38)
    np.testing.assert_allclose(target, [[0, cos / 2], [cos / 2, 0]], rtol=1e-14)
    for _, _, w, d in ow.KNOWN:
        np.testing.assert_allclose(np.array(w) @ ow.GOLDEN, d, atol=6e-5)


@small
def test_mgda_by_three_ways(tasks, rng):
    jac = family(rng, "scales", tasks, tasks + 20)
    g = oracles.gram(jac)
    w = ow.mgda(g)
    value = w @ g @ w
    assert oracles.mgda_enumerate(g)[1] == pytest.approx(value, rel=1e-9)
    other = ow.mgda_quadprog(g)
    assert other @ g @ other == pytest.approx(value, rel=1e-8)
    if tasks == 2:
        np.testing.assert_allclose(ow.mgda_two(g), w, rtol=1e-9, atol=1e-15)


@families
@small
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fair_solves_its_equations(name, tasks, alpha, rng):
    g = oracles.gram(family(rng, name, tasks, tasks + 20))
    w = ow.fair(g, alpha, ridge=RIDGE)
    assert ow.fair_residual(g, w, alpha, ridge=RIDGE).rows < 1e-11
    if name == "iid":
        np.testing.assert_allclose(w, ow.fair_scipy(g, alpha), rtol=1e-8)
        c = rng.uniform(0.5, 2, tasks)
        v = ow.fair(g, alpha, c)
        assert ow.fair_residual(g, v, alpha, c).rows < 1e-14
        np.testing.assert_allclose(v, ow.fair_scipy(g, alpha, c), rtol=1e-8)


@families
@small
def test_dual_cones(name, tasks, rng):
    g = oracles.gram(family(rng, name, tasks, tasks + 20))
    u = rng.uniform(0.1, 1, tasks)
    w = ow.dual_proj(g, u, RIDGE)
    assert ow.dual_cone_residual(g, w, u, RIDGE).rows < 1e-13
    if name in ("iid", "tiny", "huge"):
        np.testing.assert_allclose(w, ow.dual_proj_quadprog(g, u), rtol=1e-6, atol=1e-8)
        w = ow.upgrad(g, u)
        np.testing.assert_allclose(w, ow.upgrad(g, u, solver=ow.dual_proj_quadprog), rtol=1e-8)
        assert (g @ w >= -1e-9 * np.diag(g)).all()


@small
@pytest.mark.parametrize("c", [0.2, 0.5, 2.0])
def test_cagrad_primal_and_dual(tasks, c, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    g = oracles.gram(jac)
    w = ow.cagrad(jac, c)
    residual = ow.cagrad_residual(g, w, c)
    assert residual.rows < 1e-12 and residual.strict < 1e-12
    x = w - 1 / tasks
    gap = ow.cagrad_dual_value(g, x / x.sum(), c) - (g @ w).min()
    assert abs(gap) < 1e-10 * np.sqrt(g.mean()) * oracles.row_norms(jac).mean()
    if tasks == 2:
        np.testing.assert_allclose(ow.cagrad_two(g, c), w, rtol=1e-7)


@small
def test_equal_projections(tasks, rng):
    jac = family(rng, "scales", tasks, tasks + 20)
    g = oracles.gram(jac)
    w = ow.imtl_g(g)
    if (g @ w).sum() > 0:  # else the sum of the weights was negative, and d is turned round
        assert ow.imtl_g_residual(g, w).strict < 1e-9
    else:
        assert ow.imtl_g_residual(g, w).rows == np.inf
    if tasks > 1:
        paper = ow.imtl_g_paper(jac) @ jac
        assert oracles.row_norms((w @ jac - paper)[None]) < 1e-6 * np.linalg.norm(paper)


@small
def test_aligned_by_two_ways(tasks, rng):
    g = oracles.gram(family(rng, "iid", tasks, tasks + 20))
    for mode in range(3):
        w = ow.aligned(g, mode)[0]
        np.testing.assert_allclose(ow.aligned(g, mode, eigh=np.linalg.eigh)[0], w, rtol=1e-10)
        s = [np.min, None, np.mean][mode]
        if s is not None:  # w'Gw = s p'p where nothing is cut off
            assert w @ g @ w == pytest.approx(tasks * s(np.linalg.eigvalsh(g)), rel=1e-10)


@small
def test_pcd_by_two_ways(tasks, rng):
    jac = family(rng, "iid", tasks, tasks + 20)
    g = oracles.gram(jac)
    s, v = ow.pcd_scales(np.diag(g), 1e-8, 0.999)
    np.testing.assert_allclose(s, 1 / np.sqrt(np.diag(g)), rtol=1e-9)
    w, strain, _ = ow.pcd(g, s, 0.02)
    assert strain == 0 and ow.pcd_residual(g, w, s, 0.02).strict < 1e-12
    np.testing.assert_allclose(w @ jac, ow.pcd_quadprog(jac, s, 0.02), atol=1e-8)
    np.testing.assert_allclose(v, 0.001 * np.diag(g), rtol=1e-12)


@pytest.mark.parametrize("tasks", [3, 6])
def test_gradvac_with_no_targets_is_pcgrad(tasks, rng):
    jac = family(rng, "stationary", tasks, tasks + 20)
    order = np.stack([rng.permutation(tasks) for _ in range(tasks)])
    d, _ = ow.gradvac(jac, order, np.zeros((tasks, tasks)), 0.0, 0.0)
    np.testing.assert_allclose(d, oracles.pcgrad(jac, order), atol=1e-12)


def test_gradvac_reaches_its_target(rng):
    """After one visit the cosine is the target: what the formula is for."""
    jac = family(rng, "iid", 2, 20)
    jac[1] -= 0.5 * jac[0]
    target = np.array([[0, 0.9], [-1.0, 0]])
    d, _ = ow.gradvac(jac, EITHER, target, 0.0, 0.0)
    moved = d - jac[1]
    cos = moved @ jac[1] / np.linalg.norm(moved) / np.linalg.norm(jac[1])
    assert cos == pytest.approx(0.9, rel=1e-12)


def test_simplex(rng):
    for tasks in (1, 2, 7):
        v = 3 * rng.standard_normal(tasks)
        w = ow.simplex(v)
        assert (w >= 0).all() and w.sum() == pytest.approx(1)
        for _ in range(100):
            other = rng.dirichlet(np.ones(tasks))
            assert np.linalg.norm(w - v) <= np.linalg.norm(other - v) + 1e-12


def test_normal_is_normal():
    x = ow.normal(7, 0, 40, 25).ravel()
    assert abs(x.mean()) < 0.15 and abs(x.std() - 1) < 0.1 and len(set(x)) == 1000


def test_residuals_can_fail(rng):
    """Weights off by a thousandth are off by about as much in the residual."""
    jac = family(rng, "iid", 4, 2000)  # nearly orthogonal: every task has a part in every solution
    g, u = oracles.gram(jac), np.full(4, 0.25)
    s = ow.pcd_scales(np.diag(g), 1e-8)[0]
    nudge = np.array([1.001, 1, 1, 1])
    shift = np.where(np.arange(4) == np.argmax(ow.cagrad(jac, 0.5)), 1e-3, 0)
    for residual in (
        ow.mgda_residual(g, ow.mgda(g) * nudge),
        ow.fair_residual(g, ow.fair(g, 2.0) * nudge, 2.0),
        ow.imtl_g_residual(g, ow.imtl_g(g) * nudge),
        ow.cagrad_residual(g, ow.cagrad(jac, 0.5) + shift, 0.5),
        ow.pcd_residual(g, ow.pcd(g, s, 0.02)[0] * nudge, s, 0.02),
        ow.dual_cone_residual(g, ow.dual_proj(g, u) + 1e-3 * (np.arange(4) == 0), u),
    ):
        assert residual.rows > 1e-6 and residual.strict > 1e-6, residual
