"""Seconds per step of every method on every network, all methods in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from bench.methods import data
from bench.methods.cells import DECOMPOSED, PLAIN, Cell, closure, make_optimizer
from bench.methods.nets import Network
from bench.methods.run import Job
from examples.many_networks import adam

ROUNDS, WARM_UP = 31, 3
SAME = {"fashion_mnist": "multifashion"}  # networks and batches of one form


def time_steps(
    job: Job, methods: list[str], say: Callable[[str], None] = print
) -> dict[str, dict[str, dict[str, float]]]:
    """data set -> method -> "plain" or "sam" -> median seconds of CPU time of a step.

    On one thread that is the wall clock of a core of one's own, and what else runs disturbs it less. Every
    round takes one step of each method, so that a swing of the machine meets all alike.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, setting in job.settings.items():
        if name in SAME and SAME[name] in found:
            found[name] = found[SAME[name]]
            continue
        loaded = data.load(name, job.folder, setting, 0, job.out / "cache")
        x, y = loaded.train.x[: setting.batch], loaded.train.y[: setting.batch]
        steps = {}
        for method in methods:
            for sharpness in (PLAIN, DECOMPOSED):
                torch.manual_seed(0)
                model = Network(loaded, setting.width)
                base, _ = adam(model, setting.lr, setting.steps)
                cell = Cell(name, method, sharpness, 0)
                everyone = list(range(len(loaded.tasks)))
                optimizer = make_optimizer(model, base, cell, setting, len(everyone))
                steps[method, sharpness] = partial(
                    optimizer.step, partial(closure, model, x, y, everyone)
                )
        taken: dict[tuple[str, str], list[float]] = {which: [] for which in steps}
        for _ in range(WARM_UP + ROUNDS):
            for which, step in steps.items():
                begin = time.thread_time()
                step()
                taken[which].append(time.thread_time() - begin)
        found[name] = {}
        for (method, sharpness), seconds in taken.items():
            value = float(f"{median(seconds[WARM_UP:]):.4g}")
            found[name].setdefault(method, {})[sharpness] = value
        say(f"{name}: {len(steps)} kinds of step timed")
    return found
