"""AffinityProbe where several processes train: what one process on the whole batch measures, on every rank."""

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

import flatmtl
from flatmtl import MAML, SAM, AffinityProbe, MultiTaskOptimizer, weighting

T, ROWS = 3, 12
SIZES = {"trunk": 6 * 7 + 7 + 7 * 5 + 5}


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
    labels: str = "all"  # "some": of random rows, "tasks": whole tasks missing on ranks, "none": a rank has no data
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
    return {
        "found": found,
        "params": params,
        "calls": calls,
        "history": history,
        "buffers": int(net.calls),
        "frozen": frozen([probe.state_dict(), {k: torch.tensor(v) for k, v in record.mean.items()}]),
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
