"""bench/scaling_model.py: its sums of bytes and seconds, and that docs/scaling.md has its tables.

That its calls are those of real steps: test_ranks_counts.py.
"""

from pathlib import Path

import pytest

from bench.scaling_model import (
    Machine,
    kept_parts,
    kept_rows,
    left,
    main,
    moved,
    parts,
    row,
    rows,
    seconds,
    total,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"


def test_the_page_has_its_tables(capsys):
    main()
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    page = PAGE.read_text()
    assert all(table in page for table in tables)


def test_rings_move_what_it_says(rng):
    """Counted by hand, step by step, over a ring."""
    n = int(rng.integers(2, 9))
    chunk = 8 * int(rng.integers(1, 100))
    whole = n * chunk
    scatter = sum(chunk for _ in range(n - 1))
    gather = sum(chunk for _ in range(n - 1))
    assert moved([("reduce_scatter_tensor", whole)], n) == pytest.approx(scatter)
    assert moved([("all_gather_into_tensor", chunk)], n) == pytest.approx(gather)
    assert moved([("all_reduce", whole)], n) == pytest.approx(scatter + gather)


def test_parts_move_about_half_and_keep_less():
    T, n, e, sizes = 8, 64, 4, [10_000_000]
    P, P_ = row(e, sizes), row(e, sizes, n)
    whole, part = rows(T, P, T * [0], e), parts(T, P_, T * [0], e, n)
    assert moved(part, n) / moved(whole, n) == pytest.approx((T + 1) / (2 * T), rel=1e-3)
    ratio = kept_parts(T, P_, T * [0], e, n) / kept_rows(T, P, T * [0], e)
    assert ratio == pytest.approx(1 / n + 2 / T, rel=1e-2)


def test_time_of_one_collective():
    quick = Machine(hop_inside=0.0, hop_between=0.0)
    # alone in a node: the bandwidth of the links there
    assert seconds(("all_reduce", 8), 8, quick) == pytest.approx(2 * 8 * 7 / 8 / 450e9)
    # nodes of one GPU: that of its card
    single = Machine(node=1, hop_inside=0.0, hop_between=0.0)
    assert seconds(("reduce_scatter_tensor", 8), 4, single) == pytest.approx(8 * 3 / 4 / 50e9)
    # an all-reduce is the other two, one after the other
    for n in (2, 8, 16, 1024):
        both = [("reduce_scatter_tensor", 1024 * n), ("all_gather_into_tensor", 1024)]
        assert seconds(("all_reduce", 1024 * n), n, quick) == pytest.approx(total(both, n, quick))


@pytest.mark.parametrize("perturbed", [False, True])
def test_what_is_left_behind_passes(rng, perturbed):
    """Against a clock on which passes and messages are put one by one."""
    T, n, machine = int(rng.integers(1, 9)), 16, Machine()
    P, own = row(4, [1_000_000]), [row(4, [int(rng.integers(1, 10**6))]) for _ in range(T)]
    calls = rows(T, P, own, 4, perturbed=perturbed)
    for backward in (0.0, *rng.uniform(0, 2e-3, 5), 1.0):
        passed = free = 0.0
        for k, call in enumerate(calls):
            if k == T:
                passed = free  # perturbed passes begin when all rows have come
            passed += backward
            free = max(free, passed) + seconds(call, n, machine)
        work = len(calls) * backward
        assert left(calls, T, n, machine, backward) == pytest.approx(free - work, abs=1e-9)
    assert left(calls, T, n, machine, 0.0) == pytest.approx(total(calls, n, machine))
