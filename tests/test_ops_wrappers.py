"""The documented functions: what they allocate and convert."""

from __future__ import annotations

import pytest
import torch
from cases import dtypes, mixed, rows

from flatmtl import ops


@dtypes
def test_outputs_are_allocated(dtype, device, rng):
    jac, sam = (rows(rng, (3, 130), dtype, device) for _ in range(2))
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    c = torch.stack([w, -w])
    for function, args, shape in [
        (ops.combine, (jac, w), (130,)),
        (ops.combine_flat, (jac, w, sam, w), (130,)),
        (ops.project, (jac, c), (2, 130)),
    ]:
        fresh = function(*args)
        assert fresh.dtype == dtype and fresh.device == jac.device and fresh.shape == shape
        given = torch.empty(shape, dtype=dtype, device=device)
        assert function(*args, out=given) is given
        assert torch.equal(fresh, given)


@mixed
def test_rows_in_half_precision_beside_float32(dtype, beside, device, rng):
    jac, sam = (rows(rng, (3, 130), dtype, device) for _ in range(2))
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    for function, args in [(ops.combine, (jac, w)), (ops.combine_flat, (jac, w, sam, w))]:
        out = torch.empty(130, dtype=beside, device=device)
        version = out._version
        assert function(*args, out=out) is out and out._version > version
        assert torch.equal(out.to(dtype), function(*args))  # the same sum, rounded


@mixed
def test_pack_takes_any_memory_layout_of_float32(dtype, beside, device, rng):
    base = rows(rng, (6, 8, 5), beside, device)
    grads, offsets = [base.transpose(0, 1), base[:, ::2, 1]], [3, 250]
    row = torch.zeros(280, dtype=dtype, device=device)
    version = row._version
    ops.pack_row_(row, grads, offsets)
    assert row._version > version
    for g, o in zip(grads, offsets):
        assert torch.equal(row[o : o + g.numel()], g.reshape(-1).to(dtype))
    twice = ops.pack_row_(row, grads, offsets, accumulate=True)
    assert twice.item() == pytest.approx(row.double().square().sum().item(), rel=1e-5)
    for g, o in zip(grads, offsets):
        half = g.reshape(-1).to(dtype).float()
        assert torch.equal(row[o : o + g.numel()], (half + g.reshape(-1)).to(dtype))


def test_float32_weights_are_taken(rng):
    jac = rows(rng, (3, 50), torch.float32)
    w = torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(ops.combine(jac, w), ops.combine(jac, w.double()))


@dtypes
def test_pack_takes_any_memory_layout(dtype, device, rng):
    base = rows(rng, (6, 8, 5, 3), dtype, device)
    grads = [
        base.transpose(0, 1),
        base.contiguous(memory_format=torch.channels_last),
        base[:, ::2],
        base[0, 0, 0, 0],
        base[:, :0],
        rows(rng, (1, 7), dtype, device).expand(4, 7),
    ]
    offsets, end = [], 3
    for g in grads:
        offsets.append(end)
        end += g.numel() + 2
    row = torch.full((end,), float("nan"), dtype=dtype, device=device)
    sq = ops.pack_row_(row, grads, offsets)
    covered = torch.zeros(end, dtype=torch.bool, device=device)
    for g, o in zip(grads, offsets):
        assert torch.equal(row[o : o + g.numel()], g.reshape(-1))  # in row-major order
        covered[o : o + g.numel()] = True
    assert (row[~covered] == 0).all()
    expected = sum(g.double().square().sum() for g in grads)
    assert sq.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gram_of_a_column_slice(rng):
    """P = 1: a column of a matrix has stride > 1 along the row, which then means nothing."""
    whole = rows(rng, (4, 9), torch.float64)
    column = whole[:, 3:4]
    torch.testing.assert_close(ops.gram(column), column @ column.T)


def test_solvers_take_one_gram_or_a_batch(device, rng):
    jac = rows(rng, (2, 4, 30), torch.float64, device)
    grams = jac @ jac.mT
    order = ops.draw_order_(torch.tensor([1, 2], device=device), 4, 2)
    w, k, s = ops.solve_pcgrad(grams, order)
    w0, k0, s0 = ops.solve_pcgrad(grams[0], order[0])
    assert w0.shape == (4,) and k0.shape == (4, 4) and s0.shape == ()
    assert torch.equal(w[0], w0) and torch.equal(k[0], k0) and torch.equal(s[0], s0)
    v, t, r = ops.solve_mgda(grams, 1e-10)
    v0, t0, r0 = ops.solve_mgda(grams[1], 1e-10)
    assert v0.shape == (4,) and t0.shape == r0.shape == ()
    assert torch.equal(v[1], v0) and torch.equal(t[1], t0) and torch.equal(r[1], r0)


SOLVERS = {
    "solve_constant": {}, "solve_mgda": {}, "solve_dual_cone": {"each": True},
    "solve_cagrad": {"c": 0.4}, "solve_alpha_fair": {"alpha": 2.0}, "solve_imtl_g": {},
    "solve_config": {}, "solve_aligned": {}, "solve_krum": {"byzantine": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_one_gram_or_a_batch(name, device, rng):
    jac = rows(rng, (2, 4, 30), torch.float64, device)
    grams = jac @ jac.mT
    solve = getattr(ops, name)
    many, first = solve(grams, **SOLVERS[name]), solve(grams[0], **SOLVERS[name])
    assert many[0].shape == (2, 4) and all(t.shape == (2,) for t in many[1:])
    for batched, one in zip(many, first, strict=True):
        assert torch.equal(batched[0], one)
    assert many[0].dtype == torch.float64 and many[1].dtype == torch.int64
    nothing = solve(grams[:0], **SOLVERS[name])
    assert nothing[0].shape == (0, 4) and all(t.shape == (0,) for t in nothing[1:])


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_float32_and_any_strides(name, device, rng):
    jac = rows(rng, (4, 30), torch.float32, device)
    gram = jac @ jac.T
    wide = torch.full((4, 9), float("nan"), device=device)
    wide[:, 1:5] = gram
    solve = getattr(ops, name)
    options = SOLVERS[name] if name in ("solve_constant", "solve_aligned", "solve_krum") else {
        **SOLVERS[name], "ridge": 1e-6}  # fmt: skip
    for a, b, c in zip(
        solve(gram, **SOLVERS[name]),  # its ridge is that of its dtype
        solve(gram.double(), **options),
        solve(wide[:, 1:5], **SOLVERS[name]),
    ):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_no_gradient_is_recorded(rng):
    jac = rows(rng, (3, 20), torch.float32)
    w = torch.ones(3, dtype=torch.float64)
    assert not ops.combine(jac, w).requires_grad
    params = [torch.nn.Parameter(torch.randn(20))]
    saved = params[0].detach().clone()
    with torch.no_grad():
        ops.perturb_(params, saved, jac[0], jac[0].double().square().sum(), [0], [0.5])
    assert params[0].is_leaf and not torch.equal(params[0], saved)
    with torch.no_grad():
        ops.restore_(params, saved, [0])
    assert torch.equal(params[0], saved)


def test_in_place_writes_are_seen_by_autograd(rng):
    """A backward through values that perturb_ overwrote must raise, not be wrong."""
    p = torch.nn.Parameter(torch.randn(20))
    saved, row = p.detach().clone(), torch.randn(20)
    loss = (p * p).sum()
    with torch.no_grad():
        ops.perturb_([p], saved, row, row.double().square().sum(), [0], [0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
