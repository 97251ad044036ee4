"""Checkpoints of training in several processes: taken up on as many ranks, on fewer and on more."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from ranks import counted
from ranks_training import Case, Run, same
from torch import Tensor

from flatmtl import SAM

CASES = [
    Case("pcgrad", steps=6),
    Case("pcgrad", sharpness=SAM(0.05, every=2), base="adam", steps=6),
    Case("nash_mtl", sharpness=SAM(0.05, aggregate="direct"), steps=6),
    Case("uw", base="adam", steps=6),
    Case("mgda", sharpness=SAM(0.05), more={"weights_every": 4}, steps=6),
    Case("moco", net="unused", steps=6),
    Case("famo", steps=6),
    Case("gradnorm", data="not_at_first", steps=6),
]


def saved(run: Run) -> bytes:
    file = io.BytesIO()
    torch.save((run.k, run.net.state_dict(), run.optimizer.state_dict()), file)
    return file.getvalue()


def resumed(run: Run, checkpoint: bytes) -> Run:
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    run.k = state[0]
    run.net.load_state_dict(state[1])
    run.optimizer.load_state_dict(state[2])
    return run


def first_half(rank: int, cases: list[Case], size: int, seed: int) -> list[Any]:
    found = []
    for case in cases:
        run = Run(case, seed, size, rank)
        for _ in range(3):
            run.step()
        checkpoint = saved(run)
        found.append((checkpoint, copy.deepcopy(run.optimizer.state_dict()), run.train()))
    return found


def second_half(
    rank: int, cases: list[Case], checkpoints: list[bytes], size: int, seed: int
) -> list[Tensor]:
    found = []
    for case, checkpoint in zip(cases, checkpoints, strict=True):
        run = Run(case, seed, size, rank)
        with torch.no_grad():
            for param in run.net.parameters():
                param.add_(1.0)  # the checkpoint has what is right
        found.append(resumed(run, checkpoint).train())
    return found


def test_resume_on_another_number_of_ranks(ranks, rng):
    seed = int(rng.integers(2**31))
    begun = ranks(2).run(first_half, CASES, 2, seed)
    for case, first, second in zip(CASES, *begun, strict=True):
        assert same(first[1], second[1]), case
    checkpoints = [found[0] for found in begun[0]]
    ends = [found[2] for found in begun[0]]
    for size in (2, 4):
        for found in ranks(size).run(second_half, CASES, checkpoints, size, seed):
            for case, one, end in zip(CASES, found, ends, strict=True):
                if size == 2:
                    assert torch.equal(one, end), case
                else:
                    assert torch.allclose(one, end, 1e-8, 1e-9), case
    for case, checkpoint, end in zip(CASES, checkpoints, ends, strict=True):
        alone = resumed(Run(case, seed, 2), checkpoint)
        assert torch.allclose(alone.train(), end, 1e-8, 1e-9), case


def test_resume_of_one_process_on_ranks(ranks, rng):
    seed = int(rng.integers(2**31))
    checkpoints, ends = [], []
    for case in CASES:
        run = Run(case, seed, 2)
        for _ in range(3):
            run.step()
        checkpoints.append(saved(run))
        ends.append(run.train())
    first, second = ranks(2).run(second_half, CASES, checkpoints, 2, seed)
    assert same(first, second)
    for case, one, end in zip(CASES, first, ends, strict=True):
        assert torch.allclose(one, end, 1e-8, 1e-9), case


def not_all(rank: int, checkpoint: bytes, seed: int) -> tuple[str, str]:
    run = Run(CASES[0], seed, 2, rank)
    if rank == 0:
        resumed(run, checkpoint)
    else:
        run.net.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True)[1])
    try:
        run.step()
    except ValueError as error:
        return "ValueError", str(error)
    return "", ""


def test_a_rank_that_has_not_resumed(ranks, rng):
    seed = int(rng.integers(2**31))
    run = Run(CASES[0], seed, 2)
    run.step()
    for kind, text in ranks(2).run(not_all, saved(run), seed):
        assert kind == "ValueError"
        assert "the number of steps made must be the same on every rank, got 1 on rank 0" in text


def copied(rank: int, size: int, seed: int) -> dict[str, Any]:
    case = Case("pcgrad", sharpness=SAM(0.05), net="norm", steps=6)
    run = Run(case, seed, size, rank)
    for _ in range(3):
        run.step()
    twin = copy.copy(run)
    twin.optimizer, twin.model = copy.deepcopy((run.optimizer, run.model))
    twin.net = twin.model.module
    found: dict[str, Any] = {}
    with counted() as found["calls"]:
        found["end"] = run.train()
    with counted() as found["calls of the twin"]:  # the first step agrees anew
        found["twin"] = twin.train()
    found["own"] = not {id(p) for p in run.net.parameters()} & {
        id(p) for p in twin.net.parameters()
    }
    return found


def pickled(rank: int, size: int, seed: int, ddp: bool) -> tuple[str, Any, Any]:
    run = Run(Case("pcgrad", net="heads", steps=6, ddp=ddp), seed, size, rank)
    for _ in range(3):
        run.step()
    try:
        data = pickle.dumps((run.optimizer, run.model))
    except TypeError as error:
        return str(error), None, None
    end = run.train()
    run.optimizer, run.model = pickle.loads(data)
    run.net = run.model.module if ddp else run.model
    run.k = 3
    return "", end, run.train()


@pytest.mark.parametrize("size", [2, 4])
def test_a_copy_trains_on_as_the_first(ranks, rng, size):
    results = ranks(size).run(copied, size, int(rng.integers(2**31)))
    for found in results:
        assert found["own"]
        assert torch.equal(found["end"], results[0]["end"])
        assert torch.equal(found["twin"], found["end"])
        names = [name for name, _ in found["calls"]]
        again = [name for name, _ in found["calls of the twin"]]
        for calls in (names, again):  # DDP's own ones rest
            assert calls.count("broadcast") == 3 * 2  # buffers of two dtypes
            assert calls.count("all_reduce") == 3 * 2 * 3  # a row of a task, twice with SAM


def test_pickling(ranks, rng):
    """A process group is of its process: what holds one cannot be pickled, and says so."""
    for ddp in (True, False):
        for text, *_ in ranks(2).run(pickled, 2, int(rng.integers(2**31)), ddp):
            assert "pickle" in text
