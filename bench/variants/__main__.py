"""The variants beside the shipped kernels and plain torch.

python -m bench.variants                  checks and measures all on a CUDA device, some minutes
python -m bench.variants --quick          small sizes
python -m bench.variants --device cpu     no GPU: checks them under the emulation, measures nothing

Median of CUDA-event timings, cold L2, in turns (bench/race.py). Prints a table last and writes
bench/results/variants-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import race
from bench.contests import Call, Contest
from bench.variants import check
from bench.variants.library import Library, build_cuda, build_emulated, gram_variants
from flatmtl import ops

GRAM_TASKS, UPDATE_TASKS = (9, 16, 32, 40, 64), (2, 3, 8, 40)
COLUMNS, QUICK_COLUMNS = 25_000_000, 1_000_000
SECONDS, QUICK_SECONDS = 0.3, 0.05  # of measuring a contest
DTYPES = (torch.float32, torch.bfloat16)
COPIED = 1 << 30  # bytes of the copy that stands for the ceiling
Record = dict[str, Any]


def gram_contest(library: Library, jac: Tensor) -> Contest:
    """The shipped operator, the variants, and J J^T of torch in the rows' type."""
    variants = gram_variants(len(jac), jac.dtype)
    others = {name: lambda v=name: library.gram(v, jac) for name in variants}
    others["J @ J.T"] = lambda: jac @ jac.T
    return Contest("gram", jac.numel() * jac.element_size(), lambda: ops.gram(jac), others)


def captured(call: Call) -> Call:
    """The call in a CUDA graph: torch's step takes the host longer than the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def update_contest(library: Library, jac: Tensor, name: str) -> Contest:
    """combine, then torch's fused optimizer, as flatmtl; beside it the variant, whose bytes are counted."""
    tasks, columns = jac.shape
    given = (check.SGD if name == "sgd" else check.ADAMW)[0]
    options: dict[str, Any] = dict(given)
    weights = torch.full((tasks,), 1 / tasks, dtype=torch.float64, device=jac.device)

    param = torch.nn.Parameter(torch.zeros(columns, device=jac.device))
    param.grad = torch.zeros_like(param)
    rule = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    if name == "adamw":
        options["capturable"] = True
    optimizer = rule([param], fused=True, **options)

    def two_kernels() -> None:
        ops.combine(jac, weights, param.grad)
        optimizer.step()

    fused = library.combine_sgd if name == "sgd" else library.combine_adamw
    held = torch.zeros(columns, device=jac.device)
    state = [torch.zeros_like(held) for _ in range(check.STATES[name])]
    factors = library.factors()
    others = {"one kernel": captured(lambda: fused(jac, weights, held, *state, factors, **given))}
    moved = jac.numel() * jac.element_size() + 2 * 4 * columns * (1 + len(state))
    return Contest(f"combine, {name}", moved, captured(two_kernels), others)


def contests(library: Library, columns: int) -> Iterator[tuple[int, torch.dtype, Contest]]:
    """(T, dtype, contest); a J at a time is held."""
    for dtype in DTYPES:
        for tasks in sorted({*GRAM_TASKS, *UPDATE_TASKS}):
            jac = torch.randn(tasks, columns, device="cuda", dtype=dtype)
            if tasks in GRAM_TASKS:
                yield tasks, dtype, gram_contest(library, jac)
            if tasks in UPDATE_TASKS:
                for name in ("sgd", "adamw"):
                    yield tasks, dtype, update_contest(library, jac, name)


def measure(library: Library, columns: int, seconds: float) -> list[Record]:
    """Every contest, with a copy of 1 GiB in turn with it as the ceiling."""
    clock = race.DeviceClock()
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    records = []
    for tasks, dtype, contest in contests(library, columns):
        contest.yardsticks["copy"] = (lambda: target.copy_(source), 2 * COPIED)
        about = {"name": contest.name, "tasks": tasks, "columns": columns}
        about["dtype"] = str(dtype).removeprefix("torch.")
        records.append(about | race.run(contest, clock, seconds=seconds))
        print(line(records[-1]), flush=True)
    return records


def line(record: Record) -> str:
    """One contest: the time of each, and its share of the copy's bandwidth."""
    ceiling = record["yardstick_gb_per_s"]["copy"]
    cells = [
        f"{name} {1e3 * time:.4f} ms ({record['bytes'] / time / 1e9 / ceiling:.0%})"
        for name, time in record["median_s"].items()
        if name != "copy"
    ]
    head = f"{record['name']:14}{record['dtype']:>9} T = {record['tasks']:<3}"
    return f"{head} {', '.join(cells)}; copy {ceiling:.0f} GB/s"


def check_all(library: Library, columns: int) -> bool:
    """Whether every variant is within its limit; prints each."""
    good = True
    for part in (check.gram_errors, check.update_errors):
        for what, error, limit in part(library, columns):
            within = error <= limit
            good &= within
            print(f"{'ok    ' if within else 'WRONG '} {what}: {error:.1e}, limit {limit:.1e}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small P")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device and a torch built for CUDA")
    if device == "cpu":
        good = check_all(Library(build_emulated(), device), 1031)
        sys.exit(not good)

    major, minor = torch.cuda.get_device_capability()
    library = Library(build_cuda(f"{major}{minor}"), device)
    if not check_all(library, 100_003):
        sys.exit("a variant is wrong: nothing was measured")
    machine = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
    }
    records = measure(
        library,
        QUICK_COLUMNS if quick else COLUMNS,
        QUICK_SECONDS if quick else SECONDS,
    )
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    results = Path(__file__).parents[1] / "results"
    path = results / f"variants-{name}{'-quick' if quick else ''}.json"
    path.write_text(json.dumps({"machine": machine, "records": records}, indent=1))
    print(f"wrote {path}", *map(line, records), sep="\n")


if __name__ == "__main__":
    main()
