"""combine, combine_flat, project against the formulas, for every body."""

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
    large,
    layout,
    mixed,
    pairs,
    rows,
    sum_floor,
    task_counts,
    truth,
)


def weights_for(rng, tasks: int, body) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tasks)).to(body.device)


def empty_row(size: int, jac: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Garbage to be overwritten."""
    return torch.full((size,), float("nan"), dtype=dtype or jac.dtype, device=jac.device)


def wide(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().numpy().astype(truth(like[:0]).dtype)


def check_combine(body, jac: torch.Tensor, w: torch.Tensor, what: object, dtype=None) -> None:
    """dtype: that of the sum; the rows' own without."""
    out = empty_row(jac.shape[1], jac, dtype)
    assert body.combine(jac, w, out) is None
    true, a = truth(jac), wide(w, jac)
    ref = oracles.combine(true, a)
    plain = (w.to(acc(jac.dtype)) @ contiguous_rows(jac)).to(out.dtype)
    floor = sum_floor(np.abs(a) @ np.abs(true), ref, out.dtype)
    check_close(out, ref, plain, floor, what)


def check_flat(body, jac, a, sam, b, what: object, dtype=None) -> None:
    out = empty_row(jac.shape[1], jac, dtype)
    body.combine_flat(jac, a, sam, b, out)
    j, s = truth(jac), truth(sam)
    x, y = wide(a, jac), wide(b, jac)
    ref = oracles.combine_flat(j, x, s, y)
    difference = contiguous_rows(sam) - contiguous_rows(jac)
    kind = acc(jac.dtype)
    plain = (a.to(kind) @ contiguous_rows(jac) + b.to(kind) @ difference).to(out.dtype)
    terms = np.abs(x) @ np.abs(j) + np.abs(y) @ np.abs(s - j)
    check_close(out, ref, plain, sum_floor(terms, ref, out.dtype), what)


def check_project(body, jac: torch.Tensor, c: torch.Tensor, what: object) -> None:
    size = jac.shape[1]
    out = torch.full((len(c), size), float("nan"), dtype=jac.dtype, device=jac.device)
    body.project(jac, c, out)
    true, k = truth(jac), wide(c, jac)
    ref = oracles.project(true, k)
    plain = (c.to(acc(jac.dtype)) @ contiguous_rows(jac)).to(jac.dtype)
    floor = sum_floor(np.abs(k) @ np.abs(true), ref, jac.dtype)
    check_close(out, ref, plain, floor, what)


@dtypes
@task_counts
def test_combine(body, dtype, tasks, rng):
    for size in SIZES:
        jac = rows(rng, (tasks, size), dtype, body.device)
        check_combine(body, jac, weights_for(rng, tasks, body), size)


@dtypes
@task_counts
def test_combine_flat(body, dtype, tasks, rng):
    for size in SIZES:
        jac, sam = (rows(rng, (tasks, size), dtype, body.device) for _ in range(2))
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        check_flat(body, jac, a, sam, b, size)


@dtypes
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 17, 40, 65])
def test_project(body, dtype, tasks, rng):
    slow = body.name == "reference" and tasks > 17
    for count in sorted({1, 3, tasks} - ({tasks} if slow else set())):
        for size in SIZES:
            c = torch.from_numpy(rng.standard_normal((count, tasks))).to(body.device)
            check_project(body, rows(rng, (tasks, size), dtype, body.device), c, (count, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(body, dtype, rng):
    for tasks, size in large(body):
        jac = rows(rng, (tasks, size), dtype, body.device)
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        check_combine(body, jac, a, (tasks, size, "combine"))
        sam = rows(rng, (tasks, size), dtype, body.device)
        check_flat(body, jac, a, sam, b, (tasks, size, "combine_flat"))
        c = torch.from_numpy(rng.standard_normal((2, tasks))).to(body.device)
        check_project(body, jac, c, (tasks, size, "project"))


@dtypes
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(body, dtype, kind, rng):
    for tasks, size in [(1, 65), (3, 1000), (9, 4099)]:
        jac = layout(rows(rng, (tasks, size), dtype, body.device), kind)
        sam = layout(rows(rng, (tasks, size), dtype, body.device), kind)
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        check_combine(body, jac, a, (tasks, size))
        check_flat(body, jac, a, sam, b, (tasks, size))
        check_flat(body, jac, a, sam.contiguous(), b, (tasks, size))
        c = torch.from_numpy(rng.standard_normal((tasks, tasks))).to(body.device)
        check_project(body, jac, c, (tasks, size))


@mixed
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 17, 33, 200])
def test_wider_sum(body, dtype, beside, tasks, rng):
    """Rows in half precision, their sum in float32: as exact as float32 sums are."""
    for size in SIZES:
        jac, sam = (rows(rng, (tasks, size), dtype, body.device) for _ in range(2))
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        check_combine(body, jac, a, size, beside)
        check_flat(body, jac, a, sam, b, size, beside)


@mixed
@pytest.mark.parametrize("kind", LAYOUTS)
def test_wider_sum_of_any_layout(body, dtype, beside, kind, rng):
    for tasks, size in [(1, 65), (3, 1000), (9, 4099)]:
        jac, sam = (layout(rows(rng, (tasks, size), dtype, body.device), kind) for _ in range(2))
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        check_combine(body, jac, a, (tasks, size), beside)
        check_flat(body, jac, a, sam.contiguous(), b, (tasks, size), beside)
        for start in (0, 1, 2, 4):  # the sum misaligned; what lies around it stays as it was
            whole = torch.full((size + 9,), 7.0, dtype=beside, device=body.device)
            expected = empty_row(size, jac, beside)
            body.combine_flat(jac, a, sam, b, expected)
            body.combine_flat(jac, a, sam, b, whole[start : start + size])
            assert torch.equal(whole[start : start + size], expected)
            assert (whole[:start] == 7).all() and (whole[start + size :] == 7).all()


@mixed
def test_wider_sum_of_hard_scales(body, dtype, beside, rng):
    reach = 3 if dtype == torch.float16 else 8
    for tasks, size in [(3, 777), (9, 4097)]:
        for low, high in [(-reach, -reach), (reach, reach), (-reach, reach)]:
            scale = 10.0 ** rng.uniform(low, high, (tasks, 1)) / np.sqrt(size)
            jac, sam = (rows(rng, (tasks, size), dtype, body.device, scale) for _ in range(2))
            norms = torch.from_numpy(scale[:, 0]).to(body.device)
            a, b = weights_for(rng, tasks, body) / norms, weights_for(rng, tasks, body) / norms
            check_combine(body, jac, a, (tasks, low, high), beside)
            check_flat(body, jac, a, sam, b, (tasks, low, high), beside)


@mixed
def test_wider_sum_is_not_rounded_in_between(body, dtype, beside, rng):
    """Two rows, weights 1: the float32 sum to the bit, which the rows' type could not hold."""
    jac = rows(rng, (2, 1031), dtype, body.device)
    sam = rows(rng, (2, 1031), dtype, body.device)
    one = torch.ones(2, dtype=torch.float64, device=body.device)
    out = empty_row(1031, jac, beside)
    body.combine(jac, one, out)
    exact = jac[0].float() + jac[1].float()
    assert torch.equal(out, exact) and not torch.equal(exact.to(dtype).float(), exact)
    pick = torch.tensor([0.0, 1.0], dtype=torch.float64, device=body.device)
    body.combine_flat(jac, 0 * pick, sam, pick, out)
    assert torch.equal(out, sam[1].float() - jac[1].float())
    body.combine_flat(jac, pick, sam, 0 * pick, out)
    assert torch.equal(out, jac[1].float())


def test_wider_sum_beyond_float16(body):
    jac = torch.full((3, 77), 6e4, dtype=torch.float16, device=body.device)
    out = torch.empty(77, device=body.device)
    body.combine(jac, torch.ones(3, dtype=torch.float64, device=body.device), out)
    assert (out == 3 * jac[0, 0].float()).all()


@mixed
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_wider_sum_never_reads_a_row_of_zero_weight(body, dtype, beside, bad, rng):
    for tasks in [1, 2, 5, 9, 33]:
        jac, sam = (rows(rng, (tasks, 515), dtype, body.device) for _ in range(2))
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        off, flat_off = rng.random(tasks) < 0.5, rng.random(tasks) < 0.7
        a[off], b[off | flat_off] = 0, 0
        unread, unread_sam = (torch.from_numpy(x) for x in (off, off | flat_off))
        clean = jac.clone(), sam.clone()
        jac[unread], sam[unread_sam] = bad, bad
        for op in (
            lambda j, s, out: body.combine(j, a, out),
            lambda j, s, out: body.combine_flat(j, a, s, b, out),
        ):
            out, expected = empty_row(515, jac, beside), empty_row(515, jac, beside)
            op(jac, sam, out)
            op(*clean, expected)
            assert torch.isfinite(out).all() and torch.equal(out, expected)


@mixed
def test_wider_sum_of_a_long_row(body, dtype, beside, rng):
    """Beyond what is written past the caches."""
    if body.name == "reference":
        pytest.skip("one path")
    jac, sam = (torch.randn(2, 2_100_003).to(dtype).to(body.device) for _ in range(2))
    a, b = weights_for(rng, 2, body), weights_for(rng, 2, body)
    check_flat(body, jac, a, sam, b, "long", beside)


@dtypes
def test_output_in_a_slice(body, dtype, rng):
    """out misaligned or row-strided; what lies around it stays as it was."""
    jac = rows(rng, (3, 501), dtype, body.device)
    w = weights_for(rng, 3, body)
    whole = torch.full((509,), 7.0, dtype=dtype, device=body.device)
    body.combine(jac, w, whole[3:504])
    expected = empty_row(501, jac)
    body.combine(jac, w, expected)
    assert torch.equal(whole[3:504], expected)
    assert (whole[:3] == 7).all() and (whole[504:] == 7).all()

    flat = torch.full((509,), 7.0, dtype=dtype, device=body.device)
    body.combine_flat(jac, w, jac, w, flat[1:502])
    assert (flat[:1] == 7).all() and (flat[502:] == 7).all() and torch.isfinite(flat).all()

    c = torch.from_numpy(rng.standard_normal((2, 3))).to(body.device)
    buffer = torch.full((2, 520), 7.0, dtype=dtype, device=body.device)
    body.project(jac, c, buffer[:, 5:506])
    dense = torch.empty((2, 501), dtype=dtype, device=body.device)
    body.project(jac, c, dense)
    assert torch.equal(buffer[:, 5:506], dense)
    assert (buffer[:, :5] == 7).all() and (buffer[:, 506:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hard_scales(body, dtype, rng):
    for tasks, size in [(3, 777), (9, 4097), (40, 513)]:
        for low, high in [(-8, -8), (8, 8), (-8, 8)]:
            scale = 10.0 ** rng.uniform(low, high, (tasks, 1)) / np.sqrt(size)
            jac = rows(rng, (tasks, size), dtype, body.device, scale)
            check_combine(body, jac, weights_for(rng, tasks, body), (tasks, low, high))
            norms = torch.from_numpy(scale[:, 0]).to(body.device)
            check_combine(body, jac, weights_for(rng, tasks, body) / norms, (tasks, low, high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_of_close_rows(body, dtype, rng):
    """The part b (S - J) is right to its own size: nothing is rewritten as (a - b) J + b S."""
    jac = rows(rng, (3, 999), dtype, body.device)
    noise = torch.from_numpy(1 + 1e-4 * rng.standard_normal((3, 999))).to(body.device)
    sam = (jac.double() * noise).to(dtype)
    b = weights_for(rng, 3, body)
    check_flat(body, jac, torch.zeros_like(b), sam, b, "flat only")


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zero_weight_never_reads_its_row(body, dtype, bad, rng):
    for tasks in [1, 2, 5, 9, 33]:
        jac = rows(rng, (tasks, 515), dtype, body.device)
        w = weights_for(rng, tasks, body)
        off = rng.permutation(tasks)[: (tasks + 1) // 2]
        w[off] = 0.0
        zero = jac.clone()
        zero[off] = 0
        jac[off] = bad
        out, expected = empty_row(515, jac), empty_row(515, jac)
        body.combine(jac, w, out)
        body.combine(zero, w, expected)
        assert torch.isfinite(out).all() and torch.equal(out, expected)
        check_combine(body, zero, w, tasks)
        c = w.expand(2, tasks).contiguous()
        both = torch.full((2, 515), bad, dtype=dtype, device=body.device)
        body.project(jac, c, both)
        assert torch.isfinite(both).all() and torch.equal(both[0], both[1])


@dtypes
def test_project_skips_per_row(body, dtype, rng):
    """A coefficient that is zero in one output row and not in the other."""
    jac = rows(rng, (3, 131), dtype, body.device)
    jac[2] = float("nan")
    c = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64, device=body.device)
    out = torch.empty((2, 131), dtype=dtype, device=body.device)
    body.project(jac, c, out)
    assert torch.isfinite(out[0]).all() and torch.isnan(out[1]).all()


@dtypes
def test_flat_zero_weights(body, dtype, rng):
    """b_i = 0: S_i is not read; a_i = b_i = 0: J_i is not read; a_i = 0 alone reads both."""
    nan = float("nan")
    jac, sam = (rows(rng, (4, 259), dtype, body.device) for _ in range(2))
    a = torch.tensor([1.0, 0.0, 0.0, -2.0], dtype=torch.float64, device=body.device)
    b = torch.tensor([0.0, 0.0, 0.5, 3.0], dtype=torch.float64, device=body.device)
    sam[0] = nan
    jac[1], sam[1] = nan, nan
    check_flat_masked(body, jac, a, sam, b)
    zero = torch.zeros_like(a)
    jac[:], sam[:] = nan, nan
    out = torch.full((259,), nan, dtype=dtype, device=body.device)
    body.combine_flat(jac, zero, sam, zero, out)
    assert (out == 0).all()


@pairs
@task_counts
def test_flat_of_equal_weights_does_not_look_at_jac(body, dtype, beside, tasks, rng):
    """a_i = b_i: a_i g_i + b_i (s_i - g_i) = a_i s_i, to the bit of a sum over the s_i."""
    for size in [1, 63, 515]:
        jac, sam = (rows(rng, (tasks, size), dtype, body.device) for _ in range(2))
        a, b = weights_for(rng, tasks, body), weights_for(rng, tasks, body)
        same = torch.from_numpy(rng.random(tasks) < 0.5).to(body.device)
        b = torch.where(same, a, b)
        mixed_jac = torch.where(same.unsqueeze(1), torch.full_like(jac, float("nan")), jac)
        out, expected = (empty_row(size, jac, beside) for _ in range(2))
        body.combine_flat(mixed_jac, a, sam, b, out)
        body.combine_flat(torch.where(same.unsqueeze(1), sam, jac), a, sam, b, expected)
        assert torch.isfinite(out).all() and torch.equal(out, expected)
        check_flat(body, jac, a, sam, b, (tasks, size), beside)
        body.combine_flat(jac, a, sam, a, out)
        body.combine(sam, a, expected)
        assert torch.equal(out, expected)


def test_flat_of_equal_weights_reads_sam(body):
    """NaN in s_i counts; in the row of another weight NaN in g_i does; so does a NaN weight."""
    one = torch.ones(2, dtype=torch.float64, device=body.device)
    bad = torch.tensor([[1.0, float("nan"), 1.0]] * 2, device=body.device)
    fine, out = torch.ones(2, 3, device=body.device), torch.empty(3, device=body.device)
    body.combine_flat(fine, one, bad, one, out)
    assert out.isnan().tolist() == [False, True, False]
    body.combine_flat(bad, one, fine, 2 * one, out)
    assert out.isnan().tolist() == [False, True, False]
    body.combine_flat(fine, one * float("nan"), fine, one * float("nan"), out)
    assert out.isnan().all()


def check_flat_masked(body, jac, a, sam, b) -> None:
    out = empty_row(jac.shape[1], jac)
    body.combine_flat(jac, a, sam, b, out)
    clean_j, clean_s = jac.nan_to_num(0.0), sam.nan_to_num(0.0)
    expected = empty_row(jac.shape[1], jac)
    body.combine_flat(clean_j, a, clean_s, b, expected)
    assert torch.isfinite(out).all() and torch.equal(out, expected)
    check_flat(body, clean_j, a, clean_s, b, "masked")


@dtypes
def test_unit_weight_copies(body, dtype, rng):
    """w = e_i gives row i to the bit, in every dtype."""
    jac = rows(rng, (4, 1031), dtype, body.device)
    out = empty_row(1031, jac)
    for i in range(4):
        w = torch.zeros(4, dtype=torch.float64, device=body.device)
        w[i] = 1
        body.combine(jac, w, out)
        assert torch.equal(out, jac[i])
        body.combine_flat(jac, w, jac, w, out)
        assert torch.equal(out, jac[i])
    c = torch.eye(4, dtype=torch.float64, device=body.device)
    both = torch.empty_like(jac)
    body.project(jac, c, both)
    assert torch.equal(both, jac)


def test_float16_partial_sums_may_leave_its_range(body):
    jac = torch.tensor([[6e4], [6e4], [-6e4]], dtype=torch.float16, device=body.device)
    out = torch.empty(1, dtype=torch.float16, device=body.device)
    body.combine(jac, torch.ones(3, dtype=torch.float64, device=body.device), out)
    assert out.item() == jac[0, 0].item()
