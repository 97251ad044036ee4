"""Solvers, G -> w: the entrants, what a slow rival takes, and how good everyone's weights are.

All on one core (``test_solvers.one_core``): nothing here is worth a second one, and waiting for it costs.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flatmtl
from bench import peers, quality
from bench.cases import gram_with_conflict
from bench.contests import Call, Contest
from bench.race import wall_clock

#: Every method, by its name in ``flatmtl.weighting.by_name``.
METHODS = (
    "mean", "sum", "constant", "rlw", "pcgrad", "gradvac", "mgda", "cagrad", "nash_mtl", "fairgrad", "pivrg",
    "imtl_g", "config", "aligned_mtl", "upgrad", "dualproj", "pcd", "krum", "sdmgrad", "modo", "cr_mogm",
)  # fmt: skip

# Seconds a call, from where a rival is timed outside the rounds: its turn would take long.
SLOW = 1e-3
CYCLE = 16  # problems in turn, where one is solved a call
BATCH = 64  # problems in one call, for the time of the solver without the call
OP = "the operator alone"

# How many random problems are judged: ours by T (in one batched call), a rival's at most.
PROBLEMS = {2: 1000, 4: 1000, 8: 1000, 16: 250, 40: 100}
RIVALS_PROBLEMS = 100

SMALL = 1e-3  # what gradients are multiplied with where small ones are judged
SMALL_METHODS = (
    "mgda",
    "cagrad",
    "nash_mtl",
    "fairgrad",
    "imtl_g",
    "aligned_mtl",
    "upgrad",
    "dualproj",
)


def least_tasks(name: str) -> int:
    """The fewest tasks that a method takes."""
    return peers.KRUM_BYZANTINE + 3 if name == "krum" else 1


def ours(name: str, tasks: int) -> flatmtl.weighting.Weighting:
    """flatmtl's weighting, with the same settings as the rivals', raw."""
    options: dict[str, dict[str, Any]] = {
        "constant": {"weights": [1.0] * tasks},
        "cagrad": {"c": peers.CAGRAD_C},
        "nash_mtl": {"max_norm": None},
        "fairgrad": {"alpha": peers.FAIRGRAD_ALPHA},
        "krum": {"byzantine": peers.KRUM_BYZANTINE},
    }
    if name == "cr_mogm":
        return flatmtl.weighting.by_name(name, weighting=flatmtl.weighting.by_name("upgrad"))
    return flatmtl.weighting.by_name(name, **options.get(name, {}))


def operator(name: str, shape: torch.Size) -> Callable[[Tensor], object] | None:
    """The C++ operator of a method, its other arguments ready; None for one that has none of its own."""
    *batch, tasks, _ = shape
    op, ridge = torch.ops.flatmtl, 1e-10

    def state(*sizes: int) -> Tensor:
        return torch.zeros(*batch, *sizes, dtype=torch.float64)

    ones, uniform = torch.ones(tasks, dtype=torch.float64), state(tasks) + 1 / tasks
    rng = torch.tensor([7, 0])
    target, last, average = state(tasks, tasks), state(tasks + 1), state(tasks + 1)
    calls: dict[str, Callable[[Tensor], object]] = {
        "mean": lambda g: op.solve_constant.default(g, None, 1 / tasks),
        "sum": lambda g: op.solve_constant.default(g, None, 1.0),
        "constant": lambda g: op.solve_constant.default(g, ones, 1.0),
        "rlw": lambda g: op.solve_random_.default(g, rng),
        "pcgrad": lambda g: op.solve_pcgrad_drawn_.default(g, rng),
        "gradvac": lambda g: op.solve_gradvac_drawn_.default(g, rng, target, 0.01, 1e-8),
        "mgda": lambda g: op.solve_mgda.default(g, ridge),
        "cagrad": lambda g: op.solve_cagrad.default(g, peers.CAGRAD_C, 0, ridge),
        "nash_mtl": lambda g: op.solve_nash_.default(g, last, 1, 0.0, ridge),
        "fairgrad": lambda g: op.solve_alpha_fair.default(g, peers.FAIRGRAD_ALPHA, None, ridge),
        "pivrg": lambda g: op.solve_alpha_fair.default(g, 2.0, ones, ridge),
        "imtl_g": lambda g: op.solve_imtl_g.default(g, ridge),
        "config": lambda g: op.solve_config.default(g, None, ridge),
        "aligned_mtl": lambda g: op.solve_aligned.default(g, None, 0, 2.0**-23),
        "upgrad": lambda g: op.solve_dual_cone.default(g, None, True, ridge),
        "dualproj": lambda g: op.solve_dual_cone.default(g, None, False, ridge),
        "pcd": lambda g: op.solve_pcd_.default(g, average, 0.02, 0.999, 1e-8, ridge),
        "krum": lambda g: op.solve_krum.default(g, peers.KRUM_BYZANTINE, 1),
        "sdmgrad": lambda g: op.solve_sdmgrad_.default(g, uniform, None, 10.0, 0.5, 20, 0.3),
        "modo": lambda g: op.solve_modo_.default(g, uniform, 0.1, 0.1),
    }
    return calls.get(name)


@functools.cache
def problems(tasks: int) -> list[Tensor]:
    """Random Gram matrices, float64."""
    generator = torch.Generator().manual_seed(tasks)
    return [gram_with_conflict(tasks, generator) for _ in range(PROBLEMS[tasks])]


def cycled(items: Iterable[Any]) -> Callable[[], Any]:
    """Gives one after the other, round and round."""
    endless = itertools.cycle(list(items))
    return lambda: next(endless)


# ---------------------------------------------------------------- time


def contest(name: str, tasks: int) -> tuple[Contest, dict[str, Call]]:
    """The contest of one method, and the rivals that are too slow to take part in its rounds."""
    grams = problems(tasks)[:CYCLE]
    weighting, turn = ours(name, tasks), cycled(grams)
    others: dict[str, Call] = {}
    alone = operator(name, grams[0].shape)
    if alone is not None:
        others[OP] = lambda: alone(turn())
    if name == "pcgrad":
        others["plain torch"] = lambda: peers.pcgrad_weights(turn())
    for rival, solver in peers.solvers(name).items():
        others[rival] = _rival_call(solver, grams)
    slow = {rival: call for rival, call in others.items() if seconds(call, 0.0, least=1) > SLOW}
    fast = {rival: call for rival, call in others.items() if rival not in slow}
    return Contest(name, 0, lambda: weighting(turn()), fast, calls=10), slow


def _rival_call(solver: peers.Solver, grams: list[Tensor]) -> Call:
    solve, turn = solver.make(len(grams[0])), cycled(solver.inputs(gram) for gram in grams)
    return lambda: solve(turn())


def seconds(call: Call, limit: float, least: int = 3) -> float:
    """The median time of a call, after one to warm up; about ``limit`` seconds are spent on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's, about its own speed
        call()
        begin, laps = time.perf_counter(), []
        while len(laps) < least or (time.perf_counter() - begin < limit and len(laps) < 100):
            laps.append(wall_clock(call))
    return statistics.median(laps)


def solver_alone(name: str, tasks: int, limit: float) -> float | None:
    """Seconds that one problem takes inside a batched call: nearly no call is left in it."""
    batch = torch.stack(problems(tasks)[:BATCH])
    alone = operator(name, batch.shape)
    if alone is None:
        return None
    return seconds(lambda: alone(batch), limit) / BATCH


# ---------------------------------------------------------------- quality


def study(
    name: str, tasks: int, *, limit: float, most: int = 1000, norms: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Judges everyone's weights on random problems (bench/quality.py).

    A rival starts anew at every problem, and stops once it has taken ``limit`` seconds. The gradients'
    norms are multiplied by ``norms``; there are ``most`` problems at most.

    Returns:
        "flatmtl" and the rivals' names -> "n" problems, "median" and "worst" residual (None: infinite or
        not a number), "failed" of n. flatmtl's also has "certificate", the largest residual that the
        solver itself reports, and "flagged", how many problems have a status other than 0. Empty for a
        method that has no measure.
    """
    if name not in quality.MEANING:
        return {}
    grams = [norms**2 * gram for gram in problems(tasks)[:most]]
    judges = [quality.judge(name, gram.numpy()) for gram in grams]
    weighting = ours(name, tasks)
    weights = weighting(torch.stack(grams)).numpy()
    status = weighting.last_status()
    found = {"flatmtl": _summary(judge(w) for judge, w in zip(judges, weights, strict=True))}
    found["flatmtl"]["flagged"] = int((status.bits != 0).sum())
    if status.residual is not None:
        found["flatmtl"]["certificate"] = float(status.residual.max())
    few = list(zip(grams, judges, strict=True))[:RIVALS_PROBLEMS]
    for rival, solver in peers.solvers(name).items():
        found[rival] = _summary(_rivals_residuals(solver, few, limit))
    return found


def _rivals_residuals(
    solver: peers.Solver, cases: list[tuple[Tensor, quality.Judge]], limit: float
) -> list[float]:
    begin, residuals = time.perf_counter(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gram, judge in cases:
            taken = solver.inputs(gram)
            result = solver.make(len(gram))(taken)
            residuals.append(judge(solver.weights(result, taken)))
            if time.perf_counter() - begin > limit:
                break
    return residuals


def _summary(residuals: Iterable[float]) -> dict[str, Any]:
    values = np.array(list(residuals))

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {
        "n": len(values),
        "median": number(np.median(values)),
        "worst": number(values.max()),
        "failed": int((values > quality.FAILED).sum()),
    }
