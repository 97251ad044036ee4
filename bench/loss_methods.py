"""What the methods of losses cost: ``python -m bench.loss_methods`` prints a table.

A call alone, from losses to weights, as an optimizer makes it, without the model's passes. ``update`` is
FAMO's second half, without its second forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flatmtl import weighting
from flatmtl.weighting import Weighting

TASKS = (2, 8, 64)
WARM = 200  # calls before the clock starts: periods and warm-ups are over


def methods(tasks: int) -> dict[str, Weighting]:
    return {
        "slaw": weighting.SLAW(),
        "famo": weighting.FAMO(),
        "uw": weighting.UncertaintyWeighting(tasks),
        "imtl_l": weighting.IMTLL(tasks),
        "dwa": weighting.DWA(),
        "dwa, steps=10": weighting.DWA(steps=10),
        "gls": weighting.GLS(),
        "si": weighting.ScaleInvariant(),
        "bmtl": weighting.BMTL(),
        "stch": weighting.STCH(),
        "stch, warmup=100": weighting.STCH(warmup=100),
        "go4align, groups=2": weighting.GO4Align(2),
        "rlw": weighting.RandomLossWeighting(),
    }


def seconds(call: Callable[[Tensor], object], tasks: int, rounds: int) -> list[float]:
    """Of each call, on fresh losses."""
    taken = []
    for lap in range(rounds + WARM):
        losses = torch.rand(tasks, dtype=torch.float64) + 0.5
        begin = time.perf_counter()
        call(losses)
        if lap >= WARM:
            taken.append(time.perf_counter() - begin)
    return taken


def measured(tasks: int, rounds: int) -> dict[str, list[float]]:
    """Of every method, and of FAMO's update."""
    found = {}
    for name, method in methods(tasks).items():
        found[name] = seconds(
            lambda losses, m=method: m._at_step(None, losses, None), tasks, rounds
        )
        if isinstance(method, weighting.FAMO):
            found["famo, update"] = seconds(method.update, tasks, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    columns = [measured(tasks, rounds) for tasks in TASKS]
    print("microseconds a call, median (fastest twentieth)\n")
    print("| method | " + " | ".join(f"T = {tasks}" for tasks in TASKS) + " |")
    print("|:---|" + "---:|" * len(TASKS))
    for name in columns[0]:
        cells = []
        for column in columns:
            taken = sorted(column[name])
            fast = taken[len(taken) // 20]
            cells.append(f"{1e6 * statistics.median(taken):.0f} ({1e6 * fast:.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
