"""pack_row_ and adaptive_sq_norm."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from cases import acc, check_close, dtypes, eps, numpy64, rows, truth

SHAPES = [
    [],
    [(0,)],
    [(1,)],
    [(3, 4)],
    [(5,), (0,), (2, 3, 1)],
    [(7, 3), (1,), (), (4, 3, 3, 3), (129,), (0, 4), (64, 2)],
    [(1023,), (33, 17), (4097,), (2,)],
    [(70001,), (3,), (66000,)],
]


def place(rng, shapes, gaps: bool) -> tuple[list[int], int]:
    """Ascending offsets, with random gaps, and the length of the row."""
    offsets, end = [], 0
    for shape in shapes:
        end += int(rng.integers(0, 40)) if gaps else 0
        offsets.append(end)
        end += int(np.prod(shape, dtype=np.int64))
    return offsets, end + (int(rng.integers(1, 80)) if gaps else 0)


@dtypes
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_pack(body, dtype, shapes, gaps, rng):
    offsets, size = place(rng, shapes, gaps)
    grads = [rows(rng, s, dtype, body.device) for s in shapes]
    row = torch.full((size,), float("nan"), dtype=dtype, device=body.device)  # garbage before
    sq = body.pack_row_(row, grads, offsets)
    assert sq.dtype == torch.float64 and sq.shape == () and sq.device == row.device
    expected = oracles.pack(np.zeros(size), [numpy64(g) for g in grads], offsets)
    assert np.array_equal(numpy64(row), expected)
    true = np.concatenate([truth(g).reshape(-1) for g in grads] or [np.zeros(0)])
    plain = sum((g.to(acc(dtype)).square().sum() for g in grads), torch.zeros(()))
    ref = np.asarray((true**2).sum(), dtype=true.dtype)
    check_close(sq, ref, plain, 3 * eps(acc(dtype)), shapes)


@dtypes
def test_pack_into_a_row_of_a_matrix(body, dtype, rng):
    """Row i of J, misaligned or not; its neighbours stay as they are."""
    for width in (512, 515):
        jac = torch.full((3, width), 7.0, dtype=dtype, device=body.device)
        grads = [rows(rng, s, dtype, body.device) for s in [(100,), (11, 13)]]
        body.pack_row_(jac[1, : width - 3], grads, [5, 128])
        assert (jac[0] == 7).all() and (jac[2] == 7).all() and (jac[1, width - 3 :] == 7).all()
        assert torch.equal(jac[1, 5:105], grads[0])
        assert torch.equal(jac[1, 128:271], grads[1].reshape(-1))
        rest = torch.cat([jac[1, :5], jac[1, 105:128], jac[1, 271 : width - 3]])
        assert (rest == 0).all() and not torch.signbit(rest).any()


@dtypes
def test_pack_misaligned_sources(body, dtype, rng):
    source = rows(rng, (2000,), dtype, body.device)
    grads = [source[1:500], source[503:504], source[777:1999]]
    row = torch.full((1722,), float("nan"), dtype=dtype, device=body.device)
    body.pack_row_(row, grads, [0, 499, 500])
    assert torch.equal(row, torch.cat(grads))


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pack_tells_of_what_is_not_finite(body, dtype, bad, rng):
    grads = [rows(rng, (300,), dtype, body.device), rows(rng, (5,), dtype, body.device)]
    grads[0][271] = bad
    row = torch.zeros(305, dtype=dtype, device=body.device)
    sq = body.pack_row_(row, grads, [0, 300])
    assert not torch.isfinite(sq)
    assert torch.equal(row.nan_to_num(1, 2, 3), torch.cat(grads).nan_to_num(1, 2, 3))


def test_pack_norm_beyond_float32(body):
    """Elements of 1e15: the squares leave float32 when added up, the norm does not."""
    grad = torch.full((1 << 14,), 1e17, device=body.device)
    row = torch.empty_like(grad)
    sq = body.pack_row_(row, [grad], [0])
    assert sq.item() == pytest.approx(float(grad[0].double()) ** 2 * (1 << 14), rel=1e-6)


@dtypes
@pytest.mark.parametrize("eta", [0.0, 0.01])
@pytest.mark.parametrize("size", [0, 1, 7, 63, 1023, 4097, 100_003])
def test_adaptive_sq_norm(body, dtype, eta, size, rng):
    saved, row = (rows(rng, (size,), dtype, body.device) for _ in range(2))
    sq = body.adaptive_sq_norm(saved, row, eta)
    assert sq.dtype == torch.float64 and sq.shape == ()
    kind = acc(dtype)
    plain = ((saved.to(kind).abs() + eta) * row.to(kind)).square().sum()
    s = truth(saved)
    ref = np.asarray(oracles.adaptive_sq_norm(s, truth(row), eta), dtype=s.dtype)
    check_close(sq, ref, plain, 4 * eps(kind), size)


def test_adaptive_sq_norm_uses_the_absolute_value(body):
    saved = torch.tensor([-2.0, 3.0], device=body.device)
    row = torch.tensor([1.0, -1.0], device=body.device)
    assert body.adaptive_sq_norm(saved, row, 0.5).item() == 2.5**2 + 3.5**2
