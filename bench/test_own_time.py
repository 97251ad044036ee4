"""FS-MTL steps: what flatmtl itself takes of one, against plain torch's and research code's ways.

The entrants make one step in turn, round after round; that they make the same step, in the same passes,
is in tests/test_bench_fs_mtl.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import memory
from bench.fs_mtl_steps import FOREACH, LOOPS, OURS, Entrant
from bench.networks import NETWORKS, Data, resnet, resnet18
from bench.own_time import OUTSIDE, OwnTime, Split

ENTRANTS = (FOREACH, LOOPS, OURS)
ROUNDS = {"mlp": 50, "resnet": 30, "resnet18": 9}
QUICK_ROUNDS = 3


def network_of(model: str, quick: bool) -> Data:
    torch.manual_seed(0)
    return resnet18(batch=1) if quick and model == "resnet18" else NETWORKS[model]()


@pytest.mark.parametrize("model", NETWORKS)
def test_own_time(model: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    quick = request.config.getoption("--quick")
    network, x, y = network_of(model, quick)
    splits: dict[str, list[Split]] = {name: [] for name in ENTRANTS}

    def turn(name: str) -> Callable[[], None]:
        entrant = Entrant(name, network, x, y)
        meter = OwnTime(entrant.base, entrant.losses)
        return lambda: splits[name].append(meter.measure(entrant.step))

    turns = {name: turn(name) for name in ENTRANTS}
    for call in turns.values():  # makes buffers, warms up
        call()
        call()
    for laps in splits.values():
        laps.clear()

    def others() -> None:
        for name in (FOREACH, LOOPS):
            turns[name]()

    benchmark.group = "own time"
    rounds = QUICK_ROUNDS if quick else ROUNDS[model]
    benchmark.pedantic(turns[OURS], setup=others, rounds=rounds, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info.update(
        {
            "kind": "own time", "model": model, "tasks": len(y), "batch": len(x),
            "columns": sum(p.numel() for p in network.trunk.parameters()), **summary(splits),
        }
    )  # fmt: skip


def summary(splits: dict[str, list[Split]]) -> dict[str, Any]:
    """Medians over the rounds.

    Returns:
        "rounds"; for every entrant by name: "own_s", "total_s", "forward_s", "backward_s", "update_s",
        "share" (own over total in the same step) and, for the others, "factor" (its own time over ours
        in the same round).
    """
    result: dict[str, Any] = {"rounds": len(splits[OURS])}
    for name, laps in splits.items():
        entry = {
            "own_s": statistics.median(s.own for s in laps),
            "total_s": statistics.median(s.total for s in laps),
            "share": statistics.median(s.own / s.total for s in laps),
            **{f"{part}_s": statistics.median(s.seconds[part] for s in laps) for part in OUTSIDE},
        }
        if name != OURS:
            pairs = zip(laps, splits[OURS], strict=True)
            entry["factor"] = statistics.median(theirs.own / ours.own for theirs, ours in pairs)
        result[name] = entry
    return result


@pytest.mark.parametrize("sharpness", [True, False], ids=["fs-mtl", "pcgrad"])
def test_memory(sharpness: bool, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Nothing is timed; the footprints go the way of all results."""
    torch.manual_seed(0)
    quick = request.config.getoption("--quick")
    network, x, y = resnet() if quick else resnet18(batch=2)
    rho = 0.05 if sharpness else None
    found: dict[str, list[memory.Footprint]] = {}

    def look() -> None:
        for name in ENTRANTS:
            found[name] = memory.footprints(lambda name=name: Entrant(name, network, x, y, rho=rho))

    benchmark.group = "memory"
    benchmark.pedantic(look, rounds=1, iterations=1)
    if benchmark.stats is None:
        return
    unit = sum(p.numel() * p.element_size() for p in network.parameters())
    about = {"kind": "memory", "model": "resnet" if quick else "resnet18"}
    about |= {"tasks": len(y), "sharpness": sharpness}
    steps = {name: [asdict(f) for f in footprints] for name, footprints in found.items()}
    benchmark.extra_info.update({**about, "model_bytes": unit, "steps": steps})
