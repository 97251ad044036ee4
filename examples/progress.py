"""One progress bar: rich's where it is installed (the `demo` extra), else a line now and then."""

import sys
import time
from contextlib import contextmanager


@contextmanager
def progress(total):
    """Gives a function advance(count, text) that moves the bar on to so many of `total`."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        print("no progress bar: rich is missing (pip install 'flatmtl[demo]')", file=sys.stderr)
        yield _lines(total)
        return
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
    )
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
        bar = bars.add_task("", total=total)
        yield lambda count, text: bars.update(bar, advance=count, description=text)


def _lines(total, seconds=20):
    done, last = 0, time.monotonic()

    def advance(count, text):
        nonlocal done, last
        done += count
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            print(f"{100 * done / total:3.0f} % {text}", file=sys.stderr)

    return advance
