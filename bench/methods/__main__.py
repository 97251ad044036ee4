"""The command line: ``python -m bench.methods run``, ``scan``, ``time``, ``parts`` and ``report``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args) or 0)
    except (OSError, ValueError, ImportError) as error:
        print(f"bench.methods: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "bench.methods: a worker died; is there enough memory? try --workers 1", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from bench.methods.cells import METHODS, SHARPNESS
    from bench.methods.settings import FULL

    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, command, text in (
        ("run", _run, "train what is not trained yet; --quick for the smaller setting"),
        ("scan", _scan, "the choice of rates and radii on validation samples"),
        ("time", _time, "seconds per step, in one process and one thread"),
        ("parts", _parts, "size of the flat part against the losses' part, method by method"),
        ("report", _report, "the tables of docs/methods_benchmark.md from the results"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument(
            "--data",
            type=Path,
            default=(ROOT / ".." / "shared" / "data").resolve(),
            help="folder with fashion-mnist, mnist, qm8, tox21 and adult (default: %(default)s)",
        )
        sub.add_argument(
            "--out", type=Path, help="default: bench/results/methods, with --quick methods-quick"
        )
        sub.add_argument("--quick", action="store_true", help="half the samples, one seed")
        sub.add_argument("--workers", type=_positive, default=2, help="processes (default: 2)")
        sub.add_argument("--datasets", nargs="+", choices=list(FULL), default=list(FULL))
        sub.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        sub.add_argument("--sharpness", nargs="+", choices=SHARPNESS)
        sub.add_argument("--seeds", type=_positive, help="default: 3, with --quick 1")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _out(args: argparse.Namespace) -> Path:
    return args.out or RESULTS / ("methods-quick" if args.quick else "methods")


def _beside(args: argparse.Namespace, what: str) -> Path:
    """A file of other results beside the folder of cells."""
    return _out(args).with_name(f"{_out(args).name}_{what}.json")


def _job(args: argparse.Namespace):
    from bench.methods.run import make_job
    from bench.methods.settings import FULL, QUICK

    settings = QUICK if args.quick else FULL
    chosen = {name: settings[name] for name in args.datasets}
    return make_job(args.data, _out(args), chosen, args.datasets)


def _cells(args: argparse.Namespace):
    from bench.methods.cells import SHARPNESS, all_cells

    kinds = args.sharpness or (SHARPNESS[:3] if args.quick else SHARPNESS)
    return all_cells(args.datasets, args.methods, args.seeds or (1 if args.quick else 3), kinds)


def _run(args: argparse.Namespace) -> int:
    from bench.methods.run import finished, run

    begin = time.perf_counter()
    results = run(_job(args), _cells(args), args.workers, _say)
    print(f"{len(results)} cells in {time.perf_counter() - begin:.0f} s")
    return 0 if all(map(finished, results)) else 1


def _scan(args: argparse.Namespace) -> None:
    from bench.methods.scan import scan
    from bench.methods.store import write

    found = scan(_job(args), args.workers, _say)
    write(_beside(args, "scan"), found, indent=1)
    print(json.dumps(found, indent=1))


def _time(args: argparse.Namespace) -> None:
    from bench.methods.store import write
    from bench.methods.timing import time_steps

    torch.set_num_threads(1)
    found = time_steps(_job(args), args.methods, _say)
    write(_beside(args, "time"), found, indent=1)


def _parts(args: argparse.Namespace) -> None:
    from bench.methods.cells import METHODS
    from bench.methods.parts import ratios
    from bench.methods.store import write
    from flatmtl.weighting import METHODS as KNOWN

    torch.set_num_threads(1)
    gram = [
        method for method in METHODS if method in args.methods and KNOWN[method].needs == "gram"
    ]
    write(_beside(args, "parts"), ratios(_job(args), gram, _say), indent=1)


def _report(args: argparse.Namespace) -> None:
    from bench.methods.collect import collect
    from bench.methods.report import write_report

    path = _out(args).with_name(f"{_out(args).name}.json")
    if (_out(args) / "cells").exists():
        collect(_job(args), _cells(args), path)
    page = (
        ROOT / "docs" / "methods_benchmark.md"
        if path.parent == RESULTS and not args.quick
        else path.with_suffix(".md")
    )
    write_report(path, page)
    print(f"written: {page}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, the workers too
    sys.exit(main())
