"""Collectives of a step, counted with their bytes, against formulas."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from itertools import product

import pytest
import torch
from ranks import counted
from shard_runs import Case, Net, Run

from bench.scaling_model import (
    Calls,
    losses,
    one_row,
    one_row_of_shards,
    parts,
    row,
    rows,
    rows_of_each,
    shards,
)
from flatmtl import SAM

# ---------------------------------------------------------------- counted

SHARP = SAM(0.05)
DIRECT = SAM(0.05, aggregate="direct")
STEPS = 3  # before the one that is counted


def sizes_of(net: Net) -> tuple[list[int], list[list[int]]]:
    """Elements of each parameter: of the shared ones, and of each task's own."""
    own = [[p.numel() for p in head.parameters()] for head in net.heads]
    heads = {id(p) for p in net.heads.parameters()}
    return [p.numel() for p in net.parameters() if id(p) not in heads], own


def steady(rank: int, cases: list[Case], size: int, seed: int, steps: int) -> list[Calls | str]:
    """The collectives of one step after so many."""
    found: list[Calls | str] = []
    for case in cases:
        try:
            run = Run(case, seed, size, rank)
            run.train(steps)
            with counted() as calls:
                run.step()
            found.append(calls)
        except Exception:
            found.append(traceback.format_exc())
    return found


def check(pool, cases: list[Case], size: int, seed: int, expected, steps: int = STEPS) -> None:
    results = pool.run(steady, cases, size, seed, steps)
    for case, *found in zip(cases, *results, strict=True):
        net = Net(case.net, case.tasks, seed)
        wanted = expected(case, *sizes_of(net))
        for calls in found:
            assert calls == wanted, f"{case}"


E = {torch.float64: 8, torch.float32: 4}


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_all_ranks(ranks, rng, size):
    every = [
        Case(method, wrap="ddp", net=net, sharpness=sharp, dtype=dtype, labels=labels, more=more)
        for net, dtype, labels in (
            ("plain", torch.float64, "all"),
            ("conv", torch.float32, "moving"),
            ("single", torch.float32, "idle"),
            ("open", torch.float64, "all"),
        )
        for method, sharp, more in (
            ("PCGrad", None, {}),
            ("MGDA", SHARP, {}),
            ("MGDA", DIRECT, {"history": 2}),
            ("DWA", SHARP, {}),
            ("IMTL", None, {}),
            ("MGDA", SHARP, {"sync_perturbation": False}),
        )
    ]

    cases = random.Random(int(rng.integers(2**31))).sample(every, 16 // size)

    def expected(case: Case, shared: list[int], own: list[list[int]]) -> Calls:
        e = E[case.dtype]
        P, lengths = row(e, shared), [row(e, sizes) for sizes in own]
        looks = losses(case.tasks) if case.method in ("DWA", "IMTL") else []
        if "sync_perturbation" in case.more:
            return rows_of_each(case.tasks, P, lengths, e)
        return rows(case.tasks, P, lengths, e, perturbed=case.sharpness is not None) + looks

    check(ranks(size), cases, size, int(rng.integers(2**31)), expected)


def test_one_row_for_all_tasks(ranks, rng):
    seed = int(rng.integers(2**31))
    spaces = [
        Case(method, wrap=wrap, net=net, dtype=dtype)
        for method, wrap, (net, dtype) in product(
            ("UncertaintyWeighting", "DWA"),
            ("ddp", "shard_rows"),
            (("plain", torch.float64), ("conv", torch.float32)),
        )
    ]
    between = [
        Case("MGDA", wrap="ddp", sharpness=sharp, more={"weights_every": 3})
        for sharp in (None, SHARP, DIRECT)
    ] + [Case("MGDA", wrap="shard_rows", more={"weights_every": 3})]

    def expected(case: Case, shared: list[int], own: list[list[int]]) -> Calls:
        e = E[case.dtype]
        n = 2 if case.wrap == "shard_rows" else 1
        P, lengths = row(e, shared, n), [row(e, sizes, n) for sizes in own]
        sharp = case.sharpness is not None
        return one_row(case.tasks, P, lengths, e, perturbed=sharp, apart=case.sharpness is SHARP)

    check(ranks(2), spaces, 2, seed, expected)
    check(ranks(2), between, 2, seed, expected, steps=4)


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_rows(ranks, rng, size):
    every = [
        Case(method, net=net, sharpness=sharp, dtype=dtype, labels=labels)
        for net, dtype, labels in (
            ("plain", torch.float64, "all"),
            ("conv", torch.float32, "moving"),
            ("tiny", torch.float32, "idle"),
            ("open", torch.float64, "all"),
        )
        for method, sharp in (("PCGrad", None), ("MGDA", SHARP), ("IMTL", None), ("DWA", DIRECT))
    ]
    cases = random.Random(int(rng.integers(2**31))).sample(every, 16 // size)

    def expected(case: Case, shared: list[int], own: list[list[int]]) -> Calls:
        e = E[case.dtype]
        P, lengths = row(e, shared, size), [row(e, sizes, size) for sizes in own]
        sharp = case.sharpness is not None
        found = parts(case.tasks, P, lengths, e, size, perturbed=sharp)
        if case.method in ("IMTL", "DWA"):  # once the last rows have come
            found[-2 if sharp else -1 : -2 if sharp else -1] = losses(case.tasks)
        return found

    check(ranks(size), cases, size, int(rng.integers(2**31)), expected)


def beside(rank: int, cases: list[Case], size: int, seed: int) -> list[Calls | str]:
    """What a step has beside the collectives of the same passes made without flatmtl."""
    found: list[Calls | str] = []
    for case in cases:
        try:
            run = Run(case, seed, size, rank)
            run.train(STEPS)
            closure, _ = run.closure(STEPS)
            with counted() as bare:
                passes(run, case, closure)
            run.optimizer.zero_grad()
            with counted() as calls:
                run.step()
            found.append(without(calls, bare))
        except Exception:
            found.append(traceback.format_exc())
    return found


def passes(run: Run, case: Case, closure) -> None:
    found = closure()
    if case.method in ("UncertaintyWeighting", "DWA") and case.sharpness is None:
        sum(found).backward()
        return
    for task, loss in enumerate(found):
        loss.backward(retain_graph=task < len(found) - 1)
    if case.sharpness is not None:
        for task in range(len(found)):
            run.net.zero_grad()
            closure()[task].backward()


def without(calls: Calls, others: Calls) -> Calls:
    """``calls`` without as many of each as ``others`` has; raises if there are too few."""
    left = Counter(others)
    kept = []
    for call in calls:
        if left[call]:
            left[call] -= 1
        else:
            kept.append(call)
    assert not +left, f"missing: {+left}"
    return kept


@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_parameters(ranks, rng, size):
    seed = int(rng.integers(2**31))
    every = [
        Case(method, wrap=wrap, net=net, sharpness=sharp, reshard=reshard, dtype=dtype)
        for wrap, reshard in (
            ("heads_replicated", True),
            ("heads_sharded", True),
            ("root", None),
        )
        for net, dtype in (("plain", torch.float64), ("few", torch.float32))
        for method, sharp in (("PCGrad", None), ("MGDA", SHARP), ("IMTL", None), ("DWA", None))
    ]
    cases = random.Random(seed).sample(every, 16 // size)
    results = ranks(size).run(beside, cases, size, seed)
    for case, *found in zip(cases, *results, strict=True):
        e = E[case.dtype]
        own = sizes_of(Net(case.net, case.tasks, seed))[1]
        Q = sum(row(e, sizes) for sizes in own) if case.wrap == "heads_replicated" else 0
        if case.method == "DWA":
            wanted = one_row_of_shards(case.tasks, 0, Q, 1 + case.tasks, e)
        else:
            wanted = shards(case.tasks, 0, Q, e, perturbed=case.sharpness is not None)
            wanted += losses(case.tasks) if case.method == "IMTL" else []
        for calls in found:
            assert calls == wanted, f"{case}"
