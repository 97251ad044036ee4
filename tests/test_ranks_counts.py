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

from flatmtl import SAM

Calls = list[tuple[str, int]]

# ---------------------------------------------------------------- the formulas
#
# T tasks on n ranks, e bytes an element of a row, k = 64 / e elements a cache line.
#   P    shared parameters, each filled up to whole cache lines: sum_j ceil(numel_j / k) k
#   O_i  own[i], the same of the parameters that task i has for itself
#   P', O_i'   P and O_i filled up to n whole cache lines
# Every message is what a rank hands in, as ranks.counted has it. These are the steps from the third on
# (once all ranks know what the tasks reach), of a model without buffers.

DOUBLE = 8
LINE = 64


def row(e: int, sizes: list[int], n: int = 1) -> int:
    """P or O_i; with ``n`` P' or O_i'. Elements."""
    k = LINE // e
    whole = sum(-(-size // k) * k for size in sizes)
    return -(-whole // (k * n)) * k * n


def losses(T: int) -> Calls:
    """Before a step that looks at losses: T losses, T counts, one mark."""
    return [("all_reduce", (2 * T + 1) * DOUBLE)]


def rows(T: int, P: int, own: list[int], e: int, *, perturbed: bool = False) -> Calls:
    """DDP: a message a task, of shared row, tail of one cache line, and own row. T, or 2 T of them."""
    family = [("all_reduce", (P + LINE // e + own[i]) * e) for i in range(T)]
    return 2 * family if perturbed else family


def rows_of_each(T: int, P: int, own: list[int], e: int) -> Calls:
    """DDP with sync_perturbation=False: the same 2 T messages, each task's two one after the other."""
    return [call for one in rows(T, P, own, e) for call in (one, one)]


def one_row(
    T: int, P: int, own: list[int], e: int, *, perturbed: bool = False, apart: bool = False
) -> Calls:
    """One backward pass: losses, then one row and a mark; with sharpness a second such row.

    ``apart``: the first has two shared rows ("decomposed", whose weights of g and of f differ).
    """
    second = [("all_reduce", (P + sum(own) + 1) * e)]
    first = [("all_reduce", ((1 + apart) * P + sum(own) + 1) * e)]
    return losses(T) + (first + second if perturbed else second)


def parts(T: int, P: int, own: list[int], e: int, n: int, *, perturbed: bool = False) -> Calls:
    """shard_rows=True, P' and O_i' given: T + 2 collectives, or 3 T + 3 with sharpness.

    T reduce-scatters of a row each, one all-reduce of the Gram matrix and two norms a task, one all-gather of
    the update. With sharpness, before the last one, T times an all-gather of the row to perturb along and
    a reduce-scatter of the one found there, and a second Gram matrix.
    """
    c = [P // n + LINE // e + own[i] // n for i in range(T)]
    scatter = [("reduce_scatter_tensor", n * c[i] * e) for i in range(T)]
    gather = [("all_gather_into_tensor", c[i] * e) for i in range(T)]
    gram = [("all_reduce", (T * T + 2 * T) * DOUBLE)]
    found = scatter + gram
    if perturbed:
        found += [call for i in range(T) for call in (gather[i], scatter[i])] + gram
    return found + [("all_gather_into_tensor", (P // n + sum(own) // n) * e)]


def shards(T: int, R: int, Q: int, e: int, *, perturbed: bool = False) -> Calls:
    """FSDP2, beside its own: R (Q) elements of replicated parameters in P (in all O_i) of the block.

    One all-reduce of all rows' replicated columns if there are any, one of the Gram matrix, two norms and a
    count a task; twice with sharpness.
    """
    found = [("all_reduce", (T * R + Q) * e)] if R + Q else []
    found += [("all_reduce", (T * T + 3 * T) * DOUBLE)]
    return 2 * found if perturbed else found


def one_row_of_shards(T: int, R: int, Q: int, blocks: int, e: int) -> Calls:
    """FSDP2 with one backward pass: losses, replicated columns, a squared norm of each block's row."""
    replicated = [("all_reduce", (R + Q) * e)] if R + Q else []
    return losses(T) + replicated + [("all_reduce", blocks * DOUBLE)]


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
