"""The processes of tests/ranks.py: answers, failures, deaths, hangs; what `counted` sees."""

from __future__ import annotations

import os
import pickle
import threading
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SEED
from ranks import RankError, counted
from torch.nn.parallel import DistributedDataParallel

Calls = list[tuple[str, int]]
FLOAT = 4  # bytes


def summed(rank: int, row: torch.Tensor, scale: float = 1.0) -> dict[str, object]:
    total = scale * (rank + 1) * row
    dist.all_reduce(total)
    return {"rank": rank, "total": total, "view": total[1:], "none": None}


def surroundings(rank: int) -> dict[str, object]:
    return {
        "seed": SEED,
        "environment": {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "threads": torch.get_num_threads(),
        "size": dist.get_world_size(),
        "pid": os.getpid(),
    }


def drawn(rank: int) -> float:
    return float(torch.rand((), dtype=torch.float64))


def pid(rank: int) -> int:
    return os.getpid()


def raises_on(rank: int, bad: list[int], error: type[BaseException]) -> int:
    if rank in bad:
        raise error(f"rank {rank} does not like it")
    return rank


def unpicklable(rank: int) -> object:
    return lambda: rank


def dies(rank: int, who: int) -> None:
    if rank == who:
        os._exit(7)
    dist.barrier()


def sleeps(rank: int, who: int) -> None:
    if rank == who:
        time.sleep(60)


def out_of_step(rank: int) -> None:
    if rank == 0:
        raise ValueError("before its collective")
    dist.all_reduce(torch.ones(3), async_op=True)
    raise ValueError("after it")


def warns(rank: int) -> None:
    for _ in range(2 * rank):  # of one place, of a category that is ignored by default
        warnings.warn(f"from rank {rank}", DeprecationWarning, stacklevel=1)


def test_results_come_by_rank(ranks, rng):
    row = torch.from_numpy(rng.standard_normal(5))
    for size in (2, 4):
        results = ranks(size).run(summed, row, scale=3.0)
        ones = size * (size + 1) // 2
        assert [result["rank"] for result in results] == list(range(size))
        for result in results:
            np.testing.assert_allclose(result["total"], 3.0 * ones * row.numpy(), rtol=1e-14)
            assert torch.equal(result["view"], result["total"][1:])
            assert result["none"] is None


def test_one_pool_of_each_size(ranks):
    assert ranks(2) is ranks(2)
    first, second = ranks(2).run(surroundings), ranks(2).run(surroundings)
    assert first == second
    assert len({answer["pid"] for answer in first}) == 2
    for rank, answer in enumerate(first):
        assert answer["seed"] == SEED
        assert answer["threads"] == 1
        assert answer["size"] == 2
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        assert answer["environment"] == environment


def test_draws_differ_by_rank_and_repeat_with_the_seed(ranks, rng):
    first = ranks(2).run(drawn)
    assert first == ranks(2).run(drawn)
    assert first[0] != first[1]
    torch.manual_seed(SEED + 17)
    assert not set(first) & set(ranks(2).run(drawn))


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_rank_that_raises(ranks, error):
    before = ranks(2).run(pid)
    with pytest.raises(RankError, match="rank 1 does not like it") as caught:
        ranks(2).run(raises_on, [1], error)
    assert caught.value.hung == []
    ((rank, (kind, message, trace)),) = caught.value.failures.items()
    assert (rank, kind, message) == (1, error.__name__, "rank 1 does not like it")
    assert "in raises_on" in trace
    assert ranks(2).run(pid) == before  # the pool lives on


def test_all_failures_are_listed(ranks):
    with pytest.raises(RankError) as caught:
        ranks(2).run(raises_on, [0, 1], ValueError)
    assert sorted(caught.value.failures) == [0, 1]


def test_what_cannot_be_sent(ranks):
    before = ranks(2).run(pid)
    with pytest.raises(RankError) as caught:
        ranks(2).run(unpicklable)
    assert sorted(caught.value.failures) == [0, 1]
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ranks(2).run(lambda rank: rank)
    assert ranks(2).run(pid) == before


def test_warnings_of_each_rank(ranks):
    for _ in range(2):  # the second time too
        ranks(2).run(warns)
        assert ranks(2).warnings == [[], [("DeprecationWarning", "from rank 1")] * 2]
    ranks(2).run(pid)
    assert ranks(2).warnings == [[], []]


def test_a_group_out_of_step_a_death_and_a_hang(ranks, monkeypatch):
    pool = ranks(2)
    monkeypatch.setattr("ranks.CHECK_SECONDS", 1.0)
    first = pool.run(pid)
    with pytest.raises(RankError) as caught:
        pool.run(out_of_step)
    assert sorted(caught.value.failures) == [0, 1]
    second = pool.run(pid)
    assert not set(first) & set(second)

    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(dies, 1)
    assert time.monotonic() - start < 10
    assert caught.value.failures[1] == ("ProcessDied", "exit code 7", "")
    assert set(caught.value.failures) | set(caught.value.hung) == {0, 1}
    third = pool.run(pid)
    assert not set(second) & set(third)

    with pytest.raises(RankError) as caught:
        pool.run(sleeps, 0, timeout=0.5)
    assert (caught.value.failures, caught.value.hung) == ({}, [0])
    for process in (*first, *second, *third):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert [result["rank"] for result in pool.run(summed, torch.ones(2))] == [0, 1]


# What `counted` sees.


def each_collective(rank: int, size: int) -> dict[str, Calls]:
    world = dist.get_world_size()
    seen = {}
    row, wide = torch.ones(size), torch.ones(world * size, dtype=torch.float64)
    with counted() as seen["all_reduce"]:
        dist.all_reduce(row)
    with counted() as seen["async"]:
        works = [dist.all_reduce(row, async_op=True), dist.all_reduce(wide, async_op=True)]
        for work in works:
            work.wait()
    with counted() as seen["reduce_scatter_tensor"]:
        dist.reduce_scatter_tensor(torch.empty(size, dtype=wide.dtype), wide)
    with counted() as seen["all_gather_into_tensor"]:
        dist.all_gather_into_tensor(torch.empty(world * size), row)
    with counted() as seen["all_gather"]:
        dist.all_gather([torch.empty(size) for _ in range(world)], row)
    with counted() as seen["all_to_all_single"]:
        dist.all_to_all_single(torch.empty_like(wide), wide)
    with counted() as seen["broadcast"]:
        dist.broadcast(row, 0)
    with counted() as seen["barrier"]:
        dist.barrier()
    with counted() as seen["scatter"]:
        dist.scatter(torch.empty(size), [row] * world if rank == 0 else None, 0)
    with counted() as seen["p2p"]:
        dist.send(row, 1) if rank == 0 else dist.recv(row, 0)
    with counted() as seen["none"]:
        row + row
    return seen


def test_collectives_and_their_bytes(ranks, rng):
    size = int(rng.integers(3, 50))
    row, wide = FLOAT * size, 2 * 8 * size
    for rank, seen in enumerate(ranks(2).run(each_collective, size)):
        assert seen == {
            "all_reduce": [("all_reduce", row)],
            "async": [("all_reduce", row), ("all_reduce", wide)],
            "reduce_scatter_tensor": [("reduce_scatter_tensor", wide)],
            "all_gather_into_tensor": [("all_gather_into_tensor", row)],
            "all_gather": [("all_gather", row)],
            "all_to_all_single": [("all_to_all_single", wide)],
            "broadcast": [("broadcast", row)],
            "barrier": [("barrier", 0)],
            "scatter": [("scatter", 0 if rank else 2 * row)],
            "p2p": [("recv" if rank else "send", row)],
            "none": [],
        }


def gathered_objects(rank: int, value: object) -> tuple[list[object], Calls]:
    values: list[object] = [None] * dist.get_world_size()
    with counted() as calls:
        dist.all_gather_object(values, value)
    return values, calls


def test_an_object_is_its_size_and_its_bytes(ranks):
    for values, calls in ranks(2).run(gathered_objects, {"name": "x" * 1000}):
        assert values == [{"name": "x" * 1000}] * 2
        assert [name for name, _ in calls] == ["all_gather"] * 2
        assert calls[0][1] == 8
        assert 1000 < calls[1][1] < 1200


def of_two_groups(rank: int) -> tuple[Calls, Calls, Calls]:
    group = dist.new_group([0, 1])
    with counted() as everything, counted(group) as small, counted(dist.group.WORLD) as world:
        dist.all_reduce(torch.ones(2), group=group)
        dist.all_reduce(torch.ones(3))
    dist.destroy_process_group(group)
    return everything, small, world


def test_the_calls_of_one_group(ranks):
    two, three = ("all_reduce", 2 * FLOAT), ("all_reduce", 3 * FLOAT)
    assert ranks(2).run(of_two_groups) == [([two, three], [two], [three])] * 2


def of_another_thread(rank: int, seen: int) -> None:
    with counted():
        for _ in range(seen):
            dist.all_reduce(torch.ones(2))
        thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(2),))
        thread.start()
        thread.join()


def test_a_call_that_is_not_seen_is_noticed(ranks):
    for seen in (0, 2):
        with pytest.raises(RankError, match=f"RuntimeError: saw {seen} of {seen + 1} collectives"):
            ranks(2).run(of_another_thread, seen)


def of_functional(rank: int, size: int) -> tuple[Calls, Calls]:
    from torch.distributed import _functional_collectives as functional

    group = dist.group.WORLD
    with counted(group) as calls:
        functional.wait_tensor(functional.all_reduce(torch.ones(size), "sum", group))
        functional.wait_tensor(functional.all_gather_tensor(torch.ones(size), 0, group))
    row = torch.ones(size, 2, requires_grad=True)
    with counted() as differentiated:
        functional.all_gather_tensor_autograd(row, 0, group).sum().backward()
    return calls, differentiated


def test_functional_collectives(ranks, rng):
    size = int(rng.integers(1, 50))
    row = FLOAT * size
    for calls, differentiated in ranks(2).run(of_functional, size):
        assert calls == [("all_reduce", row), ("all_gather_into_tensor", row)]
        assert differentiated == [
            ("all_gather_into_tensor", 2 * row),
            ("reduce_scatter_tensor", 4 * row),
        ]


def network(width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width)
    )


def of_ddp(rank: int, width: int) -> list[tuple[Calls, Calls]]:
    # From the second step on a bucket holds a layer. That step starts with an agreement on them.
    model = DistributedDataParallel(network(width), bucket_cap_mb=width * width * FLOAT / 2**20)
    steps = []
    for _ in range(3):
        with counted() as forward:
            loss = model(torch.randn(3, width)).sum()
        with counted() as backward:
            loss.backward()
        steps.append((forward, backward))
    with model.no_sync(), counted() as local:
        model(torch.randn(3, width)).sum().backward()
    steps.append((local, []))
    return steps


def test_buckets_and_buffers_of_ddp(ranks, rng):
    width = int(rng.integers(16, 64))
    linear = FLOAT * width * (width + 1)
    parameters = 2 * linear + FLOAT * 2 * width
    buffers = Counter([("broadcast", FLOAT * 2 * width), ("broadcast", 8)])  # by dtype
    for steps in ranks(2).run(of_ddp, width):
        *trained, (local, _) = steps
        assert Counter(trained[0][0]) == Counter(trained[2][0]) == buffers
        assert Counter(trained[1][0]) > buffers
        for _, backward in trained:
            assert {name for name, _ in backward} == {"all_reduce"}
            assert sum(size for _, size in backward) == parameters
        assert len(trained[2][1]) >= 2
        assert trained[1][1] == trained[2][1]
        assert "all_reduce" not in dict(local)


def of_fsdp(rank: int, width: int) -> tuple[Calls, Calls]:
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(width, width, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with counted() as forward:
        loss = model(torch.randn(3, width)).sum()
    with counted() as backward:
        loss.backward()
    return forward, backward


def test_shards_of_fsdp(ranks, rng):
    width = 2 * int(rng.integers(8, 32))
    weight = FLOAT * width * width
    for forward, backward in ranks(2).run(of_fsdp, width):
        assert forward == [("all_gather_into_tensor", weight // 2)]
        assert backward == [("reduce_scatter_tensor", weight)]
