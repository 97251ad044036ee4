"""``python -m flatmtl demo``: arguments, checks, and the order of things."""

import argparse
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from time import perf_counter

BUNDLED_DATA = Path(__file__).parent / "data"
_INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to ``parser``."""
    parser.add_argument(
        "--data",
        type=Path,
        default=BUNDLED_DATA,
        metavar="DIR",
        help="folder with the four IDX files of MNIST or Fashion-MNIST, gzipped or plain "
        "(default: a small cut of Fashion-MNIST that comes with the package)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="where results.json and curves.png are written (default: ./demo-out)",
    )
    parser.add_argument("--seeds", type=_positive, help="runs of each method (default: 3)")
    parser.add_argument("--epochs", type=_positive, help="epochs of each run (default: 6)")
    parser.add_argument(
        "--workers", type=_positive, help="processes that train at one time (default: CPU count)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a run of seconds that shows that everything works; its accuracies mean nothing",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        return _fail(f"the demo needs {error.name}, please run: pip install flatmtl[demo]")
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return _INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    # Imported here because they import what main has just checked.
    from rich.console import Console

    from flatmtl.demo.display import ProgressBars, print_outcome
    from flatmtl.demo.experiment import Settings, run_experiment
    from flatmtl.demo.plot import save_curves
    from flatmtl.demo.summary import as_json
    from flatmtl.demo.workers import DataSource, Workers

    if args.quick:
        settings = Settings((256, 256, 256), args.seeds or 1, args.epochs or 3, (0.02, 0.05))
    else:
        settings = Settings((3712, 1500, 3000), args.seeds or 3, args.epochs or 6, (0.02, 0.05))
    source = DataSource(args.data, settings.pairs)
    try:
        source.load()  # so that what is wrong with the data is said before any worker starts
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return _fail(str(error))

    begin = perf_counter()
    console = Console()
    workers = min(args.workers or _cpu_count(), 3 * settings.seeds)
    console.print(
        f"train pairs: {settings.pairs[0]}, epochs: {settings.epochs}, seeds: {settings.seeds}, "
        f"worker processes: {workers}; Ctrl-C stops"
    )
    try:
        with ProgressBars(console, settings) as bars, Workers(workers, source) as pool:
            outcome = run_experiment(settings, pool, bars.on_step, bars.on_done)
    except BrokenProcessPool:
        return _fail("a worker process died; is there enough memory? try --workers 1")

    print_outcome(console, outcome)
    save_curves(args.out / "curves.png", settings, outcome)
    text = json.dumps(as_json(settings, outcome), indent=2)
    (args.out / "results.json").write_text(text + "\n")
    print(f"written: {args.out / 'results.json'}, {args.out / 'curves.png'}")
    print(f"took {perf_counter() - begin:.0f} s")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts what a container may use; Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fail(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return 2
