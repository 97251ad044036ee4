"""Batches for a ``DataLoader``: task after task, or easy samples first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from numbers import Integral

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from flatmtl.curriculum.instances import Indices, labels
from flatmtl.curriculum.order import TaskOrder
from flatmtl.grouping.names import Tasks
from flatmtl.losses import TaskName


class _EpochSampler(Sampler[list[int]]):
    """Batches that depend on a seed and the epoch alone; torch's global random state is not used."""

    def __init__(self, batch_size: int, drop_last: bool, seed: int) -> None:
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.drop_last = bool(drop_last)
        self.seed = _whole("seed", seed, 0)
        self._epoch = self._first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch whose batches come next; without it every epoch is the same.

        Args:
            epoch: from 0.
            first: the batch to begin with, counted from 0, to go on with an epoch that was left.

        Raises:
            ValueError: a negative number, or more batches than there are.
        """
        epoch, first = _whole("epoch", epoch, 0), _whole("first", first, 0)
        if first > self._total():
            raise ValueError(f"first must be at most {self._total()}, all batches, got {first}")
        self._epoch, self._first = epoch, first

    def __len__(self) -> int:
        """How many batches come."""
        return self._total() - self._first

    def __iter__(self) -> Iterator[list[int]]:
        """The batches as lists of sample indices."""
        rng = np.random.default_rng([self.seed, self._epoch])
        return islice(self._batches(rng), self._first, None)

    @abstractmethod
    def _total(self) -> int:
        """How many batches an epoch has."""

    @abstractmethod
    def _batches(self, rng: np.random.Generator) -> Iterator[list[int]]:
        """All of an epoch."""

    def _number(self, samples: int) -> int:
        full, more = divmod(samples, self.batch_size)
        return full + (more > 0 and not self.drop_last)

    def _batch(self, samples: Indices, number: int) -> list[int]:
        return samples[number * self.batch_size : (number + 1) * self.batch_size].tolist()


class TaskOrderSampler(_EpochSampler):
    """Batches of one task each, the tasks one after the other in a given order.

    For ``DataLoader(dataset, batch_sampler=...)``. Every sample comes once an epoch, in an order shuffled
    within its task; with ``instances`` only those samples, in their order. As in Data-CUBE
    (arXiv 2401.03563), a task is finished before the next one begins; with ``rounds`` the order of tasks
    is gone through several times, with a part of each task's batches at a time.

    Args:
        order: the tasks, first to last: what ``order_tasks`` found, or their names.
        tasks: [N] the task of each sample of the dataset: names, all ints or all strings; or, with a
            ``TaskOrder`` of names that are strings, ints that are rows of its matrix.
        batch_size: samples in a batch; a task's last batch may have fewer.
        instances: indices of samples, such as ``order_instances`` returns; None: all, shuffled.
        rounds: in how many parts each task's batches are taken. 1: task after task. As many as the
            largest task has batches: one batch of each task in turn, those of smaller tasks spread
            evenly.
        drop_last: whether a task's last batch is left out where it is smaller. A task that has less than
            a batch then has none.
        seed: of the shuffling.

    Attributes:
        schedule: the task of each batch of an epoch, the same in all epochs.

    Raises:
        ValueError: an argument is not as above, a sample's task is not in the order, a task of the order
            has no sample in ``tasks``, or instances are out of range or come twice.
    """

    schedule: list[TaskName]

    def __init__(
        self,
        order: TaskOrder | Sequence[TaskName],
        tasks: Sequence[object] | npt.NDArray[np.generic] | torch.Tensor,
        batch_size: int,
        *,
        instances: Sequence[int] | Indices | torch.Tensor | None = None,
        rounds: int = 1,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, drop_last, seed)
        self.rounds = _whole("rounds", rounds, 1)
        found, place = labels(tasks)
        names = _names(order, found)
        self._shuffle = instances is None
        chosen = (
            np.arange(len(place)) if instances is None else read_instances(instances, len(place))
        )
        position = _positions(names, found)[place[chosen]]
        self._samples = [chosen[position == t] for t in range(len(names))]  # [T][n_t]
        self._counts = [self._number(len(samples)) for samples in self._samples]
        self._plan = [  # (task, batch of it) in turn
            (t, batch)
            for r in range(self.rounds)
            for t, count in enumerate(self._counts)
            for batch in range(count * r // self.rounds, count * (r + 1) // self.rounds)
        ]
        shown = order.order if isinstance(order, TaskOrder) else names
        self.schedule = [shown[t] for t, _ in self._plan]

    def _total(self) -> int:
        return len(self._plan)

    def _batches(self, rng: np.random.Generator) -> Iterator[list[int]]:
        samples = [rng.permutation(s) for s in self._samples] if self._shuffle else self._samples
        for task, number in self._plan:
            yield self._batch(samples[task], number)


class InstanceOrderSampler(_EpochSampler):
    """Batches of consecutive samples of a given order: easy to hard with what ``order_instances`` returns.

    For ``DataLoader(dataset, batch_sampler=...)``. Every sample of the order comes once an epoch.

    Args:
        instances: indices of samples, first to last.
        batch_size: samples in a batch; the last one may have fewer.
        shuffle: whether the batches come in random order, each of samples of like difficulty still.
        drop_last: whether the last samples, the hardest, are left out where they are less than a batch.
        seed: of the shuffling.

    Raises:
        ValueError: an argument is not as above, or an index is negative or comes twice.
    """

    def __init__(
        self,
        instances: Sequence[int] | Indices | torch.Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, drop_last, seed)
        self._instances = read_instances(instances, None)
        self._shuffle = bool(shuffle)

    def _total(self) -> int:
        return self._number(len(self._instances))

    def _batches(self, rng: np.random.Generator) -> Iterator[list[int]]:
        total = self._total()
        for number in rng.permutation(total) if self._shuffle else range(total):
            yield self._batch(self._instances, int(number))


def read_instances(given: Sequence[int] | Indices | torch.Tensor, samples: int | None) -> Indices:
    """int64 indices, each once and below ``samples``."""
    values = given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(
            f"instances must be indices of samples, got {values.dtype} of shape {list(values.shape)}"
        )
    values = values.astype(np.int64)
    end = np.iinfo(np.int64).max if samples is None else samples
    outside = values[(values < 0) | (values >= end)]
    if outside.size:
        upto = "" if samples is None else f" up to {samples - 1}"
        raise ValueError(f"instances must be indices from 0{upto}, got {outside[0]}")
    kept, times = np.unique(values, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"instances must be different, got {kept[times > 1][0]} twice")
    return values


def _names(order: TaskOrder | Sequence[TaskName], found: npt.NDArray[np.generic]) -> list[TaskName]:
    """The order in the names that samples have."""
    if isinstance(order, str):
        raise ValueError(f"order must be a sequence of task names, got the string {order!r}")
    if not isinstance(order, TaskOrder):
        return Tasks(order).names
    by_index = found.dtype.kind in "iu" and all(isinstance(name, str) for name in order.order)
    return list(order.indices if by_index else order.order)


def _positions(names: list[TaskName], found: npt.NDArray[np.generic]) -> Indices:
    """For each task that samples have, sorted, its place in the order."""
    at = {name: t for t, name in enumerate(names)}
    have: list[TaskName] = found.tolist()
    strange = [name for name in have if name not in at]
    if strange:
        raise ValueError(f"order must have every task of tasks, got none {strange[0]!r}")
    seen = set(have)
    empty = [name for name in names if name not in seen]
    if empty:
        raise ValueError(
            f"tasks must have samples of every task of order, got none of {empty[0]!r}"
        )
    return np.array([at[name] for name in have], dtype=np.int64)


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
