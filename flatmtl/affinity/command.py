"""``python -m flatmtl group``: from a file of affinities to groups, as text, picture and CSV."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmtl.affinity import _choice
from flatmtl.affinity._command import guarded
from flatmtl.affinity._names import known, printable
from flatmtl.affinity._progress import Bar
from flatmtl.affinity.record import QUANTITIES, AffinityRecord

if TYPE_CHECKING:
    from flatmtl.grouping import Grouping

_QUICK = 18  # tasks for which a second search takes no time worth a word

DESCRIPTION = """\
Chooses which tasks to train together: at most N groups so that the mean score of the tasks is best, where
a task's score in a group is the mean affinity of the group's other tasks for it."""

EPILOG = """\
FILE is what AffinityRecord.save wrote, or a CSV file: names of the sources in the first row, of the
recipients in the first column, in the same order, and what a step on the source does to the recipient's
loss in the cells:

  recipient\\source,depth,normals,edges
  depth,,0.29,0.07
  normals,0.22,,0.08
  edges,0.04,0.04,

example: python -m flatmtl group affinity.npz --max-groups 3 --must depth,normals --plot groups.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="affinities: .npz of a record, or .csv")
    add("--max-groups", type=int, required=True, metavar="N", help="most groups to train")
    add(
        "--objective", choices=("tag", "hoa"), default="tag",
        help="tag (default): affinities, a task alone has no score; hoa: results of pairs trained "
        "together, those of single tasks on the diagonal",
    )  # fmt: skip
    add(
        "--quantity", choices=QUANTITIES, default="affinity", metavar="NAME",
        help=f"which of the record's matrices: {', '.join(QUANTITIES)} (default: affinity)",
    )  # fmt: skip
    add(
        "--epochs", type=_epochs, metavar="A:B",
        help="from epoch A up to but without B, counted from 0; --epochs=-3: for the last three "
        "(default: all)",
    )  # fmt: skip
    add("--normalise", action="store_true", help="give each recipient's row mean 0, deviation 1")
    add("--partition", action="store_true", help="every task in one group only")
    add("--allow-single", action="store_true", help="groups of one, scored by the diagonal")
    add("--minimise", action="store_true", help="the entries are errors: smaller is better")
    add(
        "--must", type=_names, action="append", default=[], metavar="A,B",
        help="tasks that always train together; may be repeated; quote a name with a comma: "
        "'\"a,b\",c'",
    )  # fmt: skip
    add(
        "--must-not", type=_names, action="append", default=[], metavar="A,B",
        help="tasks of which no two train together; may be repeated",
    )  # fmt: skip
    add(
        "--near-ties", type=int, metavar="N",
        help="how many of the next best choices to show (default: 3; none with --heuristic)",
    )  # fmt: skip
    add(
        "--heuristic", action="store_true",
        help="for more tasks than an exact search can take: a local search, with a bound",
    )  # fmt: skip
    add(
        "--draws", type=int, default=0, metavar="N",
        help="select N times more, from affinities redrawn within their standard errors, and show how "
        "often which groups come out",
    )  # fmt: skip
    add("--plot", type=Path, metavar="PNG", help="draw all of it (needs matplotlib)")
    add(
        "--csv", type=Path, metavar="CSV", help="write the groups: group, task, served there, score"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    return guarded("group", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from flatmtl.grouping import select_groups, stability

    for path in (args.plot, args.csv):  # before the search, which may be long
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent}: no such folder")
    if args.draws and (args.normalise or args.heuristic):
        raise ValueError("--draws goes with the exact search and without --normalise")
    if args.plot is not None:
        from flatmtl.plots import _draw

        _draw.matplotlib()
    csv_in = args.file.suffix.lower() == ".csv"
    record = (AffinityRecord.read_csv if csv_in else AffinityRecord.load)(args.file)
    matrix = record.matrix(args.quantity, epochs=args.epochs, normalise=args.normalise)
    rules = {
        "objective": args.objective,
        "minimise": args.minimise,
        "allow_single": args.allow_single,
    }
    limits = {
        "must": [known(record.tasks, names) for names in args.must],
        "must_not": [known(record.tasks, names) for names in args.must_not],
        "partition": args.partition,
    }
    near_ties = args.near_ties
    if near_ties is None:
        near_ties = 0 if args.heuristic else 3
    with Bar("selecting groups") as bar:
        grouping = select_groups(
            matrix,
            args.max_groups,
            **rules,
            **limits,
            near_ties=near_ties,
            heuristic=args.heuristic,
            tasks=record.tasks,
            progress=bar,
        )
    # a normalised matrix has no standard errors of its own
    error = None if args.normalise else record.standard_error(args.quantity, args.epochs)
    print(_about(args, record))
    print(_choice.text(grouping, matrix, error, rules))
    if args.draws:
        with Bar("redrawing") as bar:
            found = stability(
                record,
                args.max_groups,
                quantity=args.quantity,
                epochs=args.epochs,
                draws=args.draws,
                progress=bar,
                **rules,
                **limits,
            )
        print(f"{found}\n")
    caveats = [*record.caveats(), *_alone(args, record), *_scaled(args, record, grouping, limits)]
    for caveat in caveats:
        print(f"caveat: {caveat}")
    if args.csv is not None:
        _write_csv(args.csv, grouping)
    if args.plot is not None:
        from flatmtl import plots

        chosen = {"quantity": args.quantity, "epochs": args.epochs, "normalise": args.normalise}
        plots.grouping_report(record, grouping, args.plot, **chosen)
    written = [str(path) for path in (args.csv, args.plot) if path is not None]
    if written:
        print(f"written: {', '.join(written)}")
    return 0


def _about(args: argparse.Namespace, record: AffinityRecord) -> str:
    quantity = f"normalised {args.quantity}" if args.normalise else args.quantity
    if record.metadata.get("mode") == "given":
        return f"{args.file}: {quantity} of {len(record.tasks)} tasks; row = recipient"
    chosen = record.steps if args.epochs is None else record.steps[args.epochs]
    return (
        f"{args.file}: {quantity} of {len(record.tasks)} tasks, {int(chosen.sum())} measured steps in "
        f"{len(chosen)} {'epoch' if len(chosen) == 1 else 'epochs'}; row = recipient"
    )


def _alone(args: argparse.Namespace, record: AffinityRecord) -> list[str]:
    if not args.allow_single or record.metadata.get("mode") == "given":
        return []
    return [
        "a task alone is scored by its diagonal entry: its own step on the very batch that is "
        "measured, which makes training alone look better than it is"
    ]


def _scaled(
    args: argparse.Namespace, record: AffinityRecord, grouping: Grouping, limits: dict[str, Any]
) -> list[str]:
    """Whether the groups hang on some rows being spread more widely than others."""
    from flatmtl.grouping import select_groups

    known = args.objective == "tag" and not args.minimise and grouping.exact
    if args.normalise or not known or len(record.tasks) > _QUICK:
        return []
    matrix = record.matrix(args.quantity, epochs=args.epochs, normalise=True)
    other = select_groups(
        matrix, args.max_groups, allow_single=args.allow_single, tasks=record.tasks, **limits
    )
    if set(map(frozenset, other.groups)) == set(map(frozenset, grouping.groups)):
        return []
    sets = " ".join("{" + ", ".join(map(printable, group)) + "}" for group in other.groups)
    return [
        "the groups hang on the rows' scales: recipients whose entries differ most decide; with every row "
        f"normalised (--normalise) they are {sets}"
    ]


def _write_csv(path: Path, grouping: Grouping) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "task", "served there", "score"])
        for number, group in enumerate(grouping.groups):
            for task in group:
                here = grouping.served_by[task] == number
                score = repr(float(grouping.scores[task])) if here else ""
                writer.writerow([number + 1, task, "yes" if here else "no", score])


def _names(text: str) -> list[str]:
    rows = list(csv.reader([text], skipinitialspace=True))
    names = [name.strip() for name in rows[0]] if rows else []
    if len(names) < 2 or not all(names):
        raise argparse.ArgumentTypeError(f"must be two tasks or more, as A,B; got {text!r}")
    return names


def _epochs(text: str) -> slice:
    first, colon, last = text.partition(":")
    try:
        start = int(first) if first.strip() else None
        if not colon:
            assert start is not None, "argparse gives no empty text"
            return slice(start, start + 1 or None)
        return slice(start, int(last) if last.strip() else None)
    except (ValueError, AssertionError):
        raise argparse.ArgumentTypeError(f"must be A:B, A: or A, got {text!r}") from None
