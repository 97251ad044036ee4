"""One part of the measurements, or the table of all that was measured.

python -m bench.gpu kernels                          on the CUDA device, within the part's own time
python -m bench.gpu kernels --seconds 300            within another
python -m bench.gpu kernels --device cpu --quick     no GPU: exercises all but the CUDA calls
python -m bench.gpu table                            prints what this device's file says
python -m bench.gpu table --results FILE             what another does; needs no GPU

Writes bench/results/<device>.json, one entry a part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import race
from bench.gpu import aggregate, ceiling, kernels, machine, solvers, steps, store, table
from bench.gpu.bench import Bench

PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {  # name -> its code and seconds
    "ceiling": (ceiling.run, 10.0),
    "kernels": (kernels.run, 120.0),
    "solvers": (solvers.run, 35.0),
    "aggregate": (aggregate.run, 35.0),
    "steps": (steps.run, 55.0),
}
TURN, QUICK_TURN = 0.05, 0.001  # seconds of measuring a contest


def main(words: list[str] | None = None) -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--seconds", type=float, help="how long the part may take")
    parser.add_argument("--results", type=Path, help="the table's file (this device's)")
    given = parser.parse_args(words)
    if given.results is not None:
        if given.part != "table":
            parser.error(f"--results must come with the part table, got {given.part}")
        show(given.results)
        return
    if why := machine.refusal(given.device):
        parser.error(why)
    quick = given.quick or given.device == "cpu"
    path = store.path_for(given.device, quick)
    if given.part == "table":
        show(path)
        return
    run, seconds = PARTS[given.part]
    bench = Bench(
        device=given.device,
        quick=quick,
        part=store.Part(given.part, given.device, path),
        clock=race.DeviceClock() if given.device == "cuda" else race.wall_clock,
        end=time.monotonic() + (given.seconds or seconds),
        turn=QUICK_TURN if quick else TURN,
    )
    run(bench)
    bench.part.note(clocks_after=machine.clocks(given.device))
    bench.part.save()
    print(f"wrote {path}")


def show(path: Path) -> None:
    """Prints the table of a file."""
    results = store.load(path)
    if not results:
        sys.exit(f"{path} must hold the results of a part, got none")
    print(table.show(results))


if __name__ == "__main__":
    main()
