"""MGDA on gradients in float32, whose Gram matrix is indefinite by its rounding."""

import numpy as np
import pytest
import torch

import flatmtl
from flatmtl import ops


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("tasks", [3, 4, 8])
@pytest.mark.parametrize("solve", [ops.solve_mgda, "reference"])
def test_near_stationary_float32_rows(noise, tasks, solve, rng):
    """The update is short, as the optimum is: no task is dropped for a negative pivot."""
    for _ in range(20):
        jac = rng.standard_normal((tasks, 1000))
        share = rng.uniform(0.2, 1.2, tasks - 1)
        jac[-1] = -(share[:, None] * jac[:-1]).sum(0) + noise * rng.standard_normal(1000)
        rows = torch.tensor(jac, dtype=torch.float32)
        if solve == "reference":
            w = ops.reference.solve_mgda(ops.gram(rows)[None], 1e-10)[0][0]
        else:
            w = solve(ops.gram(rows))[0]
        exact = rows.double().numpy()
        best = np.linalg.norm(
            flatmtl.weighting.MGDA()(torch.tensor(exact @ exact.T)).numpy() @ exact
        )
        least = np.linalg.norm(exact, axis=1).min()
        assert np.linalg.norm(w.numpy() @ exact) <= 2 * best + 1e-3 * least


def test_a_raised_ridge_is_visible(rng):
    """A Gram matrix that is indefinite by 1e-7: solved with a larger ridge, and the status says so."""
    n = 3
    gram = np.full((n, n), -0.5) + 1.5 * np.eye(n) - 1e-7 * np.ones((n, n))
    weighting = flatmtl.weighting.MGDA()
    w = weighting(torch.tensor(gram))
    assert weighting.last_status().ridge_raised
    assert weighting.last_status().ok
    np.testing.assert_allclose(w.numpy(), 1 / n, atol=1e-4)
