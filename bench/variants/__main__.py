"""The variants beside the shipped kernels and plain torch.

python -m bench.variants                  checks and measures all on a CUDA device, some minutes
python -m bench.variants --seconds 60     the same, what there is time for
python -m bench.variants --quick          small sizes
python -m bench.variants --device cpu     no GPU: checks them under the emulation, measures nothing

Median of CUDA-event timings, cold L2, in turns (bench/race.py). Writes
bench/results/variants-<device>.json after every contest, and prints a table last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import race
from bench.contests import Contest
from bench.gpu import machine
from bench.gpu.bench import captured
from bench.gpu.store import RESULTS
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


def update_contest(library: Library, jac: Tensor, name: str) -> Contest:
    """combine, then torch's fused optimizer, as flatmtl; beside it the variant, whose bytes are counted.

    As CUDA graphs: torch's step takes the host longer than the device.
    """
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


def cases() -> list[tuple[int, torch.dtype, Callable[[Library, Tensor], Contest]]]:
    """(T, dtype, the contest on such a J) of every contest."""
    makers = {"sgd": UPDATE_TASKS, "adamw": UPDATE_TASKS, "gram": GRAM_TASKS}
    return [
        (tasks, dtype, gram_contest if name == "gram" else partial(update_contest, name=name))
        for dtype in DTYPES
        for name, sizes in makers.items()
        for tasks in sizes
    ]


def measure(
    library: Library,
    columns: int,
    turn: float,
    end: float,
    save: Callable[[list[Record], int], None],
) -> list[Record]:
    """Every contest that begins before ``end``, with a copy of 1 GiB in turn with it as the ceiling.

    Args:
        library: the variants.
        columns: P.
        turn: seconds of a contest.
        end: of ``time.monotonic``.
        save: takes the records and how many there will not be, after every contest.
    """
    clock = race.DeviceClock()
    source = torch.empty(COPIED, dtype=torch.uint8, device=library.device)
    target = torch.empty_like(source)
    records: list[Record] = []
    for tasks, dtype, make in cases():
        if time.monotonic() >= end:
            break
        jac = torch.randn(tasks, columns, device=library.device, dtype=dtype)
        contest = make(library, jac)
        contest.yardsticks["copy"] = (lambda: target.copy_(source), 2 * COPIED)
        about = {"name": contest.name, "tasks": tasks, "columns": columns}
        about["dtype"] = str(dtype).removeprefix("torch.")
        records.append(about | race.run(contest, clock, seconds=turn))
        print(line(records[-1]), flush=True)
        save(records, len(cases()) - len(records))
        del contest, jac  # before the next J
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="how long it may take")
    given = parser.parse_args()
    device, end = given.device, time.monotonic() + given.seconds
    if why := machine.refusal(device):
        parser.error(why)
    if device == "cpu":
        good = check_all(Library(build_emulated(), device), 1031)
        sys.exit(not good)

    major, minor = torch.cuda.get_device_capability()
    library = Library(build_cuda(f"{major}{minor}"), device)
    if not check_all(library, 100_003):
        sys.exit("a variant is wrong: nothing was measured")
    about = machine.describe(device)
    name = f"variants-{machine.short_name(about)}{'-quick' if given.quick else ''}.json"

    def save(records: list[Record], left_out: int) -> None:
        results = {"machine": about, "records": records, "left_out": left_out}
        (RESULTS / name).write_text(json.dumps(results, indent=1))

    records = measure(
        library,
        QUICK_COLUMNS if given.quick else COLUMNS,
        QUICK_SECONDS if given.quick else SECONDS,
        end,
        save,
    )
    print(*map(line, records), sep="\n")
    if not records:
        sys.exit(f"there was no time for a contest in {given.seconds:g} s")
    print(f"wrote {RESULTS / name}: {len(records)} of {len(cases())} contests")


if __name__ == "__main__":
    main()
