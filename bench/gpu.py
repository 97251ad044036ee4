"""Every op, solver and aggregate on a CUDA device, against its bandwidth and plain torch.

python -m bench.gpu                          everything, about 6 minutes
python -m bench.gpu --quick                  a small grid, under a minute
python -m bench.gpu --device cpu --quick     no GPU: exercises all but the CUDA calls

Median of CUDA-event timings, cold L2 (bench/race.py). Writes bench/results/<device>.json and prints a
short table last.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

import flatmtl
from bench import peers, race
from bench import solvers as methods
from bench.cases import Inputs, gram_with_conflict
from bench.contests import (
    MATRIX_OPS,
    METHODS,
    ROW_OPS,
    ROW_TASKS,
    Call,
    Contest,
    aggregate_contest,
    op_contest,
)
from flatmtl.ops import _library

TASKS = (2, 3, 4, 8, 16, 32, 40, 64)
COLUMNS = (1_000_000, 10_000_000, 25_000_000, 100_000_000)
DTYPES = (torch.float32, torch.bfloat16)
MOST_BYTES = 60e9  # of J, S and an output together; larger sizes are left out
COMPILED_TASKS = (
    8  # torch.compile takes part at this T and the largest P: each compiles for seconds
)
SECONDS, QUICK_SECONDS = 0.12, 0.02  # of measuring a contest
Clock = Callable[[Call], float]
Record = dict[str, Any]


def machine(device: str) -> Record:
    """Versions, device and clocks."""
    info: Record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "flatmtl": flatmtl.__version__,
        "torchjd": peers.torchjd is not None,
        "body": _library.body("gram", device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "clocks": clocks(),
        }
    else:
        info["device"] = "cpu"
    return info


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the driver, the clocks and the heat now."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error)}
    return dict(zip(fields.split(","), (part.strip() for part in text.split(",")), strict=True))


def copy_ceiling(device: str, clock: Clock, quick: bool) -> float:
    """Bytes per second, read and written, of one large copy on the device."""
    size = (16 << 20) if quick or device == "cpu" else (4 << 30)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = sorted(clock(lambda: target.copy_(source)) for _ in range(11))
    return 2 * size / times[5]


def measure(contest: Contest, clock: Clock, seconds: float, **about: object) -> Record:
    """One contest as a record; errors are recorded too, so that one failure does not end the run."""
    record: Record = {"name": contest.name, **about}
    for name, call in list(contest.others.items()):
        try:
            call()
        except Exception as error:  # TorchJD refuses some dtypes; the others still run
            del contest.others[name]
            record.setdefault("failed_rivals", {})[name] = message(error)
    try:
        record |= race.run(contest, clock, seconds=seconds, least=5, most=50)
    except Exception as error:
        record["error"] = message(error)
        print("failed:", record, flush=True)
    return record


def message(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def contests_at(inputs: Inputs, *, compile_: bool) -> Iterator[tuple[str, Contest]]:
    """(kind, contest) for everything that is measured on these inputs."""
    for name in MATRIX_OPS:
        yield "op", op_contest(name, inputs, compile_=compile_)
    if inputs.tasks == ROW_TASKS:
        for name in ROW_OPS:
            yield "row op", op_contest(name, inputs, compile_=compile_)
    for name in METHODS:
        yield "aggregate", aggregate_contest(name, inputs)


def measure_size(
    inputs: Inputs, clock: Clock, seconds: float, *, compile_: bool, about: Record
) -> list[Record]:
    """All contests of one size."""
    return [
        measure(contest, clock, seconds, kind=kind, **about)
        for kind, contest in contests_at(inputs, compile_=compile_)
    ]


def over_sizes(
    device: str, clock: Clock, tasks: tuple[int, ...], columns: tuple[int, ...], seconds: float
) -> Iterator[list[Record]]:
    """Size by size, dtype by dtype: the ops over J, whole aggregates, the ops over a row."""
    for dtype, p, t in itertools.product(DTYPES, columns, tasks):
        if 3 * t * p * dtype.itemsize > MOST_BYTES:
            continue
        begin = time.perf_counter()
        about = {"tasks": t, "columns": p, "dtype": str(dtype).removeprefix("torch.")}
        compile_ = device == "cuda" and (t, p) == (COMPILED_TASKS, columns[-1])
        inputs = Inputs(t, p, dtype, device)
        yield measure_size(inputs, clock, seconds, compile_=compile_, about=about)
        del inputs
        torch._dynamo.reset()
        release(device)
        print(f"{about}: {time.perf_counter() - begin:.1f} s", flush=True)


def release(device: str) -> None:
    """Gives the freed memory back, for the next size."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def replay(call: Call) -> Call:
    """The call captured in a CUDA graph."""
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


def host_seconds(call: Call, device: str) -> float:
    """Seconds of wall time a call, 20 queued one after the other and waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(20):
        call()
    wait()
    return (time.perf_counter() - begin) / 20


def solvers(device: str, clock: Clock, tasks: tuple[int, ...], seconds: float) -> list[Record]:
    """Weightings on a Gram matrix: device time, wall time, and as graph replays; TorchJD beside them."""
    records: list[Record] = []
    for name in methods.METHODS:
        for t in tasks:
            if t < methods.least_tasks(name):
                continue
            generator = torch.Generator().manual_seed(t)
            gram = gram_with_conflict(t, generator).to(device)
            theirs = gram.float()
            weighting, torchjd = methods.ours(name, t), peers.torchjd_weighting(name)
            ours: Call = lambda w=weighting, g=gram: w(g)  # noqa: E731
            others: dict[str, Call] = {}
            if torchjd is not None:
                others["TorchJD"] = lambda w=torchjd, g=theirs: w(g)
            record = measure(Contest(name, 0, ours, others), clock, seconds, kind="solver", tasks=t)
            record["wall_s"] = host_seconds(ours, device)
            if "TorchJD" in others:
                record["wall_s_torchjd"] = host_seconds(others["TorchJD"], device)
            if device == "cuda":
                try:
                    contest = Contest(f"{name}, graph", 0, replay(ours), {})
                    record["graph_s"] = race.run(contest, clock, seconds=seconds)["median_s"][
                        race.OURS
                    ]
                except RuntimeError as error:
                    record["graph_error"] = message(error)
            records.append(record)
    return records


def short_table(results: Record) -> list[str]:
    """The lines that matter: the largest P measured, every T for gram and combine, T = 8 for the rest."""
    ceiling = results["copy_ceiling_bytes_per_s"]
    lines = [
        f"{results['machine']['device']}, torch {results['machine']['torch']}, "
        f"operators: {results['machine']['body']}, copy ceiling {ceiling / 1e9:.0f} GB/s",
        f"{'':18}{'dtype':>10}{'T':>4}{'P':>8}{'ms':>10}{'GB/s':>8}{'of copy':>9}{'of read':>9}"
        "   nearest rival",
    ]
    records = [r for r in results["records"] if "median_s" in r]
    sized = [r for r in records if r["kind"] != "solver"]
    for r in sized:
        largest = max(
            o["columns"] for o in sized if (o["tasks"], o["dtype"]) == (r["tasks"], r["dtype"])
        )
        if r["columns"] != largest or not (r["tasks"] == 8 or r["name"] in ("gram", "combine")):
            continue
        rivals = {name: f for name, f in r["faster"].items() if not name.startswith("flatmtl")}
        nearest = min(rivals, key=rivals.__getitem__, default=None)
        lines.append(
            f"{r['name']:18}{r['dtype']:>10}{r['tasks']:>4}{r['columns']:>8.0e}"
            f"{r['median_s'][race.OURS] * 1e3:>10.4f}{r['gb_per_s']:>8.0f}"
            f"{100 * r['gb_per_s'] * 1e9 / ceiling:>8.0f}%{100 * r['share']['read']:>8.0f}%"
            + (f"   {rivals[nearest]:.2f}x {nearest}" if nearest else "")
        )
    heads = ["device us", "wall us", "graph us", "TorchJD wall us"]
    lines.append(f"{'solver':18}{'T':>4}" + "".join(f"{head:>17}" for head in heads))
    for r in (r for r in records if r["kind"] == "solver"):
        values = [r["median_s"][race.OURS], r["wall_s"], r.get("graph_s"), r.get("wall_s_torchjd")]
        cells = ["-" if v is None else f"{v * 1e6:.1f}" for v in values]
        lines.append(f"{r['name']:18}{r['tasks']:>4}" + "".join(f"{cell:>17}" for cell in cells))
    failed = [r for r in results["records"] if "error" in r or "graph_error" in r]
    lines += [f"FAILED {r}" for r in failed]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="T in {2, 8}, small P")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device and a torch built for CUDA")
    clock: Clock = race.DeviceClock() if device == "cuda" else race.wall_clock
    tasks = (2, 8) if quick else TASKS
    columns = (100_000, 1_000_000) if quick else COLUMNS
    seconds = QUICK_SECONDS if quick else SECONDS
    results: Record = {"machine": machine(device)}
    results["copy_ceiling_bytes_per_s"] = copy_ceiling(device, clock, quick)
    results["records"] = solvers(device, clock, tasks, seconds)
    name = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    if device == "cpu" or quick:
        name = f"{name}-quick"  # never over a real result
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    for records in over_sizes(device, clock, tasks, columns, seconds):
        results["records"] += records
        if device == "cuda":
            results["machine"]["clocks_after"] = clocks()
        path.write_text(json.dumps(results, indent=1))  # what is done stays if the run is cut short
    print(f"wrote {path}", *short_table(results), sep="\n")


if __name__ == "__main__":
    main()
