"""How far a search is, on stderr, once it has taken a second."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_PATIENCE = 1.0  # seconds


class Bar:
    """Called with the share done, 0 to 1; a context manager that leaves a clean line behind."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = perf_counter()
        self._rich: Progress | None = None
        self._plain = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._plain:
            print("\r" + " " * (len(self._title) + 6), end="\r", file=sys.stderr, flush=True)

    def __call__(self, share: float) -> None:
        """Shows the share that is done, where somebody looks on."""
        if perf_counter() - self._begin < _PATIENCE or not sys.stderr.isatty():
            return
        if self._rich is None and not self._plain:
            self._start()
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=share)
        else:
            print(f"\r{self._title} {share:4.0%}", end="", file=sys.stderr, flush=True)

    def _start(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            self._plain = True
            return
        self._rich = Progress(console=Console(stderr=True), transient=True)
        self._rich.add_task(self._title, total=1.0)
        self._rich.start()
