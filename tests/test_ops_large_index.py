"""Rows of more than 2^31 elements: indices that do not fit 32 bits. Slow, several GB."""

from __future__ import annotations

import os

import pytest
import torch

P = 2**31 + 1025


def memory_available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def long_row() -> torch.Tensor:
    """[1, P] of float16 with ones at the start, beyond 2^31 and at the end."""
    if memory_available() < 14 * 2**30:
        pytest.skip("needs 14 GB of free memory")
    jac = torch.zeros(1, P, dtype=torch.float16)
    jac[0, 3] = jac[0, 2**31 + 5] = jac[0, -1] = 1
    return jac


@pytest.mark.slow
@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_norms_and_gram(body, long_row):
    assert body.row_norms(long_row).item() == 3**0.5
    assert body.gram(long_row).item() == 3


@pytest.mark.slow
@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_combine(body, long_row):
    out = torch.full((P,), 9.0, dtype=torch.float16)
    body.combine(long_row, torch.full((1,), 2.0, dtype=torch.float64), out)
    assert out[3] == out[2**31 + 5] == out[-1] == 2
    assert out[2**31 + 6] == out[2**31 - 1] == 0
    assert int(torch.count_nonzero(out)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_pack(body, long_row):
    row = torch.full((P,), 9.0, dtype=torch.float16)
    tail = torch.full((7,), 2.0, dtype=torch.float16)
    sq = body.pack_row_(row, [tail, tail], [5, 2**31 + 100])
    assert sq.item() == 56 and int(torch.count_nonzero(row)) == 14
    assert (row[2**31 + 100 : 2**31 + 107] == 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_second_row_far_away(body):
    """Two short rows, more than 2^31 elements apart."""
    if memory_available() < 10 * 2**30:
        pytest.skip("needs 10 GB of free memory")
    jac = torch.zeros(2, P, dtype=torch.float16)[:, :40]
    jac[0], jac[1] = 1, 2
    assert body.gram(jac).tolist() == [[40, 80], [80, 160]]
