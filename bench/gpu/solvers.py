"""Every weighting on a Gram matrix: device time, wall time, as a graph replay; TorchJD beside it."""

from __future__ import annotations

import torch

from bench import peers, race
from bench import solvers as methods
from bench.cases import gram_with_conflict
from bench.contests import Call, Contest
from bench.gpu import sizes
from bench.gpu.bench import Bench, captured, message

CALLS = 20  # in one graph, for the time of a call among others


def run(bench: Bench) -> None:
    """The part."""
    for t in sizes.QUICK_TASKS if bench.quick else sizes.SOLVER_TASKS:
        for name in methods.METHODS:
            if bench.left < 1:
                bench.part.missing.append(f"{name}, T={t}")
            elif t >= methods.least_tasks(name):
                _method(bench, name, t)
        bench.say(f"solvers, T = {t}")
        bench.part.save()


def _method(bench: Bench, name: str, t: int) -> None:
    gram = gram_with_conflict(t, torch.Generator().manual_seed(t)).to(bench.device)
    weighting = methods.ours(name, t)

    def ours() -> object:
        return weighting(gram)

    record = bench.measure(Contest(name, 0, ours, {}), kind="solver", tasks=t)
    if "error" in record:
        return
    record["wall_s"] = bench.wall(ours)
    torchjd = peers.torchjd_weighting(name)
    if torchjd is not None and t == sizes.MAIN_TASKS:
        theirs = gram.float()
        try:
            record["wall_s_torchjd"] = bench.wall(lambda: torchjd(theirs), calls=3)
        except Exception as error:
            record["failed_rivals"] = {"TorchJD": message(error)}
    if bench.device == "cuda":
        try:
            record["graph_s"] = _replayed(bench, name, captured(ours))
            record["graph_each_s"] = _replayed(bench, name, captured(ours, CALLS)) / CALLS
        except RuntimeError as error:
            record["graph_error"] = message(error)


def _replayed(bench: Bench, name: str, replay: Call) -> float:
    contest = Contest(name, 0, replay, {})
    found = race.run(contest, bench.clock, seconds=bench.turn, least=5, most=50)
    return found["median_s"][race.OURS]
