"""What measuring affinity adds to a step: ``python -m bench.affinity`` prints two tables.

The probe's own calls are timed inside the steps that make them, so that the noise of passes does not count.
Shares and bandwidths are medians over the measured steps; ``copy`` is torch's copy of P elements, same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

import flatmtl
from bench.networks import NETWORKS, Data
from bench.own_time import marked
from flatmtl.affinity.meter import Meter
from flatmtl.block import Block


class Clock:
    """Adds up the seconds of the methods that it wraps, by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, **methods: tuple[type, str]) -> Iterator[None]:
        with ExitStack() as patches:
            for label, (cls, name) in methods.items():
                timed = marked(getattr(cls, name), label, self._around)
                patches.enter_context(mock.patch.object(cls, name, timed))
            yield

    @contextmanager
    def _around(self, label: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[label] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        found = dict(self._seconds)
        self._seconds.clear()
        return found


def optimizer_of(data: Data) -> flatmtl.MultiTaskOptimizer:
    network = data[0]
    base = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    return flatmtl.MultiTaskOptimizer(base, weighting=flatmtl.weighting.PCGrad(), model=network)


def first_order(name: str, rounds: int) -> dict[str, float]:
    """Seconds of a step, and of the probe's part, every step being measured."""
    torch.manual_seed(0)
    network, x, y = data = NETWORKS[name]()
    optimizer = optimizer_of(data)
    flatmtl.AffinityProbe(optimizer, mode="first_order", every=1)
    clock, whole, own = Clock(), [], []
    parts = {n: (Meter, n) for n in ("at_rows", "at_gram", "made")}
    with clock.on(**parts):
        for lap in range(rounds + 3):
            begin = time.perf_counter()
            optimizer.step(lambda: network.losses(x, y))
            seconds = time.perf_counter() - begin
            probe = sum(clock.take().values())
            if lap >= 3:
                whole.append(seconds - probe)
                own.append(probe)
    return {"step": statistics.median(whole), "probe": statistics.median(own)}


def exact(name: str, rounds: int) -> dict[str, float]:
    """Seconds of a step, of what the probe adds, of the passes in that, and of one look-ahead step."""
    torch.manual_seed(0)
    network, x, y = data = NETWORKS[name]()
    optimizer = optimizer_of(data)
    flatmtl.AffinityProbe(optimizer, every=1)
    clock: Clock = Clock()
    laps: list[dict[str, float]] = []
    forwards: list[float] = []

    def losses() -> list[torch.Tensor]:
        begin = time.perf_counter()
        found = network.losses(x, y)
        if not torch.is_grad_enabled():
            forwards.append(time.perf_counter() - begin)
        return found

    parts = {
        "all": (Meter, "at_rows"), "shift": (Block, "shift"),
        "save": (Block, "copy_to"), "restore": (Block, "put_back"), "made": (Meter, "made"),
    }  # fmt: skip
    counts = []
    with clock.on(**parts):
        for lap in range(rounds + 3):
            forwards.clear()
            begin = time.perf_counter()
            optimizer.step(losses)
            seconds = time.perf_counter() - begin
            taken = clock.take()
            if lap >= 3:
                laps.append({**taken, "step": seconds - taken["all"], "forward": sum(forwards)})
                counts.append(len(forwards))
    size = sum(p.numel() for p in network.trunk.parameters())
    found = {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}
    source, target = torch.randn(size), torch.empty(size)
    copies = []
    for _ in range(20):
        begin = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - begin)
    found["copy_rate"] = 8e-9 * size / statistics.median(copies)
    found["shift_rate"] = 12e-9 * size * len(y) / found["shift"]
    found["forwards"] = max(counts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    sizes = {name: make() for name, make in NETWORKS.items()}
    print("| network | T | shared parameters | step, ms | first-order probe, ms | share |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (network, _, y) in sizes.items():
        laps = max(5, rounds // 5) if name == "resnet18" else rounds
        found = first_order(name, laps)
        size = sum(p.numel() for p in network.trunk.parameters()) / 1e6
        print(
            f"| {name} | {len(y)} | {size:.2f} M | {1e3 * found['step']:.2f} | "
            f"{1e3 * found['probe']:.3f} | {100 * found['probe'] / found['step']:.2f} % |"
        )
    print()
    print(
        "| network | step, ms | exact adds, ms | in T forwards, ms (number) | in look-ahead kernels, ms | "
        "other, ms | look-ahead, GB/s | copy, GB/s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in sizes:
        laps = max(5, rounds // 5) if name == "resnet18" else rounds
        found = exact(name, laps)
        kernels = found["shift"] + found["save"] + found["restore"]
        added = found["all"] + found["made"]
        print(
            f"| {name} | {1e3 * found['step']:.2f} | {1e3 * added:.2f} | {1e3 * found['forward']:.2f} "
            f"({found['forwards']:.0f}) | {1e3 * kernels:.2f} | "
            f"{1e3 * (added - found['forward'] - kernels):.2f} | {found['shift_rate']:.1f} | "
            f"{found['copy_rate']:.1f} |"
        )


if __name__ == "__main__":
    main()
