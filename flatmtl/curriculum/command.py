"""``python -m flatmtl order``: from a file of similarities or affinities to an order of tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from flatmtl.affinity._command import guarded
from flatmtl.affinity._names import known
from flatmtl.affinity._progress import Bar
from flatmtl.affinity.record import QUANTITIES, AffinityRecord
from flatmtl.curriculum.order import order_tasks
from flatmtl.curriculum.similarity import from_affinity

DESCRIPTION = """\
Puts similar tasks one after the other: the order with the largest sum of similarities between neighbours.
Exact up to 18 tasks, by simulated annealing beyond."""

EPILOG = """\
FILE is what AffinityRecord.save wrote, or a CSV file with the tasks' names in its first row and column. Where
the two directions of a pair differ, as they do in affinities, their mean counts.

example: python -m flatmtl order affinity.npz --quantity cosine --start depth"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".npz of a record, or .csv")
    add(
        "--quantity", choices=QUANTITIES, default="affinity", metavar="NAME",
        help=f"which of the record's matrices: {', '.join(QUANTITIES)} (default: affinity)",
    )  # fmt: skip
    add("--start", metavar="TASK", help="the task to begin with (default: any)")
    add("--exact", action="store_true", help="search exactly beyond 18 tasks too, up to 22")
    add("--seed", type=int, default=0, help="of the annealing (default: 0)")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    return guarded("order", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    csv_in = args.file.suffix.lower() == ".csv"
    record = (AffinityRecord.read_csv if csv_in else AffinityRecord.load)(args.file)
    matrix = AffinityRecord.from_matrix(record.matrix(args.quantity), record.tasks)
    start = None if args.start is None else known(record.tasks, [args.start])[0]
    with Bar("ordering tasks") as bar:
        found = order_tasks(
            from_affinity(matrix),
            tasks=record.tasks,
            start=start,
            exact=args.exact or None,
            seed=args.seed,
            progress=bar,
        )
    print(found)
    return 0
