"""draw_order_: random visiting orders from a seed and a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch


def state(seed: int, step: int, body=None) -> torch.Tensor:
    device = body.device if body is not None else "cpu"
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 33, 100])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_permutations(body, tasks, batch, rng):
    rng_state = state(int(rng.integers(2**62)), 0, body)
    order = body.draw_order_(rng_state, tasks, batch)
    assert order.dtype == torch.int64 and order.shape == (batch, tasks, tasks)
    identity = torch.arange(tasks, device=body.device).expand(batch, tasks, tasks)
    assert torch.equal(order.sort(dim=-1).values, identity)


def test_step_advances_by_one(body):
    s = state(5, 41, body)
    body.draw_order_(s, 3, 4)
    assert s.tolist() == [5, 42]


def test_same_state_same_order(body, rng):
    seed = int(rng.integers(2**62))
    first = body.draw_order_(state(seed, 7, body), 9, 2)
    assert torch.equal(first, body.draw_order_(state(seed, 7, body), 9, 2))
    assert not torch.equal(first, body.draw_order_(state(seed, 8, body), 9, 2))
    assert not torch.equal(first, body.draw_order_(state(seed + 1, 7, body), 9, 2))


def test_rows_and_batches_differ(body, rng):
    order = body.draw_order_(state(int(rng.integers(2**62)), 0, body), 16, 3)
    rows = {tuple(r) for r in order.reshape(-1, 16).tolist()}
    assert len(rows) == 48


def test_position_in_the_batch_fixes_the_draw(body, rng):
    """Batch entry b does not depend on how many entries are drawn with it."""
    seed = int(rng.integers(2**62))
    four = body.draw_order_(state(seed, 3, body), 6, 4)
    one = body.draw_order_(state(seed, 3, body), 6, 1)
    assert torch.equal(four[:1], one)


@pytest.mark.parametrize("seed, step", [
    (0, 0), (1, 0), (-1, 5), (2**40 + 3, 9), (2**63 - 1, 2**31), (-(2**63), 2**32 + 1), (7, 2**40),
])  # fmt: skip
@pytest.mark.parametrize("tasks", [2, 5, 17, 64])
def test_the_bodies_draw_the_same(seed, step, tasks):
    import flatmtl.ops.reference as reference

    a, b = state(seed, step), state(seed, step)
    mine = torch.ops.flatmtl.draw_order_(a, tasks, 2)
    assert torch.equal(mine, reference.draw_order_(b, tasks, 2))
    assert torch.equal(a, b) and a.tolist() == [seed, step + 1]
    if torch.cuda.is_available():
        c = state(seed, step).cuda()
        assert torch.equal(torch.ops.flatmtl.draw_order_(c, tasks, 2).cpu(), mine)


@pytest.mark.parametrize("body", ["cpu"], indirect=True)
@pytest.mark.parametrize("tasks", [3, 4])
def test_uniform(body, tasks):
    """Chi-square over all permutations, separately for every row; the seed is fixed."""
    steps = 6000
    s = state(20260101, 0, body)
    drawn = torch.cat([body.draw_order_(s, tasks, 1) for _ in range(steps)]).numpy()
    codes = {p: i for i, p in enumerate(itertools.permutations(range(tasks)))}
    for row in range(tasks):
        counts = np.zeros(len(codes))
        for p in drawn[:, row]:
            counts[codes[tuple(p)]] += 1
        expected = steps / len(codes)
        chi = ((counts - expected) ** 2 / expected).sum()
        freedom = len(codes) - 1
        assert chi < freedom + 4 * np.sqrt(2 * freedom), (row, counts)  # about 1 in 10^4


@pytest.mark.parametrize("body", ["cpu"], indirect=True)
def test_rows_are_independent(body):
    """T = 3: the pair (order of row 0, order of row 1) is uniform too, and so over batches."""
    s = state(77, 0, body)
    drawn = torch.cat([body.draw_order_(s, 3, 2) for _ in range(9000)]).reshape(-1, 2, 3, 3)
    codes = {p: i for i, p in enumerate(itertools.permutations(range(3)))}
    for left, right in [((0, 0), (0, 1)), ((0, 1), (0, 2)), ((0, 0), (1, 0))]:
        counts = np.zeros((6, 6))
        a, b = drawn[:, left[0], left[1]].tolist(), drawn[:, right[0], right[1]].tolist()
        for p, q in zip(a, b):
            counts[codes[tuple(p)], codes[tuple(q)]] += 1
        expected = len(drawn) / 36
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi < 35 + 4 * np.sqrt(70), counts
