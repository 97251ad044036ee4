"""AffinityProbe over several processes: on every rank, what one process on the whole batch measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from affinity_nets import frozen
from ranks import RankError, counted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import MAML, SAM, AffinityProbe, MultiTaskOptimizer, weighting

T, ROWS = 3, 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls.add_(1)
        h = self.trunk(x)
        return [head(h) for head in self.heads]


@dataclass
class Case:
    """A training run with a probe."""

    probe: dict[str, Any] = field(default_factory=dict)
    weighting: str = "PCGrad"
    method: dict[str, Any] = field(default_factory=dict)
    sharpness: Any = None
    base: str = "SGD"
    base_options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05})
    options: dict[str, Any] = field(default_factory=dict)
    batches: int = 1
    scaled: bool = False
    steps: int = 4
    labels: str = "all"  # "some": of random rows; "tasks": whole tasks missing on ranks
    parts: Sequence[int] = ()


def batch(seed: int, step: int, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x [ROWS, 6], y [ROWS, T, 2], which rows have a label, [ROWS, T]."""
    g = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(ROWS, 6, generator=g, dtype=torch.float64)
    y = torch.randn(ROWS, T, 2, generator=g, dtype=torch.float64)
    there = torch.ones(ROWS, T, dtype=torch.bool)
    if case.labels == "some":
        there = torch.rand(ROWS, T, generator=g) < 0.6
    elif case.labels == "tasks":
        there[: ROWS // 2, 2] = False
        there[:, 1] = step != 1
        there[ROWS // 2 :, 0] = step != 2
    return x, y, there


def parts_of(case: Case, ranks: int) -> list[int]:
    return list(case.parts or [ROWS // ranks] * ranks)


def train(rank: int, ranks: int, seed: int, case: Case, **spy: Any) -> dict[str, Any]:
    """The run on one rank of `ranks`; one process with the whole batch where that is 1."""
    torch.manual_seed(seed % 2**31)
    net = Net().double()
    model = DistributedDataParallel(net) if ranks > 1 else net
    base = getattr(torch.optim, case.base)(model.parameters(), **case.base_options)
    optimizer = MultiTaskOptimizer(
        base,
        weighting=getattr(weighting, case.weighting)(**case.method),
        sharpness=case.sharpness,
        model=model,
        **case.options,
    )
    probe = AffinityProbe(optimizer, **{"every": 1, **case.probe})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaled else None
    cuts = parts_of(case, ranks)
    calls = []
    for step in range(case.steps):
        whole = batch(seed, step, case)
        x, y, there = (part.split(cuts)[rank] if ranks > 1 else part for part in whole)

        def losses(first: int, x: Tensor = x, y: Tensor = y, there: Tensor = there) -> list[Any]:
            # every other row a micro-batch
            mine = slice(first, None, case.batches)
            out = model(x[mine])
            found = []
            for t in range(T):
                rows = there[mine, t]
                wrong = ((out[t] - y[mine, t]) ** 2).mean(1)
                found.append(wrong[rows].mean() if rows.any() else None)
            return found

        closures = [lambda first=first: losses(first) for first in range(case.batches)]
        samples = [max(1, int(n)) for n in there.sum(0)]
        with counted() as seen:
            if scaler is None:
                optimizer.step(closures, samples=samples)
            else:
                optimizer.backward(closures, scaler=scaler, samples=samples)
                scaler.step(optimizer)
                scaler.update()
        calls.append(seen)
        if step == case.steps // 2:
            probe.end_epoch()
    record = probe.record()
    found = {
        "mean": record.mean,
        "m2": record.m2,
        "count": record.count,
        "groups": [record.group_mean, record.group_m2, record.group_count],
        "steps": record.steps,
    }
    history = optimizer.history.arrays() if case.options.get("history") else {}
    params = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    roles = optimizer._engine.roles
    return {
        "row": 8 * (roles.shared.size + roles.own[0].size) + 64,  # bytes of a task's message
        "found": found,
        "params": params,
        "calls": calls,
        "history": history,
        "buffers": int(net.calls),
        "frozen": frozen(
            [probe.state_dict(), {k: torch.tensor(v) for k, v in record.mean.items()}]
        ),
    }


def close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            close(one, other)
    else:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-7, atol=1e-11)


def same(pool: Any, seed: int, case: Case) -> list[dict[str, Any]]:
    """Every rank found the same to the bit, and what one process on the whole batch finds."""
    results = pool.run(train, pool.world_size, seed, case)
    for other in results[1:]:
        assert other["frozen"] == results[0]["frozen"]
        assert torch.equal(other["params"], results[0]["params"])
    alone = train(0, 1, seed, case)
    close(results[0]["found"], alone["found"])
    assert any(np.isfinite(m).any() for m in alone["found"]["mean"].values())
    torch.testing.assert_close(results[0]["params"], alone["params"], rtol=1e-7, atol=1e-10)
    return results


MOMENTUM = {"lr": 0.05, "momentum": 0.9}
GROUPS = {"groups": [(0, 1), (0, 1, 2)]}
CASES = {
    "exact": Case(GROUPS),
    "first_order": Case({"mode": "first_order"}, "MGDA"),
    "first_order momentum": Case(
        {"mode": "first_order", "momentum": True}, base_options=MOMENTUM, labels="tasks"
    ),
    "optimizer": Case({"look_ahead": "optimizer", **GROUPS}, base="Adam", base_options={"lr": 0.01}),
    "momentum": Case({"look_ahead": "optimizer"}, base_options=MOMENTUM, labels="tasks"),
    "every": Case({"every": 2, **GROUPS}, "MGDA", steps=5),
    "some labels": Case(GROUPS, labels="some", steps=5),
    "first_order, some labels": Case({"mode": "first_order"}, labels="some", steps=5),
    "missing tasks": Case(GROUPS, "MGDA", labels="tasks"),
    "uneven": Case(GROUPS, parts=(9, 3)),
    "a rank without data": Case(GROUPS, parts=(12, 0)),
    "scaler": Case({"look_ahead": "optimizer", **GROUPS}, base_options=MOMENTUM, scaled=True),
    "micro-batches": Case(GROUPS, "MGDA", batches=2),
    "weights_every": Case(GROUPS, "MGDA", options={"weights_every": 2}),
    "of losses": Case(GROUPS, "DBMTL"),
    "of losses, SAM": Case(GROUPS, "DWA", {}, SAM(0.05)),
    "one pass": Case(GROUPS, "UncertaintyWeighting", {"tasks": T}),
    "one pass, first_order": Case({"mode": "first_order"}, "GLS"),
    "one pass, some labels": Case(GROUPS, "DWA", labels="some", steps=5),
    "one pass, missing tasks": Case(GROUPS, "DWA", labels="tasks"),
    "one pass, uneven": Case({"every": 2}, "STCH", parts=(10, 2)),
    "one pass in between": Case({}, "DWA", {}, SAM(0.05, every=2)),
    "rows": Case({}, "GradDrop"),
    "SAM": Case(GROUPS, sharpness=SAM(0.05), labels="tasks"),
    "SAM second": Case({}, sharpness=SAM(0.05, aggregate="second")),
    "SAM each": Case({}, sharpness=SAM(0.05, aggregate="each")),
    "MAML": Case({}, sharpness=MAML(0.01, first_order=True)),
    "sharded rows": Case({"mode": "first_order"}, "MGDA", options={"shard_rows": True}, labels="tasks"),
    "sharded rows, SAM": Case(
        {"mode": "first_order"}, "MGDA", sharpness=SAM(0.05), options={"shard_rows": True}
    ),
    "m-sharpness": Case(GROUPS, sharpness=SAM(0.05), options={"sync_perturbation": False}, steps=1),
    "m-sharpness of MAML": Case(
        {}, sharpness=MAML(0.01, first_order=True), options={"sync_perturbation": False}, steps=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_measure_what_one_process_does(ranks, rng, name):
    case = CASES[name]
    seed = int(rng.integers(2**20))
    if name.startswith("m-sharpness"):  # the step is another one; what is measured before it is not
        results = ranks(2).run(train, 2, seed, case)
        assert results[0]["frozen"] == results[1]["frozen"]
        close(results[0]["found"], train(0, 1, seed, case)["found"])
    else:
        same(ranks(2), seed, case)


@pytest.mark.parametrize("name", ["exact", "some labels", "SAM", "one pass, missing tasks"])
def test_four_ranks(ranks, rng, name):
    same(ranks(4), int(rng.integers(2**20)), CASES[name])


def rows_of(step: list[tuple[str, int]]) -> list[int]:
    """The bytes of a step's messages; all are all_reduces."""
    assert {name for name, _ in step} <= {"all_reduce", "broadcast"}
    return [size for name, size in step if name == "all_reduce"]


@pytest.mark.parametrize("name, more", [
    ("exact", [1 + T + 2]), ("first_order", [1]), ("momentum", [1 + T + 1]), ("SAM", [1 + T + 2]),
    ("one pass", [1 + T + 2]), ("of losses", [1 + T + 2]),
])  # fmt: skip
def test_one_small_message_a_measured_step(ranks, rng, name, more):
    case = Case(**{**vars(CASES[name]), "labels": "all", "steps": 3})
    case.probe = {**case.probe, "every": 2}
    seed = int(rng.integers(2**20))
    for result in ranks(2).run(train, 2, seed, case):
        plain, measured = result["calls"][1], result["calls"][2]
        before, after = rows_of(plain), rows_of(measured)
        tables = [8 * (T * n + T + 1) for n in more]
        # the methods of one backward pass have no rows of the tasks but for the probe
        rows = [result["row"]] * T if name == "one pass" else []
        assert sorted(after) == sorted(before + rows + tables)
        assert len(measured) == len(plain) + len(rows) + 1
        assert len(before) == {"SAM": 2 * T, "one pass": 2, "of losses": T + 1}.get(name, T)


# What goes wrong on one rank.


@dataclass
class Trouble:
    """At a measured step: which call of the closure on which rank fails, and how."""

    call: int
    how: str = "raise"  # or "None": the second task's loss is not returned
    who: tuple[int, ...] = (1,)
    weighting: str = "PCGrad"
    sharpness: Any = None
    probes: Sequence[dict[str, Any]] = (GROUPS,)
    step: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "OSError"


def fails(rank: int, ranks: int, seed: int, trouble: Trouble | None) -> dict[str, Any]:
    """Three steps, the closure failing once; the step is made again after that."""
    torch.manual_seed(seed)
    net = Net().double()
    net.trunk.insert(1, nn.Dropout(0.2))
    model = DistributedDataParallel(net)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        weighting=getattr(weighting, "PCGrad" if trouble is None else trouble.weighting)(),
        sharpness=None if trouble is None else trouble.sharpness,
        model=model,
        **({} if trouble is None else trouble.options),
    )
    assert trouble is not None
    probes = [AffinityProbe(optimizer, **{"every": 1, **options}) for options in trouble.probes]
    errors, pictures = [], []
    for step in range(3):
        x, y, _ = (part.split(ROWS // ranks)[rank] for part in batch(seed, step, Case()))
        calls = 0
        failing = trouble.call if step == trouble.step and rank in trouble.who else -1

        def losses(x: Tensor = x, y: Tensor = y) -> list[Any]:
            nonlocal calls
            calls += 1
            out = model(x)
            if calls == failing and trouble.how == "raise":
                raise OSError(f"no data on rank {rank}")
            found: list[Any] = [((out[t] - y[:, t]) ** 2).mean() for t in range(T)]
            if calls == failing:
                found[1] = None
            return found

        def picture() -> Any:
            generator = torch.get_rng_state()
            found = [probe.state_dict() for probe in probes]
            for one in found:
                one.pop("tasks")  # known once a first step was begun
            base = optimizer.base_optimizer.state_dict()
            return frozen([dict(net.state_dict()), base, generator, found])

        before = picture()
        try:
            optimizer.step(losses)
        except Exception as error:
            errors.append((step, type(error).__name__, str(error)))
            pictures.append(before == picture())
            failing = -1
            optimizer.step(losses)
    return {
        "errors": errors,
        "unchanged": pictures,
        "frozen": frozen([probe.state_dict() for probe in probes]),
        "params": torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
        "measured": [probe.measured for probe in probes],
    }


# calls of a step: 1 the clean pass, then T + 2 looks ahead, then T perturbed passes
TROUBLES = {
    "first look": Trouble(2),
    "last look": Trouble(1 + T + 2),
    "at the first step": Trouble(3, step=0),
    "clean pass": Trouble(1),
    "None": Trouble(3, how="None", kind="ValueError"),
    "both": Trouble(3, who=(0, 1)),
    "SAM, look": Trouble(3, sharpness=SAM(0.05)),
    "SAM, perturbed": Trouble(1 + T + 2 + 2, sharpness=SAM(0.05)),
    "m-sharpness, perturbed": Trouble(3, sharpness=SAM(0.05), options={"sync_perturbation": False}),
    "m-sharpness, look": Trouble(
        1 + T + 3, sharpness=SAM(0.05), options={"sync_perturbation": False}
    ),
    "of losses": Trouble(3, weighting="DBMTL"),
    "sharded rows": Trouble(
        3,
        sharpness=SAM(0.05),
        probes=({"mode": "first_order"},),
        options={"shard_rows": True},
    ),
    "one pass, look": Trouble(3, weighting="DWA"),
    "one pass, first step": Trouble(3, weighting="DWA", step=0),
    "one pass, clean": Trouble(1, weighting="DWA"),
    "two probes, first": Trouble(3, probes=(GROUPS, {"look_ahead": "optimizer"})),
    "two probes, second": Trouble(
        1 + T + 2 + 3, probes=(GROUPS, {"look_ahead": "optimizer"}, {"mode": "first_order"})
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_closure_that_fails_on_one_rank_fails_on_all(ranks, rng, name):
    trouble = TROUBLES[name]
    seed = int(rng.integers(2**20))
    results = ranks(2).run(fails, 2, seed, trouble)
    for rank, result in enumerate(results):
        ((step, kind, text),) = result["errors"]
        assert step == trouble.step
        if rank in trouble.who:
            assert kind == trouble.kind
        else:
            assert kind == "RankFailedError"
            assert f"rank 1: {trouble.kind}: " in text
        if trouble.kind == "OSError":
            assert "no data on rank" in text
        else:
            assert "task(s) [1] when called again, got None" in text
        assert result["unchanged"] == [True]
        assert result["measured"] == [3] * len(trouble.probes)
        assert result["frozen"] == results[0]["frozen"]
        assert torch.equal(result["params"], results[0]["params"])


# The history.


HISTORY = {"options": {"history": 8}, "probe": {"mode": "first_order"}}
HISTORIES = {
    "gram": Case(**HISTORY, labels="tasks"),
    "SAM": Case(**HISTORY, weighting="MGDA", sharpness=SAM(0.05), labels="tasks"),
    "losses": Case(**HISTORY, weighting="DBMTL", labels="some"),
    "losses, SAM": Case(**HISTORY, weighting="DWA", sharpness=SAM(0.05)),
    "one pass": Case(**HISTORY, weighting="DWA", labels="some"),
    "in between": Case(
        **{**HISTORY, "options": {"history": 8, "weights_every": 2}},
        weighting="MGDA",
        labels="some",
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_what_of_a_history_is_the_same_on_all_ranks(ranks, rng, name):
    case = HISTORIES[name]
    seed = int(rng.integers(2**20))
    results = [result["history"] for result in ranks(2).run(train, 2, seed, case)]
    alone = train(0, 1, seed, case)["history"]
    own = {"sharpness"} | ({"losses"} if name in ("gram", "SAM", "in between") else set())
    for what, values in alone.items():
        first, second = (result[what] for result in results)
        if what not in own:
            np.testing.assert_array_equal(first, second, err_msg=what)
            np.testing.assert_allclose(first, values, rtol=1e-6, atol=1e-9, err_msg=what)
    if name == "in between":  # of steps with one backward pass
        for result in results:
            np.testing.assert_allclose(result["losses"][1::2], alone["losses"][1::2], rtol=1e-7)
    losses = np.stack([result["losses"] for result in results])
    if name == "gram":  # this rank's own: NaN where it lacks the task
        assert np.isnan(losses[0, :, 2]).all() and not np.isnan(losses[1, :, 2]).any()
        assert np.isnan(alone["norms"]).sum() == 1  # task 1 at step 1


# Ranks that differ, probes that come later, and resuming.


def differs(rank: int, seed: int, what: str) -> Any:
    torch.manual_seed(seed)
    net = Net().double()
    model = DistributedDataParallel(net)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = MultiTaskOptimizer(base, weighting=weighting.PCGrad(), model=model)
    x, y, _ = (part.split(ROWS // 2)[rank] for part in batch(seed, 0, Case()))

    def losses() -> list[Tensor]:
        out = model(x)
        return [((out[t] - y[:, t]) ** 2).mean() for t in range(T)]

    if what == "late":
        optimizer.step(losses)
    if not (what == "none" and rank):
        every = 2 + rank if what in ("every", "late") else 2
        probe = AffinityProbe(optimizer, every=every)
    if what == "state":
        state = probe.state_dict()
        state["last"] = -1 - rank
        probe.load_state_dict(state)
    try:
        optimizer.step(losses)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["every", "none", "late", "state"])
def test_probes_that_differ_between_ranks_are_an_error_on_all(ranks, rng, what):
    for text in ranks(2).run(differs, int(rng.integers(2**20)), what):
        assert text.startswith("probes must be the same on every rank, got ")


def resumes(rank: int, seed: int, stop: bool) -> Any:
    torch.manual_seed(seed)

    def made(state: Any = None) -> Any:
        net = Net().double()
        model = DistributedDataParallel(net)
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = MultiTaskOptimizer(base, weighting=weighting.MGDA(), model=model)
        probe = AffinityProbe(optimizer, every=2, look_ahead="optimizer", **GROUPS)
        if state is not None:
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            probe.load_state_dict(state[2])
        return model, optimizer, probe

    model, optimizer, probe = made()
    for step in range(5):
        if stop and step == 3:
            states = model.module.state_dict(), optimizer.state_dict(), probe.state_dict()
            model, optimizer, probe = made(states)
        x, y, there = (part.split(ROWS // 2)[rank] for part in batch(seed, step, CASES["SAM"]))

        def losses(x: Tensor = x, y: Tensor = y, there: Tensor = there) -> list[Any]:
            out, wrong = model(x), []
            for t in range(T):
                rows = there[:, t]
                wrong.append(((out[t] - y[:, t]) ** 2)[rows].mean() if rows.any() else None)
            return wrong

        optimizer.step(losses)
    return frozen([probe.state_dict(), dict(model.module.state_dict())])


def test_a_resumed_run_measures_on_to_the_bit(ranks, rng):
    seed = int(rng.integers(2**20))
    whole, stopped = ranks(2).run(resumes, seed, False), ranks(2).run(resumes, seed, True)
    assert whole == stopped
    assert whole[0] == whole[1]


# A probe in a loop.


@dataclass
class Loop:
    probe: dict[str, Any] = field(default_factory=dict)
    base_options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05})
    named: bool = False
    scaled: bool = False
    trained: bool = True  # False: the steps are not made: only measured
    labels: str = "all"
    parts: Sequence[int] = ()
    steps: int = 4
    fail: int = -1  # the call of the closure that fails on rank 1, at step 1


def loop(rank: int, ranks: int, seed: int, case: Loop) -> dict[str, Any]:
    torch.manual_seed(seed % 2**31)
    net = Net().double()
    model = DistributedDataParallel(net, find_unused_parameters=True) if ranks > 1 else net
    optimizer = torch.optim.SGD(model.parameters(), **case.base_options)
    shared = list(net.trunk.parameters()) if case.named else None
    probe = AffinityProbe(optimizer, model=model, shared=shared, **{"every": 1, **case.probe})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaled else None
    cuts = list(case.parts or [ROWS // ranks] * ranks)
    calls, errors, unchanged = [], [], []
    for step in range(case.steps):
        whole = batch(seed, step, Case(labels=case.labels))
        x, y, there = (part.split(cuts)[rank] if ranks > 1 else part for part in whole)
        count, failing = 0, case.fail if (step, rank) == (1, 1) else -1

        def losses(x: Tensor = x, y: Tensor = y, there: Tensor = there) -> dict[str, Any]:
            nonlocal count
            count += 1
            out, found = model(x), {}
            if count == failing:
                raise OSError("no data")
            for t in range(T):
                wrong = ((out[t] - y[:, t]) ** 2).mean(1)[there[:, t]]
                found[f"task {t}"] = wrong.mean() if len(wrong) else None
            return found

        samples = {f"task {t}": max(1, int(n)) for t, n in enumerate(there.sum(0))}
        before = frozen([dict(net.state_dict()), torch.get_rng_state()])
        with counted() as seen:
            try:
                found = probe(losses, samples=samples, scaler=scaler)
            except Exception as error:
                errors.append((type(error).__name__, str(error)))
                unchanged.append(before == frozen([dict(net.state_dict()), torch.get_rng_state()]))
                failing = -1
                found = probe(losses, samples=samples, scaler=scaler)
        calls.append(seen)
        if case.trained:
            optimizer.zero_grad()
            total = sum(found.values())
            (total if scaler is None else scaler.scale(total)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    record = probe.record()
    return {
        "found": [record.mean, record.m2, record.count, record.group_mean],
        "frozen": frozen([probe.state_dict(), dict(net.named_parameters())]),
        "calls": calls,
        "errors": errors,
        "unchanged": unchanged,
    }


NAMED_GROUPS = {"groups": [("task 0", "task 1"), ("task 0", "task 1", "task 2")]}
LOOPS = {
    "exact": Loop(NAMED_GROUPS),
    "first_order": Loop({"mode": "first_order"}),
    "optimizer": Loop({"look_ahead": "optimizer", "every": 2}, MOMENTUM, named=True),
    "scaler": Loop(NAMED_GROUPS, scaled=True),
    "missing tasks": Loop(NAMED_GROUPS, labels="tasks", trained=False),
    "some labels": Loop(NAMED_GROUPS, labels="some", trained=False),
    "named, missing tasks": Loop(NAMED_GROUPS, labels="tasks", trained=False, named=True),
    "a rank without data": Loop(NAMED_GROUPS, parts=(0, 12), trained=False),
    "uneven": Loop({"mode": "first_order"}, parts=(9, 3), trained=False),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_ranks(ranks, rng, name):
    case, seed = LOOPS[name], int(rng.integers(2**20))
    first, second = ranks(2).run(loop, 2, seed, case)
    alone = loop(0, 1, seed, case)
    assert first["frozen"] == second["frozen"]
    close(first["found"], alone["found"])
    assert np.isfinite(alone["found"][0]["affinity"]).any()
    # all is known by the fourth step: rows, the losses; and what the loop itself sends
    sums = [size for kind, size in first["calls"][3] if kind != "broadcast"]
    assert len(sums) == (0 if name == "optimizer" else T + 1)
    if sums:
        columns = 1 if "mode" in case.probe else 1 + T + 2
        assert sums[-1] == 8 * (T * columns + T + 1)


@pytest.mark.parametrize("fail", [1, 2, 1 + T + 2])
def test_a_closure_that_fails_in_a_loop_fails_on_all_ranks(ranks, rng, fail):
    seed = int(rng.integers(2**20))
    first, second = ranks(2).run(loop, 2, seed, Loop(NAMED_GROUPS, fail=fail))
    assert second["errors"] == [("OSError", "no data")]
    ((kind, text),) = first["errors"]
    assert kind == "RankFailedError" and "rank 1: OSError: no data" in text
    assert first["unchanged"] == second["unchanged"] == [True]
    assert first["frozen"] == second["frozen"]
    close(first["found"], loop(0, 1, seed, Loop(NAMED_GROUPS))["found"])


def loops_that_differ(rank: int, what: str) -> str:
    net = Net().double()
    every = 2 + rank if what == "probes" else 1
    probe = AffinityProbe(
        torch.optim.SGD(net.parameters(), lr=0.1), every=every,
        process_group=None if what == "alone" else torch.distributed.group.WORLD,
    )  # fmt: skip

    def losses() -> dict[str, Tensor]:
        names = (
            ["a", "b", "c"] if what != "the losses' tasks and their order" or not rank else "bac"
        )
        return {
            name: out.square().mean() for name, out in zip(names, net(torch.ones(2, 6).double()))
        }

    try:
        probe(losses)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["probes", "the losses' tasks and their order"])
def test_loops_that_differ_are_an_error_on_all_ranks(ranks, what):
    for text in ranks(2).run(loops_that_differ, what):
        assert text.startswith(f"{what} must be the same on every rank")


def test_a_probe_that_measures_alone(ranks):
    assert ranks(2).run(loops_that_differ, "alone") == ["no error"] * 2


@pytest.mark.parametrize("probe", [{}, {"mode": "first_order", "momentum": True}])
def test_whole_rows_are_needed(probe):
    base = torch.optim.SGD(Net().parameters(), lr=0.1, momentum=0.9)
    optimizer = MultiTaskOptimizer(base, weighting=weighting.PCGrad(), shard_rows=True)
    with pytest.raises(ValueError, match="optimizer must keep whole rows"):
        AffinityProbe(optimizer, **probe)


def test_the_group_must_be_known(ranks):
    with pytest.raises(RankError, match="process_group must be given where several processes run"):
        ranks(2).run(unknown_group)
    net = Net()
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), weighting=weighting.PCGrad()
    )
    with pytest.raises(ValueError, match="process_group must not be given with a MultiTask"):
        AffinityProbe(optimizer, process_group=None)


def unknown_group(rank: int) -> None:
    AffinityProbe(torch.optim.SGD(Net().parameters(), lr=0.1))
