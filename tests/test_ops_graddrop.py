"""graddrop_ against an oracle with a Philox of its own, for every body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, SIZES, acc, dtypes, layout, mixed, numpy64, pairs, rows

from flatmtl import ops
from flatmtl.ops import reference

LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
NAN = float("nan")


def philox(key: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): counter uint64 [n, 4] of 32-bit words -> the same shape."""
    c = counter.astype(np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[:, 0], np.uint64(0xCD9E8D57) * c[:, 2]
        c = np.stack(
            [(second >> SHIFT) ^ c[:, 1] ^ np.uint64(k0), second & LOW,
             (first >> SHIFT) ^ c[:, 3] ^ np.uint64(k1), first & LOW], 1)  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def uniform(seed: int, step: int, size: int) -> np.ndarray:
    """The numbers of the columns, float64 in (0, 1)."""
    key = (seed % 2**64) ^ (step >> 32 << 32) ^ 0xD1B54A32D192ED03
    quad = np.arange((size + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(quad)
    counter = np.stack([quad & LOW, quad >> SHIFT, zero, zero + np.uint64(step % 2**32)], 1)
    word = philox(key, counter).reshape(-1)[:size]
    return (2 * (word >> np.uint64(9)) + np.uint64(1)).astype(np.float64) / 2.0**24


def purity(jac: np.ndarray) -> np.ndarray:
    """P = 0.5 (1 + sum g / sum |g|), 0.5 where a column is all zero."""
    total = np.abs(jac).sum(0)
    return 0.5 * (1 + np.divide(jac.sum(0), total, out=np.zeros_like(total), where=total > 0))


def graddrop(jac: np.ndarray, leak: np.ndarray, u: np.ndarray) -> np.ndarray:
    """sum_i (l_i + (1 - l_i) M_i) g_i, as the paper's Algorithm 1 has it."""
    p = purity(jac)
    kept = ((p > u) & (jac > 0)) | ((p < u) & (jac < 0))
    return ((leak[:, None] + (1 - leak[:, None]) * kept) * jac).sum(0)


def test_philox_of_the_oracle():
    """The known answers of the generator's authors."""
    zero, ones = np.zeros((1, 4), np.uint64), np.full((1, 4), LOW)
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, zero).tolist() == [expected]
    expected = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(2**64 - 1, ones).tolist() == [expected]


def given(rng, body, tasks: int):
    """A leak, and the stream's seed and step."""
    seed, step = int(rng.integers(-(2**62), 2**62)), int(rng.integers(0, 2**40))
    state = torch.tensor([seed, step], device=body.device)
    return torch.from_numpy(rng.random(tasks)).to(body.device), state, seed, step


def check(body, jac, leak, state, beside, there=None) -> torch.Tensor:
    """Against the oracle, where P is not so close to U that rounding decides."""
    tasks, size = jac.shape
    seed, step = state.tolist()
    out = torch.full((size,), NAN, dtype=beside, device=body.device)
    assert body.graddrop_(jac, leak, there, state, out) is None
    assert state.tolist() == [seed, step + 1]
    true = numpy64(jac)
    if there is not None:
        true = true[there.cpu().numpy()]
    kept = np.zeros(tasks) if leak is None else numpy64(leak)
    kept = kept if there is None else kept[there.cpu().numpy()]
    u = uniform(seed, step, size)
    ref = graddrop(true, kept, u)
    near = np.abs(purity(true) - u) < 4 * (tasks + 2) * torch.finfo(acc(jac.dtype)).eps
    assert near.sum() <= 1e-3 * size + 8
    unit = torch.finfo(beside).eps
    tolerance = (tasks + 4) * torch.finfo(acc(jac.dtype)).eps * np.abs(true).sum(0)
    tolerance = tolerance + unit * np.abs(ref) + torch.finfo(beside).smallest_normal * unit
    wrong = np.abs(numpy64(out) - ref) > tolerance
    assert not (wrong & ~near).any()
    return out


@pairs
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16, 17, 33, 200])
def test_formula(body, dtype, beside, tasks, rng):
    for size in SIZES:
        jac = rows(rng, (tasks, size), dtype, body.device)
        leak, state, *_ = given(rng, body, tasks)
        check(body, jac, None, state, beside)
        check(body, jac, leak, state, beside)


@pairs
def test_the_bodies_give_the_same_bits(body, dtype, beside, rng):
    if body.name == "reference":
        pytest.skip("the others are compared with it")
    for tasks, size in [(1, 5), (3, 4099), (17, 1500), (40, 777), (3, 66_007)]:
        jac = rows(rng, (tasks, size), dtype)
        leak, state, *_ = given(rng, body, tasks)
        there = torch.from_numpy(rng.random(tasks) < 0.8)
        for part in (None, leak.cpu()):
            for counted in (None, there):
                mine, theirs = (torch.empty(size, dtype=beside) for _ in range(2))
                reference.graddrop_(jac, part, counted, state.cpu().clone(), theirs)
                device = (x if x is None else x.to(body.device) for x in (part, counted))
                result = mine.to(body.device)
                body.graddrop_(jac.to(body.device), *device, state.clone(), result)
                assert torch.equal(result.cpu(), theirs)


@dtypes
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(body, dtype, kind, rng):
    for tasks, size in [(1, 65), (3, 1000), (9, 4099)]:
        jac = rows(rng, (tasks, size), dtype, body.device)
        leak, state, *_ = given(rng, body, tasks)
        again = state.clone()
        moved = check(body, layout(jac, kind), leak, state, dtype)
        assert torch.equal(moved, check(body, jac, leak, again, dtype))


@mixed
def test_output_in_a_slice(body, dtype, beside, rng):
    jac = rows(rng, (3, 501), dtype, body.device)
    _, state, *_ = given(rng, body, 3)
    expected = torch.empty(501, dtype=beside, device=body.device)
    body.graddrop_(jac, None, None, state.clone(), expected)
    for start in (0, 1, 2, 5):
        whole = torch.full((509,), 7.0, dtype=beside, device=body.device)
        body.graddrop_(jac, None, None, state.clone(), whole[start : start + 501])
        assert torch.equal(whole[start : start + 501], expected)
        assert (whole[:start] == 7).all() and (whole[start + 501 :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hard_scales(body, dtype, rng):
    """An absolute eps of 1e-7 would make P a half at 1e-8."""
    for low, high in [(-8, -8), (8, 8), (-8, 8)]:
        scale = 10.0 ** rng.uniform(low, high, (5, 1))
        jac = rows(rng, (5, 4099), dtype, body.device, scale)
        leak, state, *_ = given(rng, body, 5)
        check(body, jac, None, state, dtype)
        check(body, jac, leak, state, dtype)


@dtypes
def test_of_one_sign_is_the_sum(body, dtype, rng):
    for sign in (1, -1):
        jac = sign * rows(rng, (4, 1025), dtype, body.device).abs()
        jac[:, ::7] = 0
        _, state, *_ = given(rng, body, 4)
        out = torch.empty(1025, dtype=acc(dtype), device=body.device)
        body.graddrop_(jac, None, None, state, out) if acc(dtype) != dtype else None
        exact = jac.to(acc(dtype))
        total = exact[0] + exact[1] + exact[2] + exact[3]
        small = torch.empty(1025, dtype=dtype, device=body.device)
        body.graddrop_(jac, None, None, state, small)
        assert torch.equal(small, total.to(dtype))
        if acc(dtype) != dtype:
            assert torch.equal(out, total)


@dtypes
def test_a_full_leak_is_the_sum(body, dtype, rng):
    jac = rows(rng, (3, 515), dtype, body.device)
    _, state, *_ = given(rng, body, 3)
    one = torch.ones(3, dtype=torch.float64, device=body.device)
    out = torch.empty(515, dtype=dtype, device=body.device)
    body.graddrop_(jac, one, None, state, out)
    exact = jac.to(acc(dtype))
    assert torch.equal(out, (exact[0] + exact[1] + exact[2]).to(dtype))


def test_expectation(body, rng):
    """The mean over the draws is P g+ + (1 - P) g-, within 6 of its standard deviations."""
    if body.name == "reference":
        pytest.skip("the same bits as the others")
    tasks, columns, draws = 3, 64, 4000
    jac = rows(rng, (tasks, columns), torch.float64, body.device)
    _, state, *_ = given(rng, body, tasks)
    total = np.zeros(columns)
    for _ in range(draws):
        out = torch.empty(columns, dtype=torch.float64, device=body.device)
        body.graddrop_(jac, None, None, state, out)
        total += numpy64(out)
    true = numpy64(jac)
    p, plus, minus = purity(true), true.clip(0).sum(0), true.clip(max=0).sum(0)
    deviation = np.sqrt(p * (1 - p) / draws) * (plus - minus)
    assert (np.abs(total / draws - (p * plus + (1 - p) * minus)) <= 6 * deviation + 1e-12).all()


def test_numbers_are_uniform(body, rng):
    """Two rows, 1 and -c: what is kept says whether U was below 1 / (1 + c)."""
    size = 100_000
    _, state, *_ = given(rng, body, 2)
    below = []
    for share in (0.1, 0.5, 0.93):
        jac = torch.tensor([[share], [share - 1]], dtype=torch.float64, device=body.device)
        out = torch.empty(size, dtype=torch.float64, device=body.device)
        body.graddrop_(jac.expand(2, size).contiguous(), None, None, state, out)
        below.append((out > 0).double())
        assert abs(below[-1].mean() - share) < 6 * np.sqrt(share * (1 - share) / size)
    neighbours = (below[1][1:] - 0.5) * (below[1][:-1] - 0.5)
    assert abs(neighbours.mean()) < 6 * 0.25 / np.sqrt(size)  # columns are drawn apart
    assert abs(((below[0] - 0.1) * (below[1] - 0.5)).mean()) < 6 * 0.15 / np.sqrt(size)  # and steps


@pairs
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_row_that_is_not_there_is_not_read(body, dtype, beside, bad, rng):
    for tasks in (1, 2, 5, 33):
        jac = rows(rng, (tasks, 515), dtype, body.device)
        leak, state, *_ = given(rng, body, tasks)
        there = torch.from_numpy(rng.random(tasks) < 0.5).to(body.device)
        clean = torch.where(there.unsqueeze(1), jac, torch.zeros_like(jac))
        jac[~there] = bad
        for part in (None, leak):
            again = state.clone()
            out = check(body, jac, part, state, beside, there)
            expected = torch.empty_like(out)
            body.graddrop_(clean, part, None, again, expected)
            assert torch.isfinite(out).all() and torch.equal(out, expected)


def test_nan_shows(body):
    jac = torch.tensor([[1.0, NAN, -1.0, NAN], [2.0, 1.0, -2.0, -1.0]], device=body.device)
    for leak in (None, torch.full((2,), 0.5, dtype=torch.float64, device=body.device)):
        for seed in range(8):
            out = torch.empty(4, device=body.device)
            body.graddrop_(jac, leak, None, torch.tensor([seed, 0], device=body.device), out)
            assert out.isnan().tolist() == [False, True, False, True]


def test_zeros_give_zeros(body):
    out = torch.full((9,), 7.0, device=body.device)
    jac = torch.zeros(2, 9, device=body.device)
    jac[1] = -0.0
    body.graddrop_(jac, None, None, torch.tensor([1, 0], device=body.device), out)
    assert torch.equal(out, torch.zeros_like(out)) and not out.signbit().any()


def test_seeds_and_steps_differ(body, rng):
    jac = rows(rng, (2, 4000), torch.float32, body.device)
    results = []
    for seed, step in [(0, 0), (1, 0), (0, 1), (2**40, 0), (0, 2**32), (-1, 0)]:
        out = torch.empty(4000, device=body.device)
        body.graddrop_(jac, None, None, torch.tensor([seed, step], device=body.device), out)
        results.append(out)
    for k, a in enumerate(results):
        for b in results[:k]:
            assert (a != b).double().mean() > 0.1


def test_a_slice_of_columns_is_drawn_by_its_own_place(body, rng):
    """U belongs to the column's number, not to what lies beside it."""
    jac = rows(rng, (3, 70_003), torch.float32, body.device)
    state = torch.tensor([5, 1], device=body.device)
    whole, part = (torch.empty(n, device=body.device) for n in (70_003, 1037))
    body.graddrop_(jac, None, None, state.clone(), whole)
    body.graddrop_(jac[:, :1037], None, None, state, part)
    assert torch.equal(whole[:1037], part)


def test_beyond_the_caches(body, rng):
    """Where the compiled body writes past them."""
    if body.name == "reference":
        pytest.skip("one path")
    jac = torch.randn(2, 2_100_003, device=body.device)
    _, state, *_ = given(rng, body, 2)
    out = check(body, jac, None, state.clone(), torch.float32)
    part = torch.empty(5000, device=body.device)
    body.graddrop_(jac[:, :5000], None, None, state, part)
    assert torch.equal(part, out[:5000])


JAC, RNG, OUT = torch.ones(3, 37), torch.tensor([1, 2]), torch.zeros(37)
ERRORS = {
    "jac 1-D": ((JAC[0], RNG), {}, "jac"),
    "jac integers": ((JAC.long(), RNG), {}, "jac"),
    "rng float": ((JAC, RNG.double()), {}, "rng"),
    "rng length": ((JAC, RNG[:1]), {}, "rng"),
    "rng device": ((JAC, RNG.to("meta")), {}, "rng"),
    "rng strided": ((JAC, torch.zeros(4, dtype=torch.int64)[::2]), {}, "rng"),
    "leak length": ((JAC, RNG), {"leak": torch.ones(2)}, "leak"),
    "leak integers": ((JAC, RNG), {"leak": torch.ones(3).long()}, "leak"),
    "leak list": ((JAC, RNG), {"leak": [0.1] * 3}, "leak"),
    "there length": ((JAC, RNG), {"there": torch.ones(2).bool()}, "there"),
    "there float": ((JAC, RNG), {"there": torch.ones(3)}, "there"),
    "there device": ((JAC, RNG), {"there": torch.ones(3).bool().to("meta")}, "there"),
    "out length": ((JAC, RNG), {"out": OUT[1:]}, "out"),
    "out dtype": ((JAC, RNG), {"out": OUT.double()}, "out"),
    "out a row": ((JAC, RNG), {"out": JAC[1]}, "out"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_argument(case):
    args, options, name = ERRORS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.graddrop_(*args, **options)
    message = str(caught.value)
    assert name in message.split() and ("got" in message or "share" in message), message
    assert RNG.tolist() == [1, 2] and (JAC == 1).all() and (OUT == 0).all()


@pytest.mark.parametrize(
    "args, name",
    [((JAC, torch.ones(3), None, RNG, OUT), "leak"), ((JAC, None, JAC[:, 0], RNG, OUT), "there"),
     ((JAC, None, None, RNG.int(), OUT), "rng"), ((JAC, None, None, RNG, OUT.double()), "out"),
     ((JAC.T, None, None, RNG, OUT), "jac")],
)  # fmt: skip
def test_wrong_argument_of_the_op_itself(args, name):
    with pytest.raises(RuntimeError, match=name):
        torch.ops.flatmtl.graddrop_(*args)
    assert RNG.tolist() == [1, 2] and (OUT == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_documented_function(dtype):
    jac = torch.randn(3, 37).to(dtype)
    rng = torch.tensor([1, 2])
    out = ops.graddrop_(jac, rng, leak=torch.full((3,), 0.5), there=torch.tensor([True] * 3))
    assert out.dtype == dtype and out.shape == (37,) and rng.tolist() == [1, 3]
    same = torch.empty_like(out)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    reference.graddrop_(jac, half, None, torch.tensor([1, 2]), same)
    assert torch.equal(out, same)
