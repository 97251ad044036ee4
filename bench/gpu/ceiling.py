"""What the memory gives: bytes per second of a large copy, and of reading alone."""

from __future__ import annotations

import torch

from bench.contests import Call
from bench.gpu.bench import Bench


def ceiling(bench: Bench, *, brief: bool = False) -> dict[str, float]:
    """Bytes per second read and written by ``copy_``, and read by the faster of ``sum`` and ``amax``.

    The best of two sizes; ``brief``: of one, for a part that wants it beside its own numbers.
    """
    large = bench.device == "cuda" and not bench.quick
    sizes = [4 << 30] if brief else [1 << 30, 4 << 30]
    copies, reads = [], []
    for size in sizes if large else [16 << 20]:
        source = torch.ones(size // 4, device=bench.device)
        target = torch.empty_like(source)
        copies.append(2 * size / bench.seconds(lambda s=source, t=target: t.copy_(s), 11))
        ways: list[Call] = [source.sum, source.amax]
        reads += [size / bench.seconds(way, 11) for way in ways]
        del source, target, ways
        bench.release()
    return {"copy": max(copies), "read": max(reads)}


def run(bench: Bench) -> None:
    """The part: the ceilings, and a write of zeros for comparison."""
    found = ceiling(bench)
    bench.part.note(ceiling=found)
    size = (4 << 30) if bench.device == "cuda" and not bench.quick else (16 << 20)
    zeros = torch.empty(size // 4, device=bench.device)
    found["write"] = size / bench.seconds(zeros.zero_, 11)
    bench.say(", ".join(f"{name} {value / 1e9:.0f} GB/s" for name, value in found.items()))
