"""affinity: Z[j, i] = lr G_ij / L_j."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch


@pytest.mark.parametrize("gram_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 2, 3, 9, 40, 200])
def test_affinity(body, gram_type, loss_type, tasks, rng):
    jac = rng.standard_normal((tasks, tasks + 3))
    g = torch.from_numpy(jac @ jac.T).to(gram_type).to(body.device)
    losses = torch.from_numpy(10 ** rng.uniform(-4, 4, tasks)).to(loss_type).to(body.device)
    z = body.public.affinity(g, losses, 0.037)
    assert z.dtype == torch.float64
    ref = oracles.affinity(g.double().cpu().numpy(), losses.double().cpu().numpy(), 0.037)
    np.testing.assert_allclose(z.cpu().numpy(), ref, rtol=1e-14)


def test_row_is_the_recipient(body):
    g = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=torch.float64, device=body.device)
    z = body.public.affinity(g, torch.tensor([2.0, 8.0], device=body.device), 0.5)
    assert z.tolist() == [[1.0, 0.25], [0.0625, 0.5625]]


def test_losses_without_meaning(body):
    losses = [1.0, 0.0, -2.0, float("nan"), float("inf"), -float("inf"), 1e-30]
    g = torch.ones(7, 7, dtype=torch.float64, device=body.device)
    z = body.public.affinity(
        g, torch.tensor(losses, dtype=torch.float64, device=body.device), 1.0
    ).cpu()
    assert torch.isnan(z[1:6]).all()
    assert (z[0] == 1).all() and np.allclose(z[6], 1e30, rtol=1e-12)
    ref = oracles.affinity(np.ones((7, 7)), np.array(losses), 1.0)
    np.testing.assert_allclose(z.numpy(), ref, rtol=1e-14, equal_nan=True)
