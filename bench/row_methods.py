"""GradDrop and its like on T x P rows: ``python -m bench.row_methods`` prints two tables.

``graddrop_`` beside the formula in plain torch, one uniform number a column drawn by torch, and beside
``combine``, which moves the same bytes; what the methods cost a step. The shortest of rounds in which all
take turns; ``copy`` is torch's copy of the rows, in the same rounds: its bytes are 2 T P elements, those of
the others what the operator must move, T P + P.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.race import wall_clock
from flatmtl import ops
from flatmtl.weighting import DBMTL, ExcessMTL, GradDrop, MoCo, TrimmedMean
from flatmtl.weighting._rows import RowMethod

ROUNDS = 30


def in_torch(jac: Tensor) -> Tensor:
    """GradDrop as its papers' readers write it; without an eps."""
    total, size = jac.sum(0), jac.abs().sum(0)
    purity = 0.5 * (1 + torch.where(size > 0, total / size, 0.0))
    drawn = torch.rand_like(purity)
    kept = ((purity > drawn) & (jac > 0)) | ((purity < drawn) & (jac < 0))
    return (jac * kept).sum(0)


def stepped(method: RowMethod, jac: Tensor, out: Tensor, losses: Tensor) -> Callable[[], None]:
    """A step with the method."""

    def step() -> None:
        method.aggregate(jac, out, losses=losses)
        method._made(None)

    return step


def shortest(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of the shortest call of each, after a round that does not count."""
    times = dict.fromkeys(calls, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            if name == "torch" and turn > 2:
                continue  # seconds a call
            seconds = wall_clock(call)
            if turn:
                times[name] = min(times[name], 1e3 * seconds)
    return times


def operator(jac: Tensor) -> dict[str, float]:
    """Milliseconds of the operator and of what it stands beside."""
    tasks, size = jac.shape
    out, other = jac.new_empty(size), torch.empty_like(jac)
    weights, rng = torch.ones(tasks, dtype=torch.float64), torch.tensor([1, 0])
    leak = torch.full((tasks,), 0.1, dtype=torch.float64)
    return shortest(
        {
            "copy": lambda: other.copy_(jac),
            "combine": lambda: ops.combine(jac, weights, out),
            "graddrop_": lambda: ops.graddrop_(jac, rng, out=out),
            "leak": lambda: ops.graddrop_(jac, rng, leak=leak, out=out),
            "torch": lambda: in_torch(jac),
        }
    )


def operator_line(tasks: int, size: int, dtype: torch.dtype) -> None:
    """One line of the operator's table."""
    found = operator(torch.randn(tasks, size).to(dtype))
    share = (tasks + 1) / found["graddrop_"] / (2 * tasks / found["copy"])
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    cells = " | ".join(f"{found[k]:.1f}" for k in found)
    print(f"| {name} | {size:.0e} | {threads} | {cells} | {share:.0%} |", flush=True)


def methods(tasks: int, size: int) -> None:
    """One line a method."""
    jac, losses = torch.randn(tasks, size), torch.rand(tasks, dtype=torch.float64) + 0.1
    out, other = torch.empty(size), torch.empty_like(jac)
    made = [GradDrop(), TrimmedMean(trim=1), MoCo(), DBMTL(), ExcessMTL()]
    calls: dict[str, Callable[[], object]] = {"copy": lambda: other.copy_(jac)}
    calls |= {type(m).__name__: stepped(m, jac, out, losses) for m in made}
    found = shortest(calls)
    for name, time in found.items():
        print(
            f"| {name} | {size:.0e} | {torch.get_num_threads()} | {time:.1f} | {time / found['copy']:.1f} |"
        )


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7])
    given = parser.parse_args()
    print(
        "| rows | P | threads | copy, ms | combine | graddrop_ | with a leak | torch | bandwidth of copy's |"
    )
    print("|:---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for threads in given.threads:
        torch.set_num_threads(threads)
        for size in given.sizes:
            for dtype in (torch.float32, torch.bfloat16):
                operator_line(given.tasks, int(size), dtype)
    print("\n| method | P | threads | ms | copies of the rows |\n|:---|---:|---:|---:|---:|")
    for threads in given.threads:
        torch.set_num_threads(threads)
        methods(given.tasks, int(given.sizes[0]))


if __name__ == "__main__":
    main()
