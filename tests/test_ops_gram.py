"""row_norms, gram, gram_difference, gram_pair against the formulas, for every body."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from cases import (
    LAYOUTS,
    SIZES,
    acc,
    check_close,
    contiguous_rows,
    dtypes,
    eps,
    large,
    layout,
    numpy64,
    rows,
    task_counts,
    truth,
)


def check_gram(body, jac: torch.Tensor, what: object) -> None:
    tasks, size = jac.shape
    out = body.gram(jac)
    assert out.dtype == torch.float64 and out.shape == (tasks, tasks)
    assert torch.equal(out, out.T), f"{what}: not exactly symmetric"
    wide = contiguous_rows(jac)
    ref = oracles.gram(truth(jac, tasks * tasks * size))
    check_close(out, ref, wide @ wide.T, 3 * eps(acc(jac.dtype)), what)


def check_norms(body, jac: torch.Tensor, what: object) -> None:
    out = body.row_norms(jac)
    assert out.dtype == torch.float64
    plain = contiguous_rows(jac).norm(dim=1)
    check_close(out, oracles.row_norms(truth(jac)), plain, 3 * eps(acc(jac.dtype)), what)


def check_gram_difference(body, sam: torch.Tensor, jac: torch.Tensor, what: object) -> None:
    out = body.gram_difference(sam, jac)
    assert out.dtype == torch.float64
    assert torch.equal(out, out.T), f"{what}: not exactly symmetric"
    tasks, size = jac.shape
    work = tasks * tasks * size
    difference = contiguous_rows(sam) - contiguous_rows(jac)
    ref = oracles.gram(truth(sam, work) - truth(jac, work))
    check_close(out, ref, difference @ difference.T, 3 * eps(acc(jac.dtype)), what)
    check_pair(body, sam, jac, what)


def check_pair(body, sam: torch.Tensor, jac: torch.Tensor, what: object) -> None:
    """The bits of the two alone, NaN included."""
    alone = body.gram(jac), body.gram_difference(sam, jac)
    for out, expected in zip(body.gram_pair(sam, jac), alone, strict=True):
        assert out.dtype == torch.float64
        assert torch.equal(out.view(torch.int64), expected.view(torch.int64)), what


@dtypes
@task_counts
def test_row_norms(body, dtype, tasks, rng):
    for size in SIZES:
        check_norms(body, rows(rng, (tasks, size), dtype, body.device), size)


@dtypes
@task_counts
def test_gram(body, dtype, tasks, rng):
    for size in SIZES:
        check_gram(body, rows(rng, (tasks, size), dtype, body.device), size)


@dtypes
@task_counts
def test_gram_difference(body, dtype, tasks, rng):
    for size in SIZES:
        sam, jac = (rows(rng, (tasks, size), dtype, body.device) for _ in range(2))
        check_gram_difference(body, sam, jac, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(body, dtype, rng):
    for tasks, size in large(body):
        jac = rows(rng, (tasks, size), dtype, body.device)
        check_gram(body, jac, (tasks, size, "gram"))
        check_norms(body, jac, (tasks, size, "row_norms"))
        sam = rows(rng, (tasks, size), dtype, body.device)
        check_gram_difference(body, sam, jac, (tasks, size, "gram_difference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_large_other_types(body, dtype, rng):
    jac = rows(rng, (3, 400_003), dtype, body.device)
    check_gram(body, jac, "gram")
    check_norms(body, jac, "row_norms")


@dtypes
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(body, dtype, kind, rng):
    """Slices of a wider buffer; the NaN around the slice must not be read."""
    for tasks, size in [(1, 65), (3, 1000), (5, 129), (9, 4099)]:
        jac = layout(rows(rng, (tasks, size), dtype, body.device), kind)
        sam = layout(rows(rng, (tasks, size), dtype, body.device), kind)
        check_gram(body, jac, (tasks, size))
        check_norms(body, jac, (tasks, size))
        check_gram_difference(body, sam, jac, (tasks, size))
        mixed = layout(rows(rng, (tasks, size), dtype, body.device), "packed")
        check_gram_difference(body, mixed, jac, (tasks, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread", ["small", "large", "mixed"])
def test_hard_scales(body, dtype, spread, rng):
    """Row norms 1e-8, 1e8 or both: every entry of the Gram right in its own scale."""
    for tasks, size in [(3, 777), (9, 4097), (40, 513)]:
        low, high = {"small": (-8, -8), "large": (8, 8), "mixed": (-8, 8)}[spread]
        scale = 10.0 ** rng.uniform(low, high, (tasks, 1)) / np.sqrt(size)
        jac = rows(rng, (tasks, size), dtype, body.device, scale)
        true = truth(jac, tasks * tasks * size)
        norms = oracles.row_norms(true)
        unit = np.outer(norms, norms)
        wide = contiguous_rows(jac)
        plain = numpy64(wide @ wide.T) / unit.astype(np.float64)
        out = torch.from_numpy(numpy64(body.gram(jac)) / unit.astype(np.float64))
        floor = 3 * eps(acc(dtype))
        check_close(out, oracles.gram(true) / unit, torch.from_numpy(plain), floor, (tasks, size))
        ones = torch.from_numpy(numpy64(body.row_norms(jac)) / norms.astype(np.float64))
        plain_norms = torch.from_numpy(numpy64(wide.norm(dim=1)) / norms.astype(np.float64))
        check_close(ones, norms / norms, plain_norms, floor, (tasks, size))


@dtypes
def test_difference_of_close_rows(body, dtype, rng):
    """S = J (1 + 1e-4 ...): expanding SS' - SJ' - JS' + JJ' would lose eight digits."""
    for tasks, size in [(1, 501), (3, 2049), (9, 777)]:
        jac = rows(rng, (tasks, size), dtype, body.device)
        noise = torch.from_numpy(1 + 1e-4 * rng.standard_normal((tasks, size))).to(body.device)
        sam = (jac.double() * noise).to(dtype)
        if torch.equal(sam, jac):  # cannot happen by chance: some element sits near a rounding
            continue
        check_gram_difference(body, sam, jac, (tasks, size))


@dtypes
def test_zero_duplicate_and_equal_rows(body, dtype, rng):
    jac = rows(rng, (6, 333), dtype, body.device)
    jac[1] = 0
    jac[4] = jac[2]
    g = body.gram(jac)
    assert (g[1] == 0).all() and (g[:, 1] == 0).all()
    assert g[2, 2] == g[4, 4] == g[2, 4]
    keep = [0, 1, 2, 3, 5]
    assert torch.equal(g[4, keep], g[2, keep])
    assert body.row_norms(jac)[1] == 0
    assert (body.gram_difference(jac, jac.clone()) == 0).all()


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_row_stays_in_its_row_and_column(body, dtype, bad, rng):
    for tasks, at in [(2, 0), (9, 4), (17, 16)]:
        jac = rows(rng, (tasks, 1029), dtype, body.device)
        clean = body.gram(jac)
        jac[at, 700] = bad
        g = body.gram(jac)
        others = [i for i in range(tasks) if i != at]
        assert not torch.isfinite(g[at]).any() and not torch.isfinite(g[:, at]).any()
        assert torch.equal(g[others][:, others], clean[others][:, others])
        norms = body.row_norms(jac)
        assert not torch.isfinite(norms[at]) and torch.isfinite(norms[others]).all()
        d = body.gram_difference(jac, torch.zeros_like(jac))
        assert torch.isfinite(d[others][:, others]).all() and not torch.isfinite(d[at, at])
        pair = body.gram_pair(jac, torch.zeros_like(jac))
        assert (pair[0] == 0).all()
        assert torch.equal(pair[1].nan_to_num(1, 2, 3), d.nan_to_num(1, 2, 3))
        pair = body.gram_pair(torch.zeros_like(jac), jac)
        assert torch.equal(pair[0].nan_to_num(1, 2, 3), g.nan_to_num(1, 2, 3))


def test_float16_sums_beyond_its_range(body):
    """300 is a float16, 300^2 * 1000 is not: sums are not kept in the row type."""
    jac = torch.full((2, 1000), 300.0, dtype=torch.float16, device=body.device)
    assert (body.gram(jac) == 300.0**2 * 1000).all()


def test_gram_of_integers_is_exact(body, rng):
    """Small integers: every partial sum is exact, so any wrong or missing term shows."""
    for tasks, size in [(1, 1), (2, 127), (5, 128), (8, 129), (17, 1031), (33, 8193)]:
        values = rng.integers(-3, 4, (tasks, size))
        jac = torch.from_numpy(values).float().to(body.device)
        assert np.array_equal(numpy64(body.gram(jac)), values @ values.T)
        other = rng.integers(-3, 4, (tasks, size))
        sam = torch.from_numpy(other).float().to(body.device)
        difference = other - values
        out = numpy64(body.gram_difference(sam, jac))
        assert np.array_equal(out, difference @ difference.T)
