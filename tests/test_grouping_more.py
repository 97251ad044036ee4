"""select_groups: bad input and the heuristic; evaluate_groups and the baselines."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from oracles_grouping import Brute, candidates_of, score

from flatmtl.grouping import (
    cluster_groups,
    compare_groupings,
    evaluate_groups,
    hoa_matrix,
    random_groups,
    select_groups,
)

A, B, C = "abc"
EYE = np.eye(4)


def with_entry(value, at):
    matrix = np.arange(16.0).reshape(4, 4)
    matrix[at] = value
    return matrix


BAD = [
    ("square matrix", lambda: select_groups(np.ones((3, 4)), 2)),
    ("square matrix", lambda: select_groups(np.ones(3), 2)),
    ("square matrix", lambda: select_groups(np.ones((0, 0)), 2)),
    (r"nan at \[1, 2\] \(recipient 'b', source 'c'\).*measure", lambda: select_groups(
        with_entry(np.nan, (1, 2)), 2, tasks=list("abcd"))),
    (r"inf at \[3, 0\]", lambda: select_groups(with_entry(np.inf, (3, 0)), 2)),
    (r"nan at \[2, 2\]", lambda: select_groups(with_entry(np.nan, (2, 2)), 2, allow_single=True)),
    (r"nan at \[2, 2\]", lambda: select_groups(with_entry(np.nan, (2, 2)), 2, objective="hoa")),
    ("sum is finite", lambda: select_groups(np.full((4, 4), 1e308), 2)),
    ("max_groups must be an integer of at least 1, got 0", lambda: select_groups(EYE, 0)),
    ("max_groups must be an integer of at least 1, got 1.5", lambda: select_groups(EYE, 1.5)),
    ("None needs a budget", lambda: select_groups(EYE)),
    ("near_ties must be an integer of at least 0, got -1", lambda: select_groups(EYE, 2, near_ties=-1)),
    ("objective must be one of", lambda: select_groups(EYE, 2, objective="best")),
    ("must must name tasks out of 0, 1, 2, 3; got 7", lambda: select_groups(EYE, 2, must=[(0, 7)])),
    ("must_not must name tasks.*'x'", lambda: select_groups(
        EYE, 2, tasks=list("abcd"), must_not=[("a", "x")])),
    ("costs must name tasks", lambda: select_groups(EYE, 2, costs={(0, 9): 1.0}, budget=2)),
    ("must must hold groups", lambda: select_groups(EYE, 2, tasks=list("abcd"), must=["ab"])),
    ("must must be a sequence", lambda: select_groups(EYE, 2, tasks=list("abcd"), must="ab")),
    ("name a task once", lambda: select_groups(EYE, 2, must=[(1, 1)])),
    ("tasks must have different names, got 'a' twice", lambda: select_groups(EYE, 2, tasks=list("abca"))),
    ("tasks must name the 4 tasks of the matrix, got 3", lambda: select_groups(EYE, 2, tasks=list("abc"))),
    ("tasks must be named by strings or integers", lambda: select_groups(EYE, 2, tasks=[1.5, 2, 3, 4])),
    ("contradict each other: 0 and 2", lambda: select_groups(
        EYE, 2, must=[(0, 1), (1, 2)], must_not=[(2, 0)])),
    ("at least 2 tasks, got 1", lambda: select_groups([[1.0]], 1)),
    ("budget must be finite and not negative", lambda: select_groups(EYE, 2, budget=-1)),
    ("budget must be finite and not negative", lambda: select_groups(EYE, 2, budget=np.nan)),
    ("a budget of 0.5 covers all tasks", lambda: select_groups(EYE, 2, budget=0.5)),
    (r"1 group\(s\) and a budget", lambda: select_groups(EYE, 1, budget=5, must_not=[(0, 1)])),
    (r"no selection within 1 group\(s\).*raise max_groups", lambda: select_groups(
        EYE, 1, must_not=[(0, 1)])),
    ("no group that may hold 0", lambda: select_groups(EYE, 4, must_not=[(0, 1), (0, 2), (0, 3)])),
    ("costs must have an entry for each group size", lambda: select_groups(EYE, 2, costs=[1.0], budget=2)),
    ("costs must be finite and not negative", lambda: select_groups(EYE, 2, costs=[1, 1, -1, 1], budget=2)),
    ("multiples of a common step", lambda: select_groups(EYE, 2, costs=[1, 1, 2**0.5, 1], budget=2)),
    ("a function for at most", lambda: select_groups(np.eye(18), 2, costs=lambda group: 1.0, budget=2)),
    ("too many tasks, 30.*heuristic=True.*cluster", lambda: select_groups(np.eye(30), 4)),
    ("too many tasks, 25: with these arguments.*steps", lambda: select_groups(np.eye(25), 8)),
    ("too many tasks, 16: ", lambda: select_groups(
        np.eye(16), 4, costs=[1 + i / 1000 for i in range(16)], budget=4)),
    ("a mapping needs objective='table'", lambda: select_groups({(0, 1): {0: 1.0, 1: 1.0}}, 1)),
    ("affinity must map groups", lambda: select_groups(EYE, 2, objective="table")),
    ("got the entry", lambda: select_groups([((0, 1), {0: 1.0, 1: 1.0})], 2, objective="table")),
    ("got an empty one", lambda: select_groups({}, 2, objective="table")),
    ("a score for each task", lambda: select_groups({(A, B): {A: 1.0}}, 2, objective="table")),
    ("got nan for task 'b'", lambda: select_groups({(A, B): {A: 1.0, B: np.nan}}, 2, objective="table")),
    ("no group left that holds 'c'", lambda: select_groups(
        {(A, B): {A: 1.0, B: 1.0}}, 2, objective="table", tasks=[A, B, C])),
    ("costs must be None where the table", lambda: select_groups(
        [((A, B), {A: 1.0, B: 1.0}, 1.0)], 2, objective="table", costs=[1, 1])),
    ("heuristic must be False with a budget", lambda: select_groups(EYE, 2, heuristic=True, budget=2)),
    ("heuristic must be False with costs", lambda: select_groups(EYE, 2, heuristic=True, costs=[1] * 4)),
    ("heuristic must be False with near_ties", lambda: select_groups(
        EYE, 2, heuristic=True, near_ties=1)),
    ("heuristic must be False with objective='table'", lambda: select_groups(
        {(A, B): {A: 1.0, B: 1.0}}, 2, objective="table", heuristic=True)),
    ("heuristic=True found no selection", lambda: select_groups(
        EYE, 1, heuristic=True, must_not=[(0, 1)])),
    ("groups must cover all tasks, got none with 3", lambda: evaluate_groups([(0, 1, 2)], EYE)),
    ("at least 2 tasks unless allow_single", lambda: evaluate_groups([(0, 1, 2), (3,)], EYE)),
    ("groups must stand in the table", lambda: evaluate_groups(
        [(A, B), (A, B)], {(A, B): {A: 1.0, B: 1.0}}, objective="table")),
    ("single must be finite", lambda: hoa_matrix({A: np.nan}, {})),
    (r"none for \('a', 'b'\)", lambda: hoa_matrix({A: 1.0, B: 1.0}, {})),
    ("a result for each of the two", lambda: hoa_matrix({A: 1.0, B: 1.0}, {(A, B): {A: 1.0}})),
    ("pairs of two tasks", lambda: hoa_matrix({A: 1.0, B: 1.0}, {(A,): {A: 1.0}})),
    ("twice", lambda: hoa_matrix(
        {A: 1.0, B: 1.0}, {(A, B): {A: 1.0, B: 1.0}, (B, A): {A: 1.0, B: 1.0}})),
    ("max_groups must be at least 1", lambda: random_groups([A, B], 0, seed=0)),
    ("tasks must be at least 2", lambda: random_groups([A], 1, seed=0)),
    ("method must be", lambda: cluster_groups(EYE, 2, method="x")),
    ("max_groups must be at least 1", lambda: cluster_groups(EYE, 0)),
    ("methods must be out of", lambda: compare_groupings(EYE, 2, methods=["best"])),
    ("leave out 'cosine'", lambda: compare_groupings(EYE, 2, methods=["cosine"])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD, ids=range(len(BAD)))
def test_bad_input_says_what(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "options", [{}, {"partition": True}, {"allow_single": True}, {"minimise": True}]
)
def test_the_heuristic_is_close_and_bounded(rng, options):
    """Never better than the optimum, mostly equal to it, and below its bound."""
    hits = 0
    sign = -1 if options.get("minimise") else 1
    for _ in range(12):
        n, k = int(rng.integers(3, 10)), int(rng.integers(1, 5))
        matrix = rng.normal(size=(n, n))
        best = select_groups(matrix, k, **options)
        found = select_groups(matrix, k, heuristic=True, **options)
        assert not found.exact
        assert sign * (found.objective - best.objective) <= 1e-9
        assert sign * (found.bound - best.objective) >= -1e-9
        assert len(found.by_count) == k
        for mine, optimal in zip(found.by_count, best.by_count):
            assert sign * (mine - optimal) <= 1e-9
        assert found.by_count[-1] == found.objective
        assert found.fewest == len(found.groups) <= k
        again = evaluate_groups(
            found.groups,
            matrix,
            allow_single=options.get("allow_single", False),
            minimise=options.get("minimise", False),
        )
        assert again.objective == pytest.approx(found.objective)
        hits += found.objective == pytest.approx(best.objective)
    assert hits >= 9


@pytest.mark.parametrize("partition", [False, True])
def test_the_heuristic_keeps_the_rules(rng, partition):
    n, k = 40, 6
    matrix = rng.normal(size=(n, n))
    order = rng.permutation(n).tolist()
    must, must_not = [order[:3], order[2:5]], [order[5:8], order[7:9]]
    found = select_groups(
        matrix, k, must=must, must_not=must_not, partition=partition, heuristic=True
    )
    groups = [set(group) for group in found.groups]
    assert len(groups) <= k
    assert set().union(*groups) == set(range(n))
    assert min(map(len, groups)) >= 2
    for group in groups:
        assert len(group & set(order[:5])) in (0, 5)
        assert all(len(group & set(apart)) <= 1 for apart in must_not)
    if partition:
        assert sum(map(len, groups)) == n
    free = select_groups(matrix, k, partition=partition, heuristic=True)
    assert free == select_groups(matrix, k, partition=partition, heuristic=True)  # seeds are fixed
    drawn = [evaluate_groups(random_groups(range(n), k, seed=rng), matrix) for _ in range(20)]
    assert free.objective > max(draw.objective for draw in drawn)
    assert free.objective <= free.bound


def test_the_heuristic_takes_hundreds_of_tasks(rng):
    seen = []
    matrix = rng.normal(size=(150, 150))
    found = select_groups(matrix, 5, heuristic=True, progress=seen.append)
    assert found.objective <= found.bound <= matrix.max(axis=1).mean() + 1e-12
    assert len(found.by_count) == 5
    assert found.by_count == sorted(found.by_count)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_the_heuristic_finds_planted_groups(rng):
    n, k = 60, 4
    label = rng.permutation(np.arange(n) % k)
    matrix = (label[:, None] == label[None, :]) + 0.05 * rng.normal(size=(n, n))
    found = select_groups(matrix, k, partition=True, heuristic=True)
    planted = {frozenset(np.flatnonzero(label == g).tolist()) for g in range(k)}
    assert set(map(frozenset, found.groups)) == planted


def test_evaluate_follows_the_formula(rng):
    for _ in range(10):
        n = int(rng.integers(2, 8))
        matrix = rng.normal(size=(n, n))
        minimise = bool(rng.integers(2))
        groups = random_groups(range(n), 3, seed=rng, allow_single=True)
        found = evaluate_groups(groups, matrix, objective="hoa", minimise=minimise)
        pick = min if minimise else max
        best = [pick(score(matrix, t, g) for g in groups if t in g) for t in range(n)]
        assert list(found.scores.values()) == pytest.approx(best)
        assert found.objective == pytest.approx(np.mean(best))
        for t, g in found.served_by.items():
            assert score(matrix, t, found.groups[g]) == pytest.approx(best[t])
        assert set(found.groups) <= set(groups)
        assert set(found.served_by.values()) == set(range(len(found.groups)))
        assert not found.exact
        assert (found.bound <= found.objective) if minimise else (found.bound >= found.objective)


def test_evaluate_takes_a_tables_copies_in_turn():
    table = [((A, B), {A: 1.0, B: 5.0}, 1.0), ((A, B), {A: 4.0, B: 2.0}, 0.5)]
    one = evaluate_groups([(A, B)], table, objective="table")
    assert (one.objective, one.cost) == (3.0, 1.0)
    both = evaluate_groups([(A, B), (B, A)], table, objective="table")
    assert (both.objective, both.cost) == (4.5, 1.5)
    assert both.served_by == {A: 1, B: 0}


def test_hoa_from_pair_results(rng):
    names = list("abcde")
    single = {name: float(rng.normal()) for name in names}
    pairs = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            key = (a, b) if rng.integers(2) else (b, a)
            pairs[key] = {a: float(rng.normal()), b: float(rng.normal())}
    matrix, tasks = hoa_matrix(single, pairs)
    assert tasks == names
    for i, a in enumerate(names):
        assert matrix[i, i] == single[a]
        for j, b in enumerate(names):
            if a != b:
                assert matrix[i, j] == pairs.get((a, b), pairs.get((b, a)))[a]
    found = select_groups(matrix, 3, objective="hoa", minimise=True)
    brute = Brute(5, candidates_of(matrix, True), 3, sign=-1)
    assert found.objective == pytest.approx(-brute.best[-1] / 5)


@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_random_groups(rng, partition, single):
    tasks = list("abcdefg")
    for k in (1, 2, 3, 5):
        groups = random_groups(tasks, k, seed=rng, partition=partition, allow_single=single)
        assert 1 <= len(groups) <= k
        assert set().union(*groups) == set(tasks)
        assert min(map(len, groups)) >= (1 if single else 2)
        assert len(set(groups)) == len(groups)
        if partition:
            assert sum(map(len, groups)) == len(tasks)
            assert len(groups) == min(k, 7 if single else 3)
    seed = int(rng.integers(1000))
    draws = [random_groups(tasks, 3, seed=s, partition=partition) for s in (seed, seed)]
    assert draws[0] == draws[1]
    many = {tuple(random_groups(tasks, 3, seed=rng, partition=partition)) for _ in range(20)}
    assert len(many) > 5


@pytest.mark.parametrize("method", ["spectral", "agglomerative"])
def test_clusters(rng, method):
    pytest.importorskip("sklearn")
    n, k = 24, 3
    label = rng.permutation(np.arange(n) % k)
    matrix = (label[:, None] == label[None, :]) + 0.1 * rng.random((n, n))
    names = [f"t{i}" for i in range(n)]
    groups = cluster_groups(matrix, k, method=method, tasks=names)
    planted = {frozenset(names[i] for i in np.flatnonzero(label == g)) for g in range(k)}
    assert set(map(frozenset, groups)) == planted


def test_a_cluster_of_one_joins_its_nearest(rng):
    pytest.importorskip("sklearn")
    matrix = np.full((5, 5), 0.0)
    matrix[:2, :2] = matrix[2:4, 2:4] = 1.0
    matrix[4, 2:4] = 0.1  # alone, and nearest to 2 and 3
    apart = cluster_groups(matrix, 3, method="agglomerative", allow_single=True)
    assert apart == [(0, 1), (2, 3), (4,)]
    assert cluster_groups(matrix, 3, method="agglomerative") == [(0, 1), (2, 3, 4)]
    assert cluster_groups(matrix, 1) == [(0, 1, 2, 3, 4)]


def test_clusters_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install flatmtl\[clustering\]"):
        cluster_groups(np.eye(5), 2)


class Record:
    def __init__(self, rng, n) -> None:
        self.tasks = [f"t{i}" for i in range(n)]
        self._matrices = {"affinity": rng.normal(size=(n, n)), "cosine": rng.normal(size=(n, n))}

    def matrix(self, quantity="affinity"):
        return self._matrices[quantity]


def test_comparison(rng):
    pytest.importorskip("sklearn")
    record = Record(rng, 6)
    truth = rng.normal(size=(6, 6))
    result = compare_groupings(record, 2, truth=truth, groups={"all": [record.tasks]}, draws=50)
    rows = {row.method: row for row in result.rows}
    assert list(rows) == ["tag", "cosine", "clustering", "random", "all"]
    judge = {"tasks": record.tasks}
    for name, quantity in (("tag", "affinity"), ("cosine", "cosine")):
        chosen = select_groups(record.matrix(quantity), 2, **judge)
        assert rows[name].objective == pytest.approx(
            evaluate_groups(chosen.groups, truth, **judge).objective
        )
    off = truth.sum() - np.trace(truth)
    assert rows["all"].objective == pytest.approx(off / 30)
    assert result.best == select_groups(truth, 2).objective
    assert all(row.objective <= result.best + 1e-12 for row in result.rows)
    assert rows["random"].deviation > 0
    assert [row.deviation for row in result.rows if row.method != "random"] == [None] * 4
    text = str(result)
    assert all(name in text for name in rows)
    assert "best possible" in text
    own = compare_groupings(record, 2, methods=["tag"])
    assert own.rows[0].objective == own.best
