"""The oracles against published numbers and against each other: a wrong oracle proves nothing."""

from __future__ import annotations

import numpy as np
import oracles
import pytest

GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1]])
EITHER = np.array([[0, 1], [0, 1]])  # with two tasks there is only one order


@pytest.mark.parametrize("counter, key, expected", oracles.PHILOX_KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert oracles.philox4x32_10(counter, key) == expected


def test_pcgrad_golden():
    d = oracles.pcgrad(GOLDEN, EITHER)
    np.testing.assert_allclose(d, [0.584795, 3.801170, 3.801170], atol=1e-6)
    w = np.array([2.222222, 1.578947])
    np.testing.assert_allclose(w @ GOLDEN, d, atol=1e-5)


def test_mgda_golden():
    w, value = oracles.mgda_enumerate(oracles.gram(GOLDEN))
    np.testing.assert_allclose(w, [0.6, 0.4], rtol=1e-12)
    assert value == pytest.approx(2.0)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_two_mgda_methods_agree(tasks, rng):
    jac = rng.standard_normal((tasks, 3 * tasks)) * 10 ** rng.uniform(-1, 1, (tasks, 1))
    g = oracles.gram(jac)
    w, value = oracles.mgda_enumerate(g)
    _, other = oracles.mgda_frank_wolfe(g, 4000)
    assert oracles.mgda_gap(g, w) < 1e-9
    assert value == pytest.approx(other, rel=1e-6)


def test_mgda_exact_stationarity():
    g1, g2 = np.array([1.0, 2, -1, 0]), np.array([0.5, -1, 3, 1])
    g3 = np.array([0.0, 1, 1, -2])
    jac = np.stack([g1, g2, g3, -(g1 + 2 * g2 + 0.5 * g3)])
    w, value = oracles.mgda_enumerate(oracles.gram(jac))
    np.testing.assert_allclose(w, np.array([1, 2, 0.5, 1]) / 4.5, atol=1e-7)
    assert value < 1e-14


def test_quadratic_gradient(rng):
    q = oracles.Quadratic(rng.standard_normal((5, 4)), rng.standard_normal(5))
    x, e, h = rng.standard_normal(4), rng.standard_normal(4), 1e-5
    numeric = (q.loss(x + h * e) - q.loss(x - h * e)) / (2 * h)
    assert numeric == pytest.approx(q.gradient(x) @ e, rel=1e-8)


def test_sam_gradient_of_a_quadratic_is_the_closed_form(rng):
    """g_SAM = g + rho A'A g / ||g||, and the plain SAM step uses exactly it."""
    q = oracles.Quadratic(rng.standard_normal((5, 4)), rng.standard_normal(5))
    x, rho = rng.standard_normal(4), 0.3
    g = q.gradient(x)
    closed = g + rho * q.a.T @ (q.a @ g) / np.linalg.norm(g)
    d, _ = oracles.fs_mtl_gradients([q], x, [np.zeros(0)], oracles.mean, rho)
    np.testing.assert_allclose(d, closed, rtol=1e-12)
    np.testing.assert_allclose(oracles.sam_step(q, x, rho, 0.1), x - 0.1 * closed, rtol=1e-12)


def test_frank_wolfe_vertices():
    g = oracles.gram(np.array([[1.0, 0], [3, 0]]))
    w, value = oracles.mgda_frank_wolfe(g, 10)
    assert list(w) == [1, 0] and value == 1


def test_zero_weight_leaves_nan_out():
    jac = np.array([[np.nan, 1.0], [2.0, 3.0]])
    assert list(oracles.combine(jac, np.array([0.0, 2.0]))) == [4.0, 6.0]
