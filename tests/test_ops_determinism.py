"""The same bits whatever the number of threads, and run to run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import pairs, rows

CASES = [(1, 300_007), (3, 100_003), (9, 50_001), (40, 20_011), (130, 4_111)]


def solvers(body, gram: torch.Tensor, order: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    tasks = len(gram)
    state, target = gram.new_zeros(tasks + 1), torch.zeros_like(gram)
    simplex = gram.new_full((tasks,), 1 / tasks)
    out = [
        body.solve_mgda(gram, 1e-10), body.solve_dual_cone(gram, None, tasks <= 40, 1e-10),
        body.solve_cagrad(gram, 0.4, 1, 1e-10), body.solve_alpha_fair(gram, 2.0, None, 1e-10),
        body.solve_nash_(gram, state.clone(), 1, 1.0, 1e-10), body.solve_imtl_g(gram, 1e-10),
        body.solve_config(gram, None, 1e-10), body.solve_aligned(gram, None, 0, 2.0**-23),
        body.solve_pcd_(gram, state, 0.02, 0.999, 1e-8, 1e-10), body.solve_krum(gram, 0, 1),
        body.solve_gradvac(gram, order, target, 0.5, 1e-8), body.solve_constant(gram, None, 0.5),
        body.solve_sdmgrad_(gram, simplex, None, 0.1, 0.5, 5, 0.3),
        body.solve_modo_(gram, simplex, 0.1, 0.1),
        body.solve_random_(gram, torch.tensor([3, 4], device=gram.device)),
        body.solve_pcgrad_drawn_(gram, torch.tensor([3, 4], device=gram.device)),
        body.solve_gradvac_drawn_(
            gram, torch.tensor([3, 4], device=gram.device), target.clone(), 0.5, 1e-8),
    ]  # fmt: skip
    return [*out, (state, target, simplex, body.scale_weights(gram, out[3][0], 2, 0.5))]


def everything(body, jac, sam, a, b, grads, offsets) -> list[torch.Tensor]:
    tasks, size = jac.shape
    beside = grads[0].dtype
    out, flat = (torch.empty(size, dtype=beside, device=jac.device) for _ in range(2))
    projected = torch.empty((min(tasks, 5), size), dtype=jac.dtype, device=jac.device)
    row = torch.empty(size, dtype=jac.dtype, device=jac.device)
    body.combine(jac, a, out)
    body.combine_flat(jac, a, sam, b, flat)
    body.project(jac, torch.stack([a, b, a + b, a * b, -a])[: len(projected)], projected)
    dropped, leaked, stream = out.clone(), out.clone(), torch.tensor([3, 4], device=jac.device)
    body.graddrop_(jac, None, None, stream, dropped)
    body.graddrop_(jac, a.sigmoid(), a > -1, stream, leaked)
    sq = body.pack_row_(row, grads, offsets)
    twice = jac[-1].clone()
    sq_twice = body.pack_row_(twice, grads, offsets, True)
    saved = jac[0].to(beside)
    asam = body.adaptive_sq_norm(saved, row, 0.01)
    params = [g.clone() for g in grads]
    body.perturb_(params, saved, row, sq, offsets, [0.1] * len(params), True, 0.01)
    gram = body.gram(jac)
    order = body.draw_order_(torch.tensor([3, 4], device=jac.device), tasks, 1)
    k = body.solve_pcgrad(gram[None], order)
    v = [t for solver in solvers(body, gram, order[0]) for t in solver]
    others = [body.gram_difference(sam, jac), body.row_norms(jac), sq, asam, order, twice, sq_twice]
    pair = body.gram_pair(sam, jac)
    drops = [dropped, leaked, stream]
    return [out, flat, projected, row, gram, *params, *k, *v, *others, *pair, *drops]


def inputs(rng, tasks: int, size: int, dtype: torch.dtype, device: str, beside: torch.dtype):
    jac, sam = (rows(rng, (tasks, size), dtype, device) for _ in range(2))
    a, b = (torch.from_numpy(rng.standard_normal(tasks)).to(device) for _ in range(2))
    cut = size // 3
    grads = [rows(rng, (cut,), beside, device), rows(rng, (size - cut - 9,), beside, device)]
    return jac, sam, a, b, grads, [4, cut + 7]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return all(raw(x) == raw(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("body", ["cpu"], indirect=True)
@pairs
@pytest.mark.parametrize("tasks, size", CASES)
def test_any_number_of_threads(body, dtype, beside, tasks, size, threads, rng):
    given = inputs(rng, tasks, size, dtype, "cpu", beside)
    threads(1)
    first = everything(body, *given)
    for count in (2, 3, 4, 7):
        threads(count)
        assert torch.get_num_threads() == count
        assert same_bits(first, everything(body, *given)), f"{count} threads"


@pytest.mark.parametrize(
    "body", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pairs
@pytest.mark.parametrize("tasks, size", [(3, 100_003), (40, 20_011)])
def test_run_to_run(body, dtype, beside, tasks, size, rng):
    given = inputs(rng, tasks, size, dtype, body.device, beside)
    first = everything(body, *given)
    for _ in range(3):
        noise = torch.randn(1000, 300, device=body.device)  # something else in between
        noise @ noise.T
        assert same_bits(first, everything(body, *given))


@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_a_copy_elsewhere_gives_the_same(body, rng):
    """The chunks are counted from the start of the row, not from an address."""
    tasks, size = 5, 30_011
    jac = rows(rng, (tasks, size), torch.float32)
    buffer = torch.zeros(tasks, size + 13)
    buffer[:, 5 : 5 + size] = jac
    view = buffer[:, 5 : 5 + size]
    assert torch.equal(body.gram(jac), body.gram(view))
    assert all(map(torch.equal, body.gram_pair(view, jac), body.gram_pair(jac, view)))
    assert torch.equal(body.row_norms(jac), body.row_norms(view))
    w = torch.from_numpy(np.asarray(rng.standard_normal(tasks)))
    a, b = torch.empty(size), torch.empty(size)
    body.combine(jac, w, a)
    body.combine(view, w, b)
    assert torch.equal(a, b)
