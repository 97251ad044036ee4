"""Runs the cells that lack, in worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.methods import data
from bench.methods.cells import PLAIN, SINGLE, Cell, fingerprint, train
from bench.methods.settings import Setting
from bench.methods.store import Result, Store
from examples.progress import progress


@dataclass(frozen=True)
class Job:
    """All that a worker must know of a run but for the cell."""

    folder: Path  # of the data
    out: Path
    settings: Mapping[str, Setting]
    checksums: Mapping[str, int]
    part: str = "test"  # the samples that a trained network is judged by

    @property
    def store(self) -> Store:
        """Where the cells are kept."""
        return Store(self.out / "cells")

    def fingerprint(self, cell: Cell) -> str:
        """Of a cell in this run."""
        name = cell.dataset
        return fingerprint(cell, self.settings[name], self.checksums[name], self.part)

    def known(self, cell: Cell) -> Result | None:
        """A cell's result, if it has one in this run's settings."""
        return self.store.get(cell, self.fingerprint(cell))


def make_job(folder: Path, out: Path, settings: Mapping[str, Setting], names: list[str]) -> Job:
    """A job for some data sets.

    Raises:
        FileNotFoundError: data are absent.
    """
    data.check_folder(folder, names)
    return Job(folder, out, settings, {name: data.checksum(folder, name) for name in names})


def cost(cell: Cell) -> float:
    """About how long a cell takes, in seconds on a quiet core: for the time left."""
    plain = {"multifashion": 8.0, "fashion_mnist": 8.0, "adult": 2.0}.get(cell.dataset, 2.5)
    if cell.method == SINGLE and cell.dataset in ("qm8", "tox21"):
        plain *= 2.0
    return plain if cell.sharpness == PLAIN else 2.5 * plain


def finished(result: Result | None) -> bool:
    """Whether a cell need not run again."""
    return result is not None and "error" not in result


def run(
    job: Job, cells: list[Cell], workers: int, say: Callable[[str], None] = print
) -> list[Result]:
    """Runs the cells that are not finished and returns the results of these.

    Ctrl-C lets the cells under way finish; they are kept.
    """
    todo = [cell for cell in cells if not finished(job.known(cell))]
    say(f"{len(cells)} cells, {len(cells) - len(todo)} finished before, {len(todo)} to run")
    results = []
    if todo:
        with progress(sum(map(cost, todo))) as advance:
            for cell, result in _results(job, todo, workers):
                results.append(result)
                advance(cost(cell), f"{len(results)} of {len(todo)} cells")
                say(_line(cell, result))
    failed = [result for result in results if not finished(result)]
    if failed:
        say(f"{len(failed)} cells failed (the next call runs them again):")
        for result in failed:
            say(_line(Cell(*(result[k] for k in Cell.__dataclass_fields__)), result))
    return results


def _line(cell: Cell, result: Result) -> str:
    if not finished(result):
        return f"{cell.key}: FAILED: {result['error']}"
    mean = sum(result["metrics"]) / len(result["metrics"])
    return f"{cell.key}: {mean:.4g} (mean of the tasks), {result['seconds']:.1f} s"


def _results(job: Job, cells: list[Cell], workers: int) -> Iterator[tuple[Cell, Result]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,))
    try:
        pending: dict[Future[Result], Cell] = {pool.submit(work, cell): cell for cell in cells}
        while pending:
            done, _ = wait(pending, return_when="FIRST_COMPLETED")
            for future in done:
                yield pending.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a worker process keeps between its cells."""

    job: Job
    loaded: tuple[tuple[str, int], data.Data] | None = None


def _begin(job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _Worker.job, _Worker.loaded = job, None


def work(cell: Cell) -> Result:
    """Trains one cell and keeps what came of it, an error too."""
    job = _Worker.job
    setting, mark = job.settings[cell.dataset], job.fingerprint(cell)
    try:
        which = cell.dataset, cell.seed
        if _Worker.loaded is None or _Worker.loaded[0] != which:
            args = (cell.dataset, job.folder, setting, cell.seed, job.out / "cache")
            _Worker.loaded = which, data.load(*args)
        begin = time.thread_time()
        found = train(_Worker.loaded[1], setting, cell, job.part)
        return job.store.put(cell, mark, found, time.thread_time() - begin)
    except Exception as error:  # what a method raises belongs into the table
        return job.store.fail(cell, mark, f"{type(error).__name__}: {error}")
