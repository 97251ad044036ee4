"""select_groups, exact: against every set of groups, published answers, rules, budgets, near-ties."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from oracles_grouping import Brute, best_by_recursion, candidates_of, score, subsets

import flatmtl
from flatmtl.grouping import evaluate_groups, select_groups

PUBLISHED = json.loads((Path(__file__).parent / "data" / "affinity_tables.json").read_text())
SIZES = [(2, 3), (3, 3), (4, 3), (5, 3), (5, 4), (6, 2), (6, 3), (7, 2)]  # tasks, groups


def check(found, n, candidates, k, *, budget=None, partition=False, sign=1, near=0, padded=None):
    """Compares a Grouping over tasks 0..n-1 with every set of candidates; False: none is feasible."""
    brute = Brute(n, candidates, k, budget=budget, partition=partition, sign=sign)
    best = brute.best[-1]
    expected = [None if b is None else sign * b / n for b in brute.best]
    assert filled(found.by_count[:k]) == pytest.approx(filled(expected), rel=1e-9, abs=1e-9)
    assert found.objective == pytest.approx(sign * best / n, rel=1e-9, abs=1e-9)
    assert found.exact
    assert found.bound == found.objective
    close = [b is not None and b >= best - 1e-10 for b in brute.best]
    assert found.fewest == len(found.groups) == close.index(True) + 1
    consistent(found, candidates, n, sign)
    if budget is not None:
        assert found.cost <= budget + 1e-9
    if partition:
        assert sum(map(len, found.groups)) == n
    near_ties(found, brute, candidates, near, sign, n)


def filled(values):
    return [np.nan_to_num(-np.inf) if value is None else value for value in values]


def consistent(found, candidates, n, sign):
    """Groups are candidates, each serves a task, and each task is served where its score is best."""
    listed = [frozenset(group) for group, _, _ in candidates]
    groups = [frozenset(group) for group in found.groups]
    assert all(group in listed for group in groups)
    assert set(found.served_by) == set(range(n))
    assert set(found.served_by.values()) == set(range(len(groups)))
    assert found.objective == pytest.approx(np.mean(list(found.scores.values())))
    assert found.cost == pytest.approx(sum(found.group_costs))
    if len(set(listed)) < len(listed):
        return  # the same group at several prices: which one was taken is seen in the value
    table = dict(zip(listed, (scores for _, scores, _ in candidates)))
    prices = dict(zip(listed, (cost for _, _, cost in candidates)))
    assert len(set(groups)) == len(groups)
    assert found.group_costs == pytest.approx([prices[group] for group in groups])
    for t in range(n):
        assert t in groups[found.served_by[t]]
        mine = [sign * table[group][t] for group in groups if t in group]
        assert sign * found.scores[t] == pytest.approx(max(mine))
        assert sign * table[groups[found.served_by[t]]][t] == pytest.approx(max(mine))


def near_ties(found, brute, candidates, near, sign, n):
    chosen = sorted(sorted(group) for group in found.groups)
    named = [sorted(sorted(candidates[c][0]) for c in ids) for _, ids in brute.selections]
    first = next(
        i
        for i, (value, _) in enumerate(brute.selections)
        if named[i] == chosen and value == pytest.approx(sign * found.objective * n)
    )
    others = [value for i, (value, _) in enumerate(brute.selections) if i != first][:near]
    values = [sign * tie.objective * n for tie in found.near_ties]
    assert values == pytest.approx(others, rel=1e-9, abs=1e-9)
    for tie in found.near_ties:
        margin = sign * (found.objective - tie.objective)
        assert tie.margin == pytest.approx(margin, abs=1e-12)
        assert tie.margin >= 0
        groups = sorted(sorted(group) for group in tie.groups)
        assert any(
            groups == named[i] and brute.selections[i][0] == pytest.approx(sign * tie.objective * n)
            for i in range(len(named))
        )
    if len({tuple(map(tuple, x)) for x in named}) == len(named):
        shown = [tuple(sorted(tuple(sorted(g)) for g in tie.groups)) for tie in found.near_ties]
        assert len(set(shown)) == len(shown)
        assert tuple(tuple(g) for g in chosen) not in shown


def select_or_none(*args, **options):
    try:
        return select_groups(*args, **options)
    except ValueError as error:
        assert "no selection within" in str(error)
        return None


def check_or_infeasible(found, n, candidates, k, **options):
    if found is None:
        limits = {x: options[x] for x in ("budget", "partition", "sign") if x in options}
        assert Brute(n, candidates, k, **limits).best[-1] is None
    else:
        check(found, n, candidates, k, **options)


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("objective", ["tag", "hoa", "alone"])
def test_equals_every_selection(rng, n, k, partition, objective):
    matrix = rng.normal(size=(n, n))
    minimise = bool(rng.integers(2))
    near = int(rng.integers(0, 6))
    single = objective != "tag"
    found = select_or_none(
        matrix,
        k,
        objective="hoa" if objective == "hoa" else "tag",
        allow_single=objective == "alone",
        partition=partition,
        minimise=minimise,
        near_ties=near,
    )
    check_or_infeasible(
        found,
        n,
        candidates_of(matrix, single),
        k,
        partition=partition,
        sign=-1 if minimise else 1,
        near=near,
    )


@pytest.mark.parametrize(("n", "k"), SIZES[1:])
@pytest.mark.parametrize("costs", ["none", "size", "mapping", "function"])
@pytest.mark.parametrize("rules", [False, True])
def test_all_options_at_once(rng, n, k, costs, rules):
    """Rules, costs, a budget, partition, singles and errors in random combinations."""
    for _ in range(3):
        matrix = rng.normal(size=(n, n))
        if rng.integers(2):
            matrix = np.round(matrix)  # many ties
        single, partition, minimise = (bool(x) for x in rng.integers(0, 2, 3))
        near = int(rng.integers(0, 5))
        must, must_not = [], []
        if rules:
            order = rng.permutation(n).tolist()
            must = [order[:2]] if rng.integers(2) else []
            must_not = [order[1:3]] if n > 2 and rng.integers(2) else []
        halves = {group: float(rng.integers(0, 5)) / 2 for group in subsets(n)}
        by_size = [float(x) / 4 for x in rng.integers(1, 9, n)]
        special = dict(list(halves.items())[:: int(rng.integers(1, 4))])
        given, price = {
            "none": (None, lambda group: 1.0),
            "size": (by_size, lambda group: by_size[len(group) - 1]),
            "mapping": (special, lambda group: special.get(group, 1.0)),
            "function": (lambda group: halves[frozenset(group)], halves.__getitem__),
        }[costs]
        budget = None if costs == "none" and rng.integers(2) else float(rng.integers(1, 13)) / 4
        candidates = candidates_of(matrix, single, must, must_not, price)
        found = select_or_none(
            matrix,
            k,
            costs=given,
            budget=budget,
            must=must,
            must_not=must_not,
            partition=partition,
            allow_single=single,
            minimise=minimise,
            near_ties=near,
        )
        options = {"budget": budget, "partition": partition, "sign": -1 if minimise else 1}
        check_or_infeasible(found, n, candidates, k, near=near, **options)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("priced", [False, True])
def test_table(rng, n, partition, priced):
    """A table with gaps; priced: groups come again at half the cost with other scores."""
    for _ in range(3):
        groups = [group for group in subsets(n) if rng.random() < 0.6] or [frozenset(range(n))]
        names = [f"t{i}" for i in range(n)]
        listed = [(group, {t: float(rng.normal()) for t in group}, 1.0) for group in groups]
        if priced:
            again = rng.choice(len(listed), size=min(4, len(listed)), replace=False)
            listed += [
                (listed[i][0], {t: float(rng.normal()) for t in listed[i][0]}, 0.5) for i in again
            ]
        k = 3 if len(listed) < 45 else 2
        minimise, near = bool(rng.integers(2)), int(rng.integers(0, 4))
        budget = float(rng.integers(1, 7)) / 2 if priced else None
        named = [
            (tuple(names[t] for t in g), {names[t]: s for t, s in x.items()}, c)
            for g, x, c in listed
        ]
        table = named if priced else {group: scores for group, scores, _ in named}
        options = {"partition": partition, "minimise": minimise, "near_ties": near}
        found = select_or_none(table, k, objective="table", tasks=names, budget=budget, **options)
        if found is not None:
            found = unnamed(found, names)
        check_or_infeasible(
            found,
            n,
            listed,
            k,
            budget=budget,
            partition=partition,
            sign=-1 if minimise else 1,
            near=near,
        )


def unnamed(found, names):
    """The same result with indices in place of names."""
    from dataclasses import replace

    at = {name: i for i, name in enumerate(names)}
    assert found.tasks == names
    return replace(
        found,
        groups=[tuple(at[t] for t in group) for group in found.groups],
        served_by={at[t]: g for t, g in found.served_by.items()},
        scores={at[t]: s for t, s in found.scores.items()},
        near_ties=[
            replace(tie, groups=[tuple(at[t] for t in group) for group in tie.groups])
            for tie in found.near_ties
        ],
    )


@pytest.mark.parametrize("partition", [False, True])
def test_budget_without_a_number_of_groups(rng, partition):
    n = 4
    matrix = rng.normal(size=(n, n))
    costs = [0.5, 1.0, 1.0, 1.5]
    candidates = candidates_of(matrix, True, cost=lambda group: costs[len(group) - 1])
    found = select_groups(
        matrix, costs=costs, budget=2.5, allow_single=True, partition=partition, near_ties=3
    )
    assert len(found.by_count) == n
    check(found, n, candidates, n, budget=2.5, partition=partition, near=3)


def test_more_groups_than_tasks(rng):
    matrix = rng.normal(size=(4, 4))
    found = select_groups(matrix, 9, near_ties=2)
    assert len(found.by_count) == 9
    assert found.by_count[4:] == found.by_count[3:4] * 5
    check(found, 4, candidates_of(matrix, False), 4, near=2)


@pytest.mark.parametrize("rules", [False, True])
def test_many_groups_of_more_tasks(rng, rules):
    """All layers of the programme, over more than one of its blocks."""
    n, k = 7, 7
    matrix = rng.normal(size=(n, n))
    must_not = [rng.permutation(n)[:2].tolist()] if rules else []
    candidates = candidates_of(matrix, False, must_not=must_not)
    found = select_groups(matrix, k, must_not=must_not)
    expected = [best_by_recursion(n, candidates, j) / n for j in range(1, k + 1)]
    mine = [-np.inf if value is None else value for value in found.by_count]
    assert mine == pytest.approx(expected)
    again = select_groups(matrix, k, must_not=must_not, near_ties=3)
    assert again.by_count == found.by_count
    assert again.objective == pytest.approx(expected[-1])


def test_five_groups_and_near_ties(rng):
    matrix = rng.normal(size=(5, 5))
    check(select_groups(matrix, 5, near_ties=4), 5, candidates_of(matrix, False), 5, near=4)


@pytest.mark.parametrize("name", ["taskonomy_tag", "taskonomy_cs"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_published_answers(name, k):
    given, answer = PUBLISHED["matrices"][name], PUBLISHED["selection"][name][str(k)]
    found = select_groups(given["matrix"], k, tasks=given["tasks"], near_ties=1)
    assert found.objective == pytest.approx(answer["objective"], rel=1e-13)
    assert set(map(frozenset, found.groups)) == set(map(frozenset, answer["groups"]))
    assert found.scores == pytest.approx(answer["per_task"], rel=1e-13)
    assert found.fewest == len(answer["groups"])
    if "runner_up" in answer:
        (tie,) = found.near_ties
        assert tie.objective == pytest.approx(answer["runner_up"]["objective"], rel=1e-13)
        assert set(map(frozenset, tie.groups)) == set(map(frozenset, answer["runner_up"]["groups"]))


def test_the_transposed_matrix_is_another_answer():
    matrix = np.array(PUBLISHED["matrices"]["taskonomy_tag"]["matrix"])
    for k, value in PUBLISHED["transposed_trap"]["taskonomy_tag"].items():
        assert select_groups(matrix.T, int(k)).objective == pytest.approx(value, abs=5e-9)
    assert select_groups(matrix, 3).objective == pytest.approx(0.348670398, abs=5e-10)


@pytest.mark.parametrize("value", [1.0, 0.0, -0.1, 1e-300])
@pytest.mark.parametrize("partition", [False, True])
def test_equal_groups_fewest_are_taken(value, partition):
    """Where all entries are equal one group does, and more are as good."""
    found = select_groups(np.full((6, 6), value), 3, near_ties=4, partition=partition)
    assert found.groups == [(0, 1, 2, 3, 4, 5)]
    assert found.fewest == 1
    margins = [tie.margin for tie in found.near_ties]
    assert margins == pytest.approx([0] * 4, abs=1e-15)
    assert all(len(tie.groups) > 1 for tie in found.near_ties)


def test_a_helper_that_changes_nothing_is_left_out():
    matrix = np.array([[0, 2.0, 2.0, 0], [2.0, 0, 2.0, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]])
    found = select_groups(matrix, 2)
    assert sorted(found.groups) == [(0, 1), (2, 3)]


def test_few_selections_give_fewer_near_ties(rng):
    assert select_groups(rng.normal(size=(2, 2)), 2, near_ties=5).near_ties == []
    assert select_groups(rng.normal(size=(12, 12)), 1, near_ties=5).near_ties == []


def test_a_nan_diagonal_is_not_used(rng):
    matrix = rng.normal(size=(5, 5))
    expected = select_groups(matrix, 2)
    np.fill_diagonal(matrix, np.nan)
    assert select_groups(matrix, 2) == expected


def test_one_task(rng):
    value = float(rng.normal())
    for options in ({"allow_single": True}, {"objective": "hoa"}):
        found = select_groups([[value]], 1, **options)
        assert found.groups == [(0,)]
        assert found.objective == value


def test_names_and_indices(rng):
    matrix = rng.normal(size=(4, 4))
    names = ["a", "b", "c", "d"]
    by_name = select_groups(matrix, 2, tasks=names, must=[("a", "c")], must_not=[("b", "d")])
    assert by_name == select_groups(matrix, 2, tasks=names, must=[(0, 2)], must_not=[(1, 3)])
    assert by_name.tasks == names
    again = select_groups(matrix, 2, tasks=[10, 20, 30, 40], must=[(10, 30)], must_not=[(20, 40)])
    assert again.objective == by_name.objective
    with pytest.raises(ValueError, match="must must name tasks"):
        select_groups(matrix, 2, tasks=[10, 20, 30, 40], must=[(0, 2)])  # integers are names there


class Record:
    def __init__(self, matrix, tasks) -> None:
        self.tasks = tasks
        self._matrix = matrix

    def matrix(self, quantity="affinity"):
        assert quantity == "affinity"
        return self._matrix


def test_a_record(rng):
    matrix = rng.normal(size=(5, 5))
    names = list("abcde")
    record = Record(matrix, names)
    assert select_groups(record, 3) == select_groups(matrix, 3, tasks=names)
    with pytest.raises(ValueError, match="tasks must be None with a record"):
        select_groups(record, 3, tasks=names)


def test_text(rng):
    matrix = rng.normal(size=(5, 5))
    found = select_groups(matrix, 3, tasks=list("abcde"), near_ties=2, must_not=[("a", "b")])
    text = str(found)
    assert text.startswith(f"{len(found.groups)} group(s), objective {found.objective:.6g} (exact)")
    assert "1: infeasible" in text
    assert text.count("near-tie") == 2
    for task, value in found.scores.items():
        assert f"{task} {value:.6g}" in text


def test_evaluation_of_the_optimum_is_the_optimum(rng):
    matrix = rng.normal(size=(7, 7))
    found = select_groups(matrix, 3)
    again = evaluate_groups(found.groups, matrix)
    assert again.objective == found.objective
    assert again.scores == found.scores
    assert again.served_by == found.served_by


@pytest.mark.parametrize("n", [10, 12])
def test_near_ties_of_larger_problems_are_a_sorted_list_of_neighbours(rng, n):
    """Brute force is out of reach; no set with one group changed may be missing from the list."""
    matrix = rng.normal(size=(n, n))
    found = select_groups(matrix, 3, near_ties=6)
    values = [tie.objective for tie in found.near_ties]
    assert values == sorted(values, reverse=True)
    assert len({frozenset(map(frozenset, tie.groups)) for tie in found.near_ties}) == 6
    listed = {frozenset(map(frozenset, tie.groups)) for tie in found.near_ties}
    listed.add(frozenset(map(frozenset, found.groups)))
    for group in found.groups:
        rest = [set(g) for g in found.groups if g != group]
        for t in range(n):
            changed = [*rest, set(group) ^ {t}]
            if len(changed[-1]) < 2 or set().union(*changed) != set(range(n)):
                continue
            selection = frozenset(map(frozenset, changed))
            owners = [
                max((score(matrix, u, g), i) for i, g in enumerate(changed) if u in g)
                for u in range(n)
            ]
            if len({i for _, i in owners}) == len(selection) == 3 and selection not in listed:
                assert np.mean([s for s, _ in owners]) <= values[-1] + 1e-12


@pytest.mark.parametrize("near", [0, 2])
def test_progress(rng, near):
    seen = []
    select_groups(rng.normal(size=(18, 18)), 8, near_ties=near, progress=seen.append)
    assert seen[-1] == 1.0
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert all(0 <= x <= 1 for x in seen)


def test_an_error_in_progress_ends_it(rng):
    def fail(fraction):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        select_groups(rng.normal(size=(20, 20)), 4, progress=fail)


def test_others_run_meanwhile(rng):
    """The GIL is free: another thread counts on."""
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    time.sleep(0.01)
    before, start = counted[0], time.perf_counter()
    select_groups(rng.normal(size=(18, 18)), 6)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    assert counted[0] - before > seconds * 20


@pytest.mark.parametrize("options", ["", ", heuristic=True"])
def test_ctrl_c(options):
    n = 22 if not options else 900
    code = (
        "import numpy as np, flatmtl, signal, sys\n"
        # a shell's background jobs inherit that it is ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"a = np.random.default_rng(0).normal(size=({n}, {n}))\n"
        "print('ready', flush=True)\n"
        "try:\n"
        f"    flatmtl.select_groups(a, 8{options}, progress=lambda f: print('at', f, flush=True))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(flatmtl.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline().startswith("at")  # it runs
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        rest, _ = process.communicate(timeout=60)
        assert rest.endswith("interrupted\n")
        assert time.perf_counter() - start < 10  # all of it takes longer; a busy machine is slow
    finally:
        process.kill()
