"""perturb_ and restore_: the SAM and ASAM steps, and the way back."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from cases import acc, dtypes, eps, mixed, numpy64, pairs, rows

SHAPES = [(7, 3), (0,), (1,), (), (4, 3, 3, 3), (1029,), (64, 2), (40_001,)]
both = pytest.mark.parametrize("adaptive, eta", [(False, 0.0), (True, 0.0), (True, 0.02)])


class Problem:
    """Parameters, their saved copy and a gradient row, with gaps between the segments.

    dtype is the row's; beside, or dtype, that of the parameters and their copy.
    """

    def __init__(
        self,
        rng,
        dtype: torch.dtype,
        device: str,
        shapes=SHAPES,
        beside: torch.dtype | None = None,
    ) -> None:
        kind = beside or dtype
        self.params = [rows(rng, s, kind, device) for s in shapes]
        self.offsets, end = [], 0
        for p in self.params:
            end += int(rng.integers(0, 20))
            self.offsets.append(end)
            end += p.numel()
        self.size = end + 3
        self.row = rows(rng, (self.size,), dtype, device)
        self.saved = torch.zeros(self.size, dtype=kind, device=device)
        for p, o in zip(self.params, self.offsets):
            self.saved[o : o + p.numel()] = p.reshape(-1)
        self.before = [p.clone() for p in self.params]
        self.rho = [float(r) for r in 10 ** rng.uniform(0, 2, len(shapes))]

    def sq_norm(self, body, adaptive: bool, eta: float) -> torch.Tensor:
        if adaptive:
            return body.adaptive_sq_norm(self.saved, self.row, eta)
        return self.row.double().square().sum()

    def perturb(self, body, sq_norm, adaptive=False, eta=0.0) -> None:
        sq = torch.as_tensor(sq_norm, dtype=torch.float64, device=self.row.device)
        body.perturb_(self.params, self.saved, self.row, sq, self.offsets, self.rho, adaptive, eta)

    def segment(self, tensor: torch.Tensor, k: int) -> torch.Tensor:
        o, p = self.offsets[k], self.params[k]
        return tensor[o : o + p.numel()].view(p.shape)

    def unchanged(self) -> bool:
        return all(torch.equal(p, b) for p, b in zip(self.params, self.before))


@pairs
@both
def test_perturb(body, dtype, beside, adaptive, eta, rng):
    problem = Problem(rng, dtype, body.device, beside=beside)
    sq = problem.sq_norm(body, adaptive, eta)
    where = [p.data_ptr() for p in problem.params]
    for p in problem.params:
        p.fill_(float("nan"))  # theta comes from saved, not from what stands there
    problem.perturb(body, sq, adaptive, eta)
    assert where == [p.data_ptr() for p in problem.params]
    kind = acc(dtype)
    for k, (p, rho) in enumerate(zip(problem.params, problem.rho)):
        saved, row = (problem.segment(t, k) for t in (problem.saved, problem.row))
        s = rho / sq.sqrt().item()
        if adaptive:
            ref = oracles.perturb_adaptive(numpy64(saved), numpy64(row), sq.item(), rho, eta)
            scale = (saved.to(kind).abs() + eta) ** 2
        else:
            ref = oracles.perturb(numpy64(saved), numpy64(row), sq.item(), rho)
            scale = torch.ones_like(saved, dtype=kind)
        plain = (saved.to(kind) + s * scale * row.to(kind)).to(beside)
        out, error = numpy64(p), np.abs(numpy64(p) - ref)
        # one rounding at the store, and a few before it in the accumulation type
        size = np.abs(numpy64(saved)) + np.abs(ref - numpy64(saved))
        info = torch.finfo(beside)
        unit = np.maximum(0.5 * info.eps * np.abs(ref), info.smallest_normal * info.eps)
        assert np.isfinite(out).all()
        assert (error <= 1.001 * unit + 3 * eps(kind) * size).all(), k
        if p.numel() > 1000:
            theirs = np.linalg.norm(numpy64(plain) - ref)
            assert np.linalg.norm(error) <= 2 * theirs + eps(kind) * np.linalg.norm(ref)
            assert not torch.equal(p, saved)


@pairs
@both
@pytest.mark.parametrize("start", [0, 1, 16])
def test_long_rows_give_the_same_bits(body, dtype, beside, adaptive, eta, start, rng):
    """Written past the caches, because they are many, as one by one; aligned and not."""
    if body.name == "reference":
        pytest.skip("one path")
    total = 8 * 2**20 // beside.itemsize
    sizes = [total // 2 + 5, 0, 3, 70_001, total // 2]
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    size = sum(sizes)
    saved = torch.randn(size).to(beside).to(body.device)
    row = torch.randn(size).to(dtype).to(body.device)
    rho = [3.0, 1.0, 2.0, 0.0, 5.0]
    sq = torch.tensor(4.0, dtype=torch.float64, device=body.device)
    made = [torch.full((start + n + 9,), 7.0, dtype=beside, device=body.device) for n in sizes]
    params = [m[start : start + n] for m, n in zip(made, sizes)]
    alone = [torch.empty_like(p) for p in params]
    body.perturb_(params, saved, row, sq, offsets, rho, adaptive, eta)
    for p, o, radius in zip(alone, offsets, rho):
        segment = slice(o, o + p.numel())
        body.perturb_([p], saved[segment], row[segment], sq, [0], [radius], adaptive, eta)
    assert all(torch.equal(p, q) for p, q in zip(params, alone))
    assert not torch.equal(params[0], saved[: sizes[0]])
    body.restore_(params, saved, offsets)
    assert torch.equal(torch.cat(params), saved)
    for m, n in zip(made, sizes):
        assert (m[:start] == 7).all() and (m[start + n :] == 7).all()


@pairs
@both
@pytest.mark.parametrize("sq_norm", [0.0, float("nan"), float("inf")])
def test_no_step_without_a_norm(body, dtype, beside, adaptive, eta, sq_norm, rng):
    """s = 0: theta stays to the bit, also where the row holds NaN and Inf."""
    problem = Problem(rng, dtype, body.device, beside=beside)
    problem.row[::3] = float("nan")
    problem.row[1::3] = float("inf")
    problem.perturb(body, sq_norm, adaptive, eta)
    assert problem.unchanged()
    for p in problem.params:  # and theta is written from saved even so
        p.fill_(3.0)
    problem.perturb(body, sq_norm, adaptive, eta)
    assert problem.unchanged()


@pairs
@both
def test_rho_zero_leaves_its_tensor(body, dtype, beside, adaptive, eta, rng):
    problem = Problem(rng, dtype, body.device, beside=beside)
    problem.rho[0] = problem.rho[5] = 0.0
    problem.perturb(body, problem.sq_norm(body, adaptive, eta), adaptive, eta)
    assert torch.equal(problem.params[0], problem.before[0])
    assert torch.equal(problem.params[5], problem.before[5])
    assert not torch.equal(problem.params[7], problem.before[7])


@pairs
@both
def test_restore(body, dtype, beside, adaptive, eta, rng):
    problem = Problem(rng, dtype, body.device, beside=beside)
    where = [p.data_ptr() for p in problem.params]
    saved = problem.saved.clone()
    problem.perturb(body, problem.sq_norm(body, adaptive, eta), adaptive, eta)
    assert not problem.unchanged()
    assert body.restore_(problem.params, problem.saved, problem.offsets) is None
    assert problem.unchanged() and where == [p.data_ptr() for p in problem.params]
    assert torch.equal(problem.saved, saved)


@dtypes
def test_restore_keeps_every_bit(body, dtype, rng):
    """Also -0, subnormals, infinities and the payload of a NaN: a copy, not arithmetic."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.from_numpy(rng.integers(-(2**15), 2**15, 4099)).to(integer)
    bits = bits << (8 * dtype.itemsize - 16)
    saved = (bits | 1).view(dtype).to(body.device)
    params = [torch.zeros(4001, dtype=dtype, device=body.device),
              torch.zeros(98, dtype=dtype, device=body.device)]  # fmt: skip
    body.restore_(params, saved, [0, 4001])
    assert torch.equal(torch.cat(params).view(integer), saved.view(integer))


def test_from_one_perturbation_to_the_next(body, rng):
    """No restore in between: the second does not build on the first."""
    problem = Problem(rng, torch.float32, body.device)
    sq = problem.sq_norm(body, False, 0.0)
    problem.perturb(body, sq)
    once = [p.clone() for p in problem.params]
    problem.perturb(body, sq)
    assert all(torch.equal(p, o) for p, o in zip(problem.params, once))


@both
def test_length_of_the_step(body, adaptive, eta, rng):
    """||eps|| = rho for SAM; || eps / (|theta| + eta) || = rho for ASAM."""
    problem = Problem(rng, torch.float64, body.device, [(30, 4), (17,)])
    problem.rho = [0.3, 0.3]
    used = torch.zeros_like(problem.row)
    for p, o in zip(problem.params, problem.offsets):
        used[o : o + p.numel()] = problem.row[o : o + p.numel()]
    problem.row = used  # the norm is over what is perturbed
    problem.perturb(body, problem.sq_norm(body, adaptive, eta), adaptive, eta)
    total = 0.0
    for p, b in zip(problem.params, problem.before):
        scale = b.abs() + eta if adaptive else torch.ones_like(b)
        total += ((p - b) / scale).square().sum().item()
    assert total == pytest.approx(0.3**2, rel=1e-12)


@pytest.mark.parametrize("norm", [1e-8, 1e8])
def test_hard_scales(body, norm, rng):
    problem = Problem(rng, torch.float32, body.device, [(1001,)])
    problem.row *= norm / problem.row.norm().item()
    problem.rho = [0.05]
    problem.perturb(body, problem.sq_norm(body, False, 0.0))
    step = (problem.params[0] - problem.before[0]).double().norm().item()
    inside = problem.segment(problem.row, 0).double().norm().item() / norm
    assert step == pytest.approx(0.05 * inside, rel=1e-4)


@mixed
@pytest.mark.parametrize("norm", [1e-8, 1e-2, 1e4, 1e8])
def test_hard_scales_of_narrow_rows(body, dtype, beside, norm, rng):
    if dtype == torch.float16 and not 1e-3 < norm < 1e6:
        pytest.skip("beyond float16's range")
    problem = Problem(rng, dtype, body.device, [(1001,)], beside)
    row = problem.row.double()
    problem.row = (row * (norm / row.norm())).to(dtype)
    problem.rho = [0.05]
    sq = problem.sq_norm(body, False, 0.0)
    problem.perturb(body, sq)
    saved, direction = (numpy64(problem.segment(t, 0)) for t in (problem.saved, problem.row))
    ref = oracles.perturb(saved, direction, sq.item(), 0.05)
    moved = numpy64(problem.params[0]) - saved
    step = ref - saved
    # theta + eps is rounded to float32 where theta is about 1 and eps about 0.0015 an element
    assert np.linalg.norm(moved - step) <= 1e-4 * np.linalg.norm(step)


@mixed
def test_narrow_rows_misaligned(body, dtype, beside, rng):
    """saved, row and parameters begin at other places of a cache line, in any combination."""
    for begin in range(5):
        saved = rows(rng, (1500 + begin,), beside, body.device)[begin:]
        row = rows(rng, (1500 + 3 * begin,), dtype, body.device)[3 * begin :]
        params = [rows(rng, (700 + begin,), beside, body.device)[begin:],
                  rows(rng, (799,), beside, body.device)]  # fmt: skip
        sq = row.double().square().sum()
        body.perturb_(params, saved, row, sq, [0, 701], [0.5, 0.25], True, 0.01)
        for p, o, rho in zip(params, (0, 701), (0.5, 0.25)):
            part = slice(o, o + p.numel())
            s, g = numpy64(saved)[part], numpy64(row)[part]
            ref = oracles.perturb_adaptive(s, g, sq.item(), rho, 0.01)
            error = np.abs(numpy64(p) - ref)
            assert (error <= 4 * eps(beside) * (np.abs(s) + np.abs(ref - s))).all()


def test_empty_lists(body):
    empty = torch.empty(0, device=body.device)
    one = torch.ones((), dtype=torch.float64, device=body.device)
    body.perturb_([], empty, empty, one, [], [], False, 0.0)
    body.restore_([], empty, [])
