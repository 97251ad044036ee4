"""pack_row_ and adaptive_sq_norm."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from cases import acc, check_close, dtypes, eps, mixed, numpy64, pairs, rows, truth

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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_norm(sq: torch.Tensor, row: torch.Tensor, what: object) -> None:
    """sq is the squared norm of the row as it is stored."""
    assert sq.dtype == torch.float64 and sq.shape == () and sq.device == row.device
    true = truth(row)
    ref = np.asarray((true**2).sum(), dtype=true.dtype)
    plain = row.to(acc(row.dtype)).square().sum()
    check_close(sq, ref, plain, 3 * eps(acc(row.dtype)), what)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.view(integer), y.view(integer))


@pairs
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_pack(body, dtype, beside, shapes, gaps, rng):
    offsets, size = place(rng, shapes, gaps)
    grads = [rows(rng, s, beside, body.device) for s in shapes]
    row = torch.full((size,), float("nan"), dtype=dtype, device=body.device)  # garbage before
    sq = body.pack_row_(row, grads, offsets)
    values = [numpy64(g) for g in grads]
    assert np.array_equal(
        numpy64(row), oracles.pack(np.zeros(size), values, offsets, name_of(dtype))
    )
    check_norm(sq, row, shapes)


@pairs
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_accumulate(body, dtype, beside, shapes, gaps, rng):
    """Several calls, other tensors each time: what stands there is the running sum, rounded."""
    _, size = place(rng, shapes, gaps)
    row = rows(rng, (size,), dtype, body.device)
    row[::5] = -0.0  # where no gradient comes its sign stays
    expected = numpy64(row).copy()  # of float64 it is the row itself
    for call in range(3):
        few = [s for s in shapes if call == 0 or rng.random() < 0.7]
        offsets, end = place(rng, few, False)
        shift = int(rng.integers(0, size - end + 1))
        offsets = [o + shift for o in offsets]
        grads = [rows(rng, s, beside, body.device, 10.0 ** rng.uniform(-3, 1)) for s in few]
        before = row.clone()
        sq = body.pack_row_(row, grads, offsets, True)
        values = [numpy64(g) for g in grads]
        expected = oracles.pack(expected, values, offsets, name_of(dtype), accumulate=True)
        assert np.array_equal(numpy64(row), expected), call
        rest = np.ones(size, dtype=bool)
        for g, o in zip(grads, offsets):
            rest[o : o + g.numel()] = False
        kept = torch.from_numpy(np.flatnonzero(rest)).to(body.device)
        assert same_bits(row[kept], before[kept])
        check_norm(sq, row, (shapes, call))


@pairs
@pytest.mark.parametrize("norm", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_pack_norms_of_any_size(body, dtype, beside, norm, rng):
    size = 4099
    if dtype == torch.float16 and not 1e-3 < norm < 1e6:
        pytest.skip("beyond float16's range")
    grads = [rows(rng, (size,), beside, body.device, norm / np.sqrt(size)) for _ in range(3)]
    row = torch.empty(size + 5, dtype=dtype, device=body.device)
    check_norm(body.pack_row_(row, grads[:1], [2]), row, norm)
    expected = numpy64(row).copy()  # of float64 it is the row itself
    for grad in grads[1:]:
        sq = body.pack_row_(row, [grad], [2], True)
        expected = oracles.pack(expected, [numpy64(grad)], [2], name_of(dtype), accumulate=True)
        assert np.array_equal(numpy64(row), expected)
        check_norm(sq, row, norm)
    assert sq.sqrt().item() == pytest.approx(np.sqrt(3) * norm, rel=0.2)


@mixed
def test_pack_rounds_to_nearest_even(body, dtype, beside, rng):
    """Between two neighbours of the row's type: the middle, and the float32 on either side of it."""
    low = torch.from_numpy(rng.integers(0, 0x7C00 if dtype == torch.float16 else 0x7F80, 20011))
    low = low.to(torch.int16).view(dtype).float()
    high = (low.to(dtype).view(torch.int16) + 1).view(dtype).float()
    middle = low / 2 + high / 2
    middle = torch.where(middle.isfinite(), middle, low)  # the largest's neighbour is infinity
    inf = torch.full_like(middle, torch.inf)
    grads = [middle, middle.nextafter(inf), middle.nextafter(-inf), low, -middle]
    special = [65504.0, 65519.99, 65520.0, 1e30, 3.4e38, 2.0**-25, 2.0**-24, 2.0**-133, 2.0**-134]
    grads += [torch.tensor([*special, *(-x for x in special), 0.0, -0.0, torch.inf, -torch.inf])]
    grads = [g.to(beside).to(body.device) for g in grads]
    every = numpy64(torch.cat(grads))
    offsets = np.cumsum([0] + [g.numel() for g in grads[:-1]]).tolist()
    row = torch.full((len(every),), float("nan"), dtype=dtype, device=body.device)
    for accumulate in (False, True):  # onto zeros the sum is the gradient
        if accumulate:
            row.fill_(-0.0)
        body.pack_row_(row, grads, offsets, accumulate)
        expected = oracles.rounded(every, name_of(dtype))
        assert np.array_equal(numpy64(row), expected)
        assert np.array_equal(np.signbit(numpy64(row)), np.signbit(expected))


@mixed
def test_accumulate_rounds_the_sum_once(body, dtype, beside):
    """1 + 3/8 ulp of 1: rounding the gradient or the sum each time would lose or double it."""
    ulp = eps(dtype)
    row = torch.ones(100, dtype=dtype, device=body.device)
    grad = torch.full((100,), 0.75 * ulp, dtype=beside, device=body.device)
    body.pack_row_(row, [grad], [0], True)
    assert (row == 1 + ulp).all()
    body.pack_row_(row, [grad / 3], [0], True)
    assert (row == 1 + ulp).all()


@pairs
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "row", "gap"])
def test_accumulate_tells_of_what_is_not_finite(body, dtype, beside, bad, where, rng):
    row = rows(rng, (640,), dtype, body.device)
    grads = [rows(rng, (300,), beside, body.device), rows(rng, (5,), beside, body.device)]
    if where == "gradient":
        grads[0][271] = bad
    else:
        row[471 if where == "gap" else 271] = bad
    sq = body.pack_row_(row, grads, [0, 600], True)
    assert not torch.isfinite(sq)
    assert torch.isfinite(row).sum() == 639 and not torch.isfinite(
        row[471 if where == "gap" else 271]
    )


@dtypes
def test_accumulate_of_nothing(body, dtype, rng):
    row = rows(rng, (4099,), dtype, body.device)
    before = row.clone()
    check_norm(body.pack_row_(row, [], [], True), row, "no gradients")
    check_norm(body.pack_row_(row, [row.new_empty(0, 3)], [17], True), row, "an empty one")
    assert same_bits(row, before)
    empty = row.new_empty(0)
    assert body.pack_row_(empty, [], [], True).item() == 0


def test_accumulate_is_by_keyword_and_by_position(body, rng):
    """The third argument may stay away: it is False."""
    grad = rows(rng, (37,), torch.float32, body.device)
    row = torch.zeros(37, device=body.device)
    for _ in range(2):
        body.pack_row_(row, [grad], [0])
        assert torch.equal(row, grad)
    body.pack_row_(row, [grad], [0], accumulate=True)
    assert torch.equal(row, grad + grad)
    body.pack_row_(row, [grad], [0], True)
    assert torch.equal(row, grad + grad + grad)


@pairs
def test_pack_into_a_row_of_a_matrix(body, dtype, beside, rng):
    """Row i of J, misaligned or not; its neighbours stay as they are."""
    for width in (512, 515):
        jac = torch.full((3, width), 7.0, dtype=dtype, device=body.device)
        grads = [rows(rng, s, beside, body.device) for s in [(100,), (11, 13)]]
        body.pack_row_(jac[1, : width - 3], grads, [5, 128])
        assert (jac[0] == 7).all() and (jac[2] == 7).all() and (jac[1, width - 3 :] == 7).all()
        assert torch.equal(jac[1, 5:105], grads[0].to(dtype))
        assert torch.equal(jac[1, 128:271], grads[1].reshape(-1).to(dtype))
        rest = torch.cat([jac[1, :5], jac[1, 105:128], jac[1, 271 : width - 3]])
        assert (rest == 0).all() and not torch.signbit(rest).any()
        body.pack_row_(jac[1, : width - 3], [-g for g in grads], [5, 128], True)
        assert (jac[0] == 7).all() and (jac[2] == 7).all() and (jac[1, width - 3 :] == 7).all()
        difference = grads[0].to(dtype).to(acc(dtype)) - grads[0].to(acc(dtype))
        assert torch.equal(jac[1, 5:105], difference.to(dtype))


@pairs
def test_pack_misaligned_sources(body, dtype, beside, rng):
    source = rows(rng, (2000,), beside, body.device)
    grads = [source[1:500], source[503:504], source[777:1999]]
    row = torch.full((1722,), float("nan"), dtype=dtype, device=body.device)
    body.pack_row_(row, grads, [0, 499, 500])
    assert torch.equal(row, torch.cat(grads).to(dtype))
    wide = torch.zeros(1729, dtype=dtype, device=body.device)
    body.pack_row_(wide[3:1725], grads, [0, 499, 500], True)
    assert torch.equal(wide[3:1725], row) and (wide[:3] == 0).all() and (wide[1725:] == 0).all()


@pairs
@pytest.mark.parametrize("start", [0, 1, 16])
def test_pack_of_a_long_row(body, dtype, beside, start, rng):
    """Beyond what is written past the caches, aligned and not; what lies around it stays."""
    if body.name == "reference":
        pytest.skip("one path")
    size = 8 * 2**20 // dtype.itemsize + 77
    source = torch.randn(size).to(beside).to(body.device)
    offsets = [0, 64, 70_001, size - 40_003]
    grads = [source[:64], source[64:60_000], source[70_001 : size - 50_000], source[-40_003:]]
    whole = torch.full((start + size + 9,), 7.0, dtype=dtype, device=body.device)
    row = whole[start : start + size]
    sq = body.pack_row_(row, grads, offsets)
    expected = source.to(dtype)
    expected[60_000:70_001] = 0
    expected[size - 50_000 : size - 40_003] = 0
    assert torch.equal(row, expected)
    assert (whole[:start] == 7).all() and (whole[start + size :] == 7).all()
    exact = row.double().square().sum().item()
    assert sq.item() == pytest.approx(exact, rel=4 * eps(acc(dtype)))


@pairs
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pack_tells_of_what_is_not_finite(body, dtype, beside, bad, rng):
    grads = [rows(rng, (300,), beside, body.device), rows(rng, (5,), beside, body.device)]
    grads[0][271] = bad
    row = torch.zeros(305, dtype=dtype, device=body.device)
    sq = body.pack_row_(row, grads, [0, 300])
    assert not torch.isfinite(sq)
    assert torch.equal(row.nan_to_num(1, 2, 3), torch.cat(grads).to(dtype).nan_to_num(1, 2, 3))


def test_pack_norm_beyond_float32(body):
    """Elements of 1e15: the squares leave float32 when added up, the norm does not."""
    grad = torch.full((1 << 14,), 1e17, device=body.device)
    row = torch.empty_like(grad)
    sq = body.pack_row_(row, [grad], [0])
    assert sq.item() == pytest.approx(float(grad[0].double()) ** 2 * (1 << 14), rel=1e-6)


@pairs
@pytest.mark.parametrize("eta", [0.0, 0.01])
@pytest.mark.parametrize("size", [0, 1, 7, 63, 1023, 4097, 100_003])
def test_adaptive_sq_norm(body, dtype, beside, eta, size, rng):
    saved = rows(rng, (size,), beside, body.device)
    row = rows(rng, (size,), dtype, body.device)
    check_adaptive(body, saved, row, eta)


@pairs
def test_adaptive_sq_norm_of_hard_scales(body, dtype, beside, rng):
    """Misaligned too: the two begin at other places of a cache line."""
    low, high = (-3, 2) if dtype == torch.float16 else (-8, 8)
    for norm in 10.0 ** np.linspace(low, high, 5):
        saved = rows(rng, (1031,), beside, body.device)[1:]
        row = rows(rng, (1033,), dtype, body.device, norm / 32)[3:]
        check_adaptive(body, saved, row, 0.01)


def check_adaptive(body, saved: torch.Tensor, row: torch.Tensor, eta: float) -> None:
    sq = body.adaptive_sq_norm(saved, row, eta)
    assert sq.dtype == torch.float64 and sq.shape == ()
    kind = acc(row.dtype)
    plain = ((saved.to(kind).abs() + eta) * row.to(kind)).square().sum()
    s = truth(saved)
    ref = np.asarray(oracles.adaptive_sq_norm(s, truth(row), eta), dtype=s.dtype)
    check_close(sq, ref, plain, 4 * eps(kind), row.numel())


def test_adaptive_sq_norm_uses_the_absolute_value(body):
    saved = torch.tensor([-2.0, 3.0], device=body.device)
    row = torch.tensor([1.0, -1.0], device=body.device)
    assert body.adaptive_sq_norm(saved, row, 0.5).item() == 2.5**2 + 3.5**2
