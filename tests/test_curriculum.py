"""Orders of tasks and of samples: against all permutations, formulas in numpy, bad inputs."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree

import flatmtl
from flatmtl import AffinityRecord, ops
from flatmtl.__main__ import main
from flatmtl.curriculum import (
    difficulty_margin,
    from_affinity,
    from_embeddings,
    from_gram,
    order_instances,
    order_tasks,
)


def random(rng, n):
    a = rng.normal(size=(n, n))
    return a + a.T


def cosines(rng, n):
    x = rng.normal(size=(n, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def distances(rng, n):
    x = rng.uniform(size=(n, 2))
    return -np.linalg.norm(x[:, None] - x, axis=-1)


KINDS = [random, cosines, distances]


def total(matrix, path):
    return sum(matrix[a, b] for a, b in itertools.pairwise(path))


def brute(matrix, start=None):
    """The largest sum over all permutations."""
    n = len(matrix)
    paths = np.array(list(itertools.permutations(range(n))))  # [n!, n]
    if start is not None:
        paths = paths[paths[:, 0] == start]
    sums = np.zeros(len(paths))
    for k in range(1, n):
        sums += matrix[paths[:, k - 1], paths[:, k]]
    return sums.max()


def greedy(matrix, start=None):
    """The best nearest-neighbour path over the starts."""
    sums = []
    for first in range(len(matrix)) if start is None else [start]:
        path, left = [first], set(range(len(matrix))) - {first}
        while left:
            path.append(max(left, key=lambda t: matrix[path[-1], t]))
            left.remove(path[-1])
        sums.append(total(matrix, path))
    return max(sums)


def consistent(found, matrix, tasks=None):
    n = len(matrix)
    assert sorted(found.indices) == list(range(n))
    assert found.order == [(tasks or range(n))[t] for t in found.indices]
    steps = [matrix[a, b] for a, b in itertools.pairwise(found.indices)]
    assert found.steps == pytest.approx(steps, rel=1e-12, abs=0)
    size = np.abs(matrix).max() * n
    assert found.similarity == pytest.approx(sum(steps), rel=0, abs=1e-13 * size)
    assert found.nearest_neighbour <= found.similarity <= found.bound
    assert found.exact == (found.similarity == found.bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", range(1, 9))
def test_exact_is_the_best_permutation(rng, n, kind):
    for scale in (1e-8, 1.0, 1e8):
        matrix = scale * kind(rng, n)
        found = order_tasks(matrix, exact=True)
        consistent(found, matrix)
        assert found.exact
        assert found.similarity == pytest.approx(brute(matrix), rel=1e-12, abs=1e-13 * scale)
        assert n == 1 or found.indices[0] < found.indices[-1]
        start = int(rng.integers(n))
        found = order_tasks(matrix, start=start)
        consistent(found, matrix)
        assert found.exact and found.indices[0] == start
        assert found.similarity == pytest.approx(brute(matrix, start), rel=1e-12, abs=1e-13 * scale)
        assert found.nearest_neighbour == pytest.approx(greedy(matrix, start), abs=1e-12 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_annealing_finds_the_exact_answer_of_few_tasks(rng, kind):
    for n in (2, 3, 4, 7, 10):
        for start in (None, 0):
            for scale in (1e-8, 1e8):
                matrix = scale * kind(rng, n)
                best = order_tasks(matrix, start=start, exact=True)
                found = order_tasks(matrix, start=start, exact=False, seed=n)
                consistent(found, matrix)
                assert start is None or found.indices[0] == start
                assert found.similarity == pytest.approx(
                    best.similarity, rel=1e-12, abs=1e-12 * scale
                )


@pytest.mark.parametrize("kind", KINDS)
def test_annealing_of_many_tasks(rng, kind):
    matrix = kind(rng, 40)
    for start in (None, 7):
        found = order_tasks(matrix, start=start, seed=3)
        consistent(found, matrix)
        assert not found.exact
        assert found.nearest_neighbour == pytest.approx(greedy(matrix, start), rel=1e-12)
    # no single turn or exchange helps
    path = np.array(order_tasks(matrix, seed=3).indices)
    value = total(matrix, path)
    for i, j in itertools.combinations(range(40), 2):
        turned, swapped = path.copy(), path.copy()
        turned[i : j + 1] = turned[i : j + 1][::-1]
        swapped[[i, j]] = swapped[[j, i]]
        assert total(matrix, turned) <= value + 1e-10
        assert total(matrix, swapped) <= value + 1e-10


def test_the_bound_is_the_largest_spanning_tree(rng):
    matrix = random(rng, 40)
    cost = matrix.max() + 1 - matrix  # positive
    tree = minimum_spanning_tree(cost).sum()
    assert order_tasks(matrix).bound == pytest.approx(39 * (matrix.max() + 1) - tree, rel=1e-12)


def test_a_close_exact_and_annealed_answer_at_the_limit(rng):
    """18 tasks are exact by default, 19 are not; both agree where both can be had."""
    assert order_tasks(random(rng, 18)).exact
    matrix = random(rng, 19)
    annealed, best = order_tasks(matrix), order_tasks(matrix, exact=True)
    assert not annealed.exact or annealed.similarity == best.similarity
    slack = 0.05 * (best.bound - matrix.min() * 18)
    assert best.similarity - slack <= annealed.similarity <= best.similarity + 1e-12
    assert best.similarity <= annealed.bound + 1e-12


@pytest.mark.parametrize("n", [2, 12, 40])
def test_points_on_a_line_are_sorted(rng, n):
    x = rng.permutation(np.cumsum(rng.uniform(0.1, 1, size=n)))
    found = order_tasks(-np.abs(x[:, None] - x))
    line = x[found.indices]
    assert (np.diff(line) > 0).all() or (np.diff(line) < 0).all()
    assert found.exact  # also where annealing found it: it reaches the bound


def test_the_same_seed_gives_the_same_order(rng):
    matrix = random(rng, 30)
    assert order_tasks(matrix, seed=5) == order_tasks(matrix, seed=5)
    order_tasks(matrix, seed=2**64 - 1)


def test_renamed_tasks_have_the_same_optimum(rng):
    matrix = cosines(rng, 9)
    shuffled = rng.permutation(9)
    first = order_tasks(matrix)
    second = order_tasks(matrix[np.ix_(shuffled, shuffled)])
    assert second.similarity == pytest.approx(first.similarity, rel=1e-12)
    path = shuffled[second.indices].tolist()
    assert first.indices in (path, path[::-1])


@pytest.mark.parametrize("exact", [True, False])
def test_ties(exact):
    found = order_tasks(np.full((9, 9), 2.5), exact=exact)
    assert found.similarity == found.bound == 20 and found.exact
    assert sorted(found.indices) == list(range(9))
    blocks = np.kron(np.eye(3), np.ones((4, 4)))  # three sets of equals
    found = order_tasks(blocks, exact=exact)
    assert found.similarity == 9
    assert found == order_tasks(blocks, exact=exact)


def test_one_and_two_tasks():
    one = order_tasks([[3.0]], tasks=["only"])
    assert (one.order, one.steps, one.similarity, one.exact) == (["only"], [], 0.0, True)
    assert one == order_tasks([[np.nan]], tasks=["only"], exact=False)
    two = order_tasks([[1, -0.5], [-0.5, 1]], tasks=["a", "b"])
    assert (two.order, two.steps, two.similarity) == (["a", "b"], [-0.5], -0.5)
    assert order_tasks([[1, -0.5], [-0.5, 1]], start=1).order == [1, 0]
    assert order_tasks([[1, -0.5], [-0.5, 1]], start=1, exact=False).order == [1, 0]


def test_names(rng):
    matrix = random(rng, 5)
    names = ["ss", "depth", "normals", "keys", "edges"]
    found = order_tasks(matrix, tasks=names, start="keys")
    consistent(found, matrix, names)
    assert found.order[0] == "keys"
    assert found == order_tasks(matrix, tasks=names, start=3)  # an index, where names are strings
    frame = pd.DataFrame(matrix, names, names)
    assert found == order_tasks(frame, tasks=list(frame), start="keys")
    assert found == order_tasks(torch.tensor(matrix), tasks=names, start="keys")
    assert order_tasks(matrix, tasks=[7, 3, 5, 1, 9], start=1).indices[0] == 3


def test_text(rng):
    found = order_tasks([[0, 0.25, 1], [0.25, 0, 0.5], [1, 0.5, 0]], tasks=["a", "bb", "c"])
    assert repr(found) == "TaskOrder(a > c > bb; similarity 1.5, exact)"
    assert str(found).splitlines() == [
        "order of 3 task(s), similarity 1.5 (exact; nearest neighbour 1.5)",
        "  a",
        "  c   1",
        "  bb  0.5",
    ]
    many = repr(order_tasks(random(rng, 30)))
    assert "... 18 more ..." in many and "not proven best, bound" in many


def test_float32_rounding_is_no_asymmetry(rng):
    x = rng.normal(size=(6, 10_000)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    matrix = x @ x.T
    matrix = matrix * (1 + 1e-7 * rng.uniform(-1, 1, size=(6, 6)).astype(np.float32))
    order_tasks(matrix)


@pytest.mark.parametrize(
    ("similarity", "options", "words"),
    [
        (np.zeros((0, 0)), {}, r"similarity must be a square matrix .* got shape \[0, 0\]"),
        ([1.0, 2.0], {}, r"similarity must be a square matrix .* got shape \[2\]"),
        (np.zeros((2, 3)), {}, r"got shape \[2, 3\]"),
        ([[0, np.nan], [1, 0]], {}, r"similarity must be finite, got nan at \[0, 1\]"),
        ([[0, np.inf], [np.inf, 0]], {"tasks": "ab"}, "got inf at .*tasks 'a' and 'b'"),
        ([[0, 1e308], [1e308, 0]], {}, "sum is finite"),
        ([[0, 1], [0.9, 0]], {}, r"symmetric, got 1 at \[0, 1\] and 0.9 at .*from_affinity"),
        ([[0, 1], [1, 0]], {"tasks": ["a"]}, "tasks must name the 2 tasks"),
        ([[0, 1], [1, 0]], {"tasks": ["a", "a"]}, "'a' twice"),
        ([[0, 1], [1, 0]], {"start": 2}, "start must name tasks out of 0, 1; got 2"),
        ([[0, 1], [1, 0]], {"start": "a"}, "start must name tasks"),
        ([[0, 1], [1, 0]], {"exact": "yes"}, "exact must be True, False or None, got 'yes'"),
        (np.zeros((23, 23)), {"exact": True}, "for more than 22 tasks, got 23"),
        ([[0, 1], [1, 0]], {"seed": -1}, "seed must be an integer"),
        ([[0, 1], [1, 0]], {"seed": 2**64}, "seed must be an integer"),
        ([[0, 1], [1, 0]], {"seed": 0.5}, "seed must be an integer"),
        ([[0, 1], [1]], {}, "similarity must be an array"),
    ],
)
def test_bad_matrices(similarity, options, words):
    with pytest.raises(ValueError, match=words):
        order_tasks(similarity, **options)


def test_bad_types():
    with pytest.raises(TypeError, match="similarity must be an array of numbers, got <U1"):
        order_tasks([["a"]])
    with pytest.raises(TypeError, match="similarity must be real, got torch.complex64"):
        order_tasks(torch.zeros(2, 2, dtype=torch.complex64))


def test_the_callers_matrix_is_left_alone(rng):
    matrix = random(rng, 6)
    before = matrix.copy()
    order_tasks(matrix)
    order_tasks(torch.from_numpy(matrix))
    assert np.array_equal(matrix, before)


@pytest.mark.parametrize(("n", "exact"), [(21, True), (120, False)])
def test_progress_and_errors_in_it(rng, n, exact):
    seen = []
    order_tasks(random(rng, n), exact=exact, progress=seen.append)
    assert len(seen) > 1 and seen[-1] == 1
    assert all(0 <= a <= b for a, b in itertools.pairwise(seen))

    def fail(fraction):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        order_tasks(random(rng, n), exact=exact, progress=fail)


def test_ctrl_c():
    code = (
        "import signal\n"
        "import numpy as np\n"
        "from flatmtl.curriculum import order_tasks\n"
        # a shell's background jobs inherit that it is ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "a = np.random.default_rng(0).normal(size=(900, 900))\n"
        "try:\n"
        "    order_tasks(a + a.T, progress=lambda f: print('at', f, flush=True))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(flatmtl.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout.readline().startswith("at")  # it runs
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0].endswith("interrupted\n")
    finally:
        process.kill()


# ------------------------------------------------------------ similarities


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_embeddings(rng, scale):
    samples = [scale * (rng.normal(size=(n, 7)) + rng.normal(size=7)) for n in (1, 5, 40, 3)]
    means = [x.mean(axis=0) for x in samples]
    expected = np.array([[cosine(a, b) for b in means] for a in means])
    mixed = [samples[0], torch.tensor(samples[1]), samples[2].tolist(), means[3]]
    for given in (samples, mixed, np.stack(means), torch.tensor(np.stack(means)), tuple(means)):
        found = from_embeddings(given)
        assert found.dtype == np.float64 and (found == found.T).all()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
        assert (np.diagonal(found) == 1).all()
    equal = rng.normal(size=(4, 3, 7))  # [T, n, d]
    np.testing.assert_allclose(from_embeddings(equal), from_embeddings(list(equal)), atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_in_other_dtypes(rng, dtype):
    x = torch.tensor(rng.normal(size=(3, 20, 5)), dtype=dtype, requires_grad=True)
    means = x.detach().double().mean(dim=1).numpy()
    expected = np.array([[cosine(a, b) for b in means] for a in means])
    np.testing.assert_allclose(from_embeddings(x), expected, atol=1e-13)


def test_embeddings_at_the_ends_of_the_range(rng):
    x = rng.normal(size=(3, 6))
    sizes = np.array([1e-300, 1.0, 1e300])
    np.testing.assert_allclose(from_embeddings(x * sizes[:, None]), from_embeddings(x), atol=1e-13)
    samples = np.full((4, 2), 1.7e308)  # their sum overflows
    np.testing.assert_allclose(from_embeddings([samples, [1, 1]]), np.ones((2, 2)), atol=1e-13)


def test_a_zero_embedding_is_like_none(rng):
    x = rng.normal(size=6)
    cancels = rng.normal(size=(8, 6))
    cancels = np.concatenate([cancels, -cancels])[rng.permutation(16)]  # a mean of rounding
    found = from_embeddings([x, np.zeros(6), cancels, np.zeros((3, 6))])
    assert (found[1:] == 0).all() and (found[:, 1:] == 0).all() and found[0, 0] == 1
    assert order_tasks(found).similarity == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "embeddings must have an entry for each task, got none"),
        (np.zeros((0, 3)), "got none"),
        (np.zeros(3), r"entry \[n, d\] or \[d\] for each task, got shape \[3\]"),
        ([np.ones((2, 3)), np.ones((0, 3))], r"embeddings\[1\] must have shape .* got \[0, 3\]"),
        (np.ones((2, 2, 2, 2)), r"embeddings\[0\] must have shape"),
        ([np.ones(3), np.ones((4, 2))], r"embeddings\[1\] must be of dimension 3.* got 2"),
        ([np.ones(2), [1, np.nan]], r"embeddings\[1\] must be finite, got nan"),
        ([np.ones(2), [[1, -np.inf]]], r"embeddings\[1\] must be finite, got -inf"),
    ],
)
def test_bad_embeddings(given, words):
    with pytest.raises(ValueError, match=words):
        from_embeddings(given)


def test_gram(rng):
    rows = rng.normal(size=(5, 30)) * np.array([1e-8, 1e8, 1, 1e4, 0])[:, None]
    expected = np.array(
        [[cosine(a, b) if a.any() and b.any() else 0.0 for b in rows] for a in rows]
    )
    found = from_gram(rows @ rows.T)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    assert (found == found.T).all() and np.diagonal(found).tolist() == [1, 1, 1, 1, 0]
    huge = from_gram(1e300 * np.array([[1.0, 0.5], [0.5, 1.0]]))
    np.testing.assert_allclose(huge, [[1, 0.5], [0.5, 1]], rtol=1e-14)
    jacobian = torch.tensor(rows[:4], dtype=torch.float32)
    narrow = from_gram(ops.gram(jacobian))
    np.testing.assert_allclose(narrow, expected[:4, :4], atol=1e-5)


def test_bad_grams():
    for given, words in (
        ([[1, np.nan], [np.nan, 1]], "gram must be finite, got nan"),
        ([[1, 0], [0, -1]], "gram must not be negative on its diagonal, got -1"),
        ([[1, 0.5], [0.1, 1]], "gram must be symmetric, got 0.5 at"),
        (np.zeros((2, 3)), "gram must be a square matrix"),
    ):
        with pytest.raises(ValueError, match=words):
            from_gram(given)


def test_affinities(rng):
    matrix = rng.normal(size=(4, 4))
    expected = (matrix + matrix.T) / 2
    np.fill_diagonal(expected, 0)
    np.fill_diagonal(matrix, np.nan)
    record = AffinityRecord.from_matrix(matrix, ["a", "b", "c", "d"])
    for given in (matrix, record):
        np.testing.assert_allclose(from_affinity(given), expected, rtol=1e-15)
    found = order_tasks(from_affinity(record), tasks=record.tasks)
    assert found.similarity == pytest.approx(brute(expected), rel=1e-12)
    with pytest.raises(ValueError, match="similarity must be symmetric"):
        order_tasks(matrix)
    matrix[0, 2] = np.nan
    with pytest.raises(ValueError, match=r"got nan at \[0, 2\]"):
        from_affinity(matrix)


# ------------------------------------------------------------ samples


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("n", [1, 9, 40_000])
def test_margins(rng, n, scale):
    q, p, other = rng.normal(size=(3, n, 3)) * scale
    expected = [cosine(a, b) - cosine(a, c) for a, b, c in zip(q[-9:], p[-9:], other[-9:])]
    found = difficulty_margin(q, p, other)
    assert found.shape == (n,) and found.dtype == np.float64
    np.testing.assert_allclose(found[-9:], expected, rtol=0, atol=1e-13)
    narrow = difficulty_margin(torch.tensor(q, dtype=torch.float32), p, torch.tensor(other))
    np.testing.assert_allclose(narrow, found, atol=1e-6)


def test_margins_of_zeros_and_of_extremes():
    q, p, other = np.eye(3)[[0]], np.eye(3)[[0]], -np.eye(3)[[0]]
    assert difficulty_margin(q, p, other).tolist() == [2]
    assert difficulty_margin(1e-300 * q, 1e300 * p, other).tolist() == [2]
    assert difficulty_margin(q, p, 0 * other).tolist() == [1]
    assert difficulty_margin(0 * q, p, other).tolist() == [0]
    assert difficulty_margin(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)


def test_bad_margins():
    one = np.ones((2, 3))
    for given, words in (
        (
            (one, one, np.ones((2, 4))),
            r"negative must have shape \[2, 3\], as query has, got \[2, 4\]",
        ),
        ((np.ones(3), np.ones(3), np.ones(3)), r"query must have shape \[n, d\] got \[3\]"),
        ((one, one * np.nan, one), "positive must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            difficulty_margin(*given)
    with pytest.raises(TypeError, match="query must be an array of numbers"):
        difficulty_margin(np.full((2, 3), "a"), one, one)


def test_samples_from_easy_to_hard(rng):
    margin = rng.normal(size=50)
    found = order_instances(margin)
    assert found.dtype == np.int64 and sorted(found) == list(range(50))
    assert (np.diff(margin[found]) <= 0).all()
    losses = torch.tensor(rng.uniform(size=50), dtype=torch.float32)
    assert (np.diff(losses.numpy()[order_instances(-losses)]) >= 0).all()
    kept = order_instances(margin, drop=0.29)
    assert len(kept) == 36  # 14.5 are dropped, rounded down
    assert kept.tolist() == found[:36].tolist()
    assert len(order_instances(np.arange(100), drop=0.29)) == 71
    assert order_instances([0.5, 1, 0.5, 1, -np.inf]).tolist() == [1, 3, 0, 2, 4]
    assert order_instances([]).tolist() == []


def test_a_share_of_each_task_is_dropped(rng):
    tasks = rng.permutation(np.repeat(["a", "b", "c"], [30, 10, 4]))
    margin = rng.normal(size=44) + 5 * (tasks == "a")
    found = order_instances(margin, drop=0.2, tasks=tasks)
    assert (np.diff(margin[found]) <= 0).all()
    for name, kept in (("a", 24), ("b", 8), ("c", 4)):
        own = np.flatnonzero(tasks == name)
        expected = set(own[np.argsort(-margin[own])][:kept])
        assert {i for i in found if tasks[i] == name} == expected
    assert found.tolist() == order_instances(margin, drop=0.2, tasks=list(tasks)).tolist()
    series = pd.Series(tasks, dtype=object)
    assert found.tolist() == order_instances(margin, drop=0.2, tasks=series).tolist()


def test_bad_samples():
    for given, options, words in (
        ([[1.0]], {}, r"easiness must have shape \[n\], got \[1, 1\]"),
        ([1, np.nan], {}, r"easiness must not be NaN, got it at \[1\]"),
        ([1.0], {"drop": 1.0}, "drop must be from 0 up to but without 1, got 1.0"),
        ([1.0], {"drop": -0.1}, "drop must be from 0"),
        ([1.0], {"drop": np.nan}, "drop must be from 0"),
        ([1.0], {"tasks": [1, 2]}, "tasks must have 1 entries, as easiness, got 2"),
        ([1.0], {"tasks": [1.5]}, "tasks must have the name of a task"),
    ):
        with pytest.raises(ValueError, match=words):
            order_instances(given, **options)
    with pytest.raises(TypeError, match="drop must be a number, got str"):
        order_instances([1.0], drop="a")


# ------------------------------------------------------------ the command


def run(capsys, *options, status=0):
    assert main(["order", *map(str, options)]) == status
    out, err = capsys.readouterr()
    if status:
        assert not out and len(err.splitlines()) == 1 and err.startswith("order: ")
        return err
    assert not err
    return out


def test_the_command(rng, capsys, tmp_path):
    matrix = rng.normal(size=(6, 6))
    tasks = ["ss", "depth", "normals", "keys", "edges", "a b"]
    record = AffinityRecord.from_matrix(matrix, tasks)
    record.save(tmp_path / "record.npz")
    record.write_csv(tmp_path / "record.csv")
    for options in ([], ["--start", "keys"], ["--exact", "--seed", "3"]):
        start = "keys" if "keys" in options else None
        expected = order_tasks(from_affinity(matrix), tasks=tasks, start=start)
        for name in ("record.npz", "record.csv"):
            assert run(capsys, tmp_path / name, *options).rstrip() == str(expected)
    many = random(rng, 20)
    AffinityRecord.from_matrix(many).save(tmp_path / "many.npz")
    assert "not proven best" in run(capsys, tmp_path / "many.npz") or order_tasks(many).exact
    assert "(exact; " in run(capsys, tmp_path / "many.npz", "--exact", "--start", "11")


def test_the_commands_errors(rng, capsys, tmp_path):
    matrix = rng.normal(size=(3, 3))
    AffinityRecord.from_matrix(matrix, ["a", "b", "c"]).save(tmp_path / "good.npz")
    matrix[0, 1] = np.nan
    AffinityRecord.from_matrix(matrix, ["a", "b", "c"]).save(tmp_path / "nan.npz")
    good = tmp_path / "good.npz"
    assert "unknown task 'd'" in run(capsys, good, "--start", "d", status=2)
    assert "quantity must be one of" in run(capsys, good, "--quantity", "cosine", status=2)
    assert "got nan at [0, 1]" in run(capsys, tmp_path / "nan.npz", status=2)
    assert "No such file" in run(capsys, tmp_path / "none.npz", status=2)
