"""Batches by task and by difficulty: every sample once, epochs, rounds, DataLoader, resuming."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from flatmtl.curriculum import (
    InstanceOrderSampler,
    TaskOrderSampler,
    order_instances,
    order_tasks,
)

NAMES = ["ss", "depth", "normals", "keys"]
COUNTS = [23, 8, 1, 40]


@pytest.fixture
def tasks(rng):
    """The task of each of 72 samples, tasks of different sizes mixed."""
    return rng.permutation(np.repeat(NAMES, COUNTS))


@pytest.fixture
def order(rng):
    return rng.permutation(NAMES).tolist()


def blocks(names):
    return [name for name, _ in itertools.groupby(names)]


def check_epoch(sampler, tasks, batch_size):
    """Batches of one task, as the schedule says; returns the samples."""
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(sampler.schedule)
    for batch, name in zip(batches, sampler.schedule):
        assert all(type(i) is int for i in batch)
        assert 1 <= len(batch) <= batch_size
        assert {str(tasks[i]) for i in batch} == {str(name)}
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 100])
def test_every_sample_once_task_after_task(order, tasks, batch_size):
    sampler = TaskOrderSampler(order, tasks, batch_size)
    assert sorted(check_epoch(sampler, tasks, batch_size)) == list(range(72))
    assert blocks(sampler.schedule) == order
    assert len(sampler) == sum(-(-n // batch_size) for n in COUNTS)


@pytest.mark.parametrize("rounds", [1, 2, 3, 10, 50])
def test_rounds(order, tasks, rounds):
    sampler = TaskOrderSampler(order, tasks, 4, rounds=rounds)
    assert sorted(check_epoch(sampler, tasks, 4)) == list(range(72))
    counts = {name: -(-n // 4) for name, n in zip(NAMES, COUNTS)}
    for name in NAMES:
        places = np.flatnonzero(np.array(sampler.schedule) == name)
        assert len(places) == counts[name]
    if rounds == 10:  # as many as the largest has batches: one of it in each round
        where = [i for i, name in enumerate(sampler.schedule) if name == "keys"]
        for a, b in itertools.pairwise(where):
            between = sampler.schedule[a + 1 : b]
            assert len(set(between)) == len(between)  # others at most once
        assert len(where) == 10
    if rounds == 2:
        halves = [sampler.schedule.count("keys"), sampler.schedule.count("ss")]
        assert halves == [10, 6]
        assert blocks(sampler.schedule).count("keys") == 2


def test_drop_last(order, tasks):
    sampler = TaskOrderSampler(order, tasks, 8, drop_last=True)
    samples = check_epoch(sampler, tasks, 8)
    assert len(samples) == len(set(samples)) == 16 + 8 + 0 + 40
    assert all(len(batch) == 8 for batch in sampler)
    assert blocks(sampler.schedule) == [name for name in order if name != "normals"]
    assert list(TaskOrderSampler(order, tasks, 100, drop_last=True)) == []


def test_epochs(order, tasks):
    sampler = TaskOrderSampler(order, tasks, 5, seed=7)
    before = torch.random.get_rng_state()
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(sum(second, [])) == list(range(72))
    assert [tasks[b[0]] for b in second] == [tasks[b[0]] for b in first]
    again = TaskOrderSampler(order, tasks, 5, seed=7)
    again.set_epoch(1)
    assert list(again) == second
    assert list(TaskOrderSampler(order, tasks, 5, seed=8)) != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_going_on_with_an_epoch(order, tasks):
    sampler = TaskOrderSampler(order, tasks, 5, rounds=2)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, first=6)
    assert list(sampler) == list(sampler) == whole[6:]
    assert len(sampler) == len(whole) - 6
    sampler.set_epoch(3, first=len(whole))
    assert list(sampler) == [] and len(sampler) == 0
    sampler.set_epoch(4)
    assert len(sampler) == len(whole)
    with pytest.raises(ValueError, match=f"first must be at most {len(whole)}, all batches"):
        sampler.set_epoch(3, first=len(whole) + 1)
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got -1"):
        sampler.set_epoch(-1)


def test_samples_in_their_order(rng, order, tasks):
    easiness = rng.normal(size=72)
    instances = order_instances(easiness, drop=0.25, tasks=tasks)
    for given in (instances, instances.tolist(), torch.from_numpy(instances)):
        sampler = TaskOrderSampler(order, tasks, 6, instances=given, rounds=2)
        samples = check_epoch(sampler, tasks, 6)
        assert sorted(samples) == sorted(instances)
        for name in NAMES:
            own = [easiness[i] for i in samples if tasks[i] == name]
            assert own == sorted(own, reverse=True)
        sampler.set_epoch(1)
        assert list(sampler) == list(TaskOrderSampler(order, tasks, 6, instances=given, rounds=2))


def test_an_order_found(rng, tasks):
    matrix = rng.normal(size=(4, 4))
    found = order_tasks(matrix + matrix.T, tasks=NAMES)
    by_name = TaskOrderSampler(found, tasks, 4)
    assert blocks(by_name.schedule) == found.order
    rows = np.array([NAMES.index(name) for name in tasks])
    for given in (rows, torch.from_numpy(rows), rows.tolist()):  # rows of the matrix
        by_row = TaskOrderSampler(found, given, 4)
        assert by_row.schedule == by_name.schedule
        assert list(by_row) == list(by_name)
    for given in (list(tasks), pd.Series(tasks), pd.Series(tasks, dtype=object)):
        assert list(TaskOrderSampler(found, given, 4)) == list(by_name)
    numbers = order_tasks(matrix + matrix.T)
    assert blocks(TaskOrderSampler(numbers, rows, 4).schedule) == numbers.indices
    assert list(TaskOrderSampler(found.indices, rows, 4)) == list(by_name)
    own = order_tasks(matrix + matrix.T, tasks=[40, 10, 30, 20])  # names, not rows
    labels = np.array([40, 10, 30, 20])[rows]
    assert blocks(TaskOrderSampler(own, labels, 4).schedule) == own.order


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_loader(order, tasks, workers):
    data = TensorDataset(torch.arange(72))
    sampler = TaskOrderSampler(order, tasks, 5)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert [batch.tolist() for (batch,) in loader] == list(sampler)
    easy = InstanceOrderSampler(torch.randperm(72), 5)
    assert [batch.tolist() for (batch,) in DataLoader(data, batch_sampler=easy)] == list(easy)


def test_instances_in_consecutive_batches(rng):
    instances = rng.permutation(200)[:43]
    for drop_last in (False, True):
        sampler = InstanceOrderSampler(instances, 10, drop_last=drop_last)
        expected = list(BatchSampler(instances.tolist(), 10, drop_last))
        assert list(sampler) == expected and len(sampler) == len(expected)
        sampler.set_epoch(5)
        assert list(sampler) == expected
    assert list(InstanceOrderSampler([], 10)) == []


def test_batches_in_random_order(rng):
    instances = rng.permutation(205)
    plain = list(InstanceOrderSampler(instances, 10))
    sampler = InstanceOrderSampler(instances, 10, shuffle=True, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second and first != plain
    sampler.set_epoch(1, first=4)
    assert list(sampler) == second[4:]


@pytest.mark.parametrize(
    ("order", "tasks", "options", "words"),
    [
        (["a", "b"], ["a", "c"], {}, "order must have every task of tasks, got none 'c'"),
        (
            ["a", "b"],
            ["a", "a"],
            {},
            "tasks must have samples of every task of order, got none of 'b'",
        ),
        (["a", "a"], ["a", "a"], {}, "different names, got 'a' twice"),
        ("ab", ["a", "b"], {}, "order must be a sequence of task names, got the string 'ab'"),
        (["a", "b"], [0, 1], {}, "order must have every task of tasks, got none 0"),
        ([0, 1], [0.0, 1.0], {}, "tasks must have the name of a task, .* got float64"),
        ([0], [[0]], {}, r"tasks must have .* of shape \[1, 1\]"),
        ([0], [0], {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ([0], [0], {"batch_size": 1.5}, "batch_size must be an integer"),
        ([0], [0], {"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ([0], [0], {"seed": -1}, "seed must be an integer of at least 0"),
        ([0], [0], {"instances": [1]}, "instances must be indices from 0 up to 0, got 1"),
        ([0], [0], {"instances": [-1]}, "instances must be indices from 0 up to 0, got -1"),
        ([0], [0], {"instances": [0, 0]}, "instances must be different, got 0 twice"),
        ([0], [0], {"instances": [0.5]}, "instances must be indices of samples, got float64"),
    ],
)
def test_bad_arguments(order, tasks, options, words):
    with pytest.raises(ValueError, match=words):
        TaskOrderSampler(order, tasks, **{"batch_size": 2, **options})


def test_bad_instances():
    for given in ([-1], [0, 0], [[0]], [1.5]):
        with pytest.raises(ValueError, match="instances must be"):
            InstanceOrderSampler(given, 2)
