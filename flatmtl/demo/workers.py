"""Training runs in worker processes, one thread each, with progress and a clean stop."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty

import torch

from flatmtl.demo.idx import load_split
from flatmtl.demo.multifashion import PairSplits, make_splits
from flatmtl.demo.train import RunConfig, RunResult, Stopped, train

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class DataSource:
    """What the pairs are made from; every worker builds the same ones from it."""

    folder: Path
    counts: tuple[int, int, int]  # train, validation, test pairs

    def load(self) -> PairSplits:
        """Reads the images and makes the pairs."""
        train_split, test_split = load_split(self.folder, "train"), load_split(self.folder, "t10k")
        return make_splits(train_split, test_split, self.counts)


class Workers:
    """A pool of worker processes that train; a context manager.

    Leaving the context by an exception, Ctrl-C included, lets each worker finish the step that it
    is in and then ends it.
    """

    def __init__(self, count: int, source: DataSource) -> None:
        context = multiprocessing.get_context("spawn")
        self._ticks: Queue[RunConfig] = context.Queue()
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(
            count, context, initializer=_begin, initargs=(source, self._ticks, self._stop)
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        configs: list[RunConfig],
        on_step: Callable[[RunConfig], None],
        on_done: Callable[[RunResult], None],
    ) -> list[RunResult]:
        """The results of ``configs``, in their order; they start in that order too."""
        with _interrupt_ignored():
            futures = [self._pool.submit(_work, config) for config in configs]
        pending: set[Future[RunResult]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS)
            self._drain(on_step)
            for future in done:
                on_done(future.result())
        return [future.result() for future in futures]

    def _drain(self, on_step: Callable[[RunConfig], None]) -> None:
        while True:
            try:
                on_step(self._ticks.get_nowait())
            except Empty:
                return


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Children started in here ignore Ctrl-C from their start on: the parent acts on it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Worker:
    """What a worker process keeps between its runs."""

    pairs: PairSplits
    ticks: "Queue[RunConfig]"
    stop: Event


def _begin(source: DataSource, ticks: "Queue[RunConfig]", stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    ticks.cancel_join_thread()  # an unread progress tick must not hold up the exit
    _Worker.pairs, _Worker.ticks, _Worker.stop = source.load(), ticks, stop


def _work(config: RunConfig) -> RunResult:
    def on_step() -> None:
        if _Worker.stop.is_set():
            raise Stopped
        _Worker.ticks.put(config)

    return train(config, _Worker.pairs, on_step)
