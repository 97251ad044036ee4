"""``order_tasks``: similar tasks one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from types import ModuleType

import numpy as np

from flatmtl.affinity._names import printable
from flatmtl.curriculum._arrays import Floats, Numbers, square, symmetric
from flatmtl.grouping.names import Tasks
from flatmtl.losses import TaskName

QUICK = 18  # most tasks for which the exact search is the default: 2^17 sets
MOST = 22  # for which it is there: 2^21 sets of 21 numbers


@dataclass(frozen=True, repr=False)
class TaskOrder:
    """An order of tasks in which neighbours are alike.

    Attributes:
        order: the tasks' names, first to last.
        indices: the same as rows of the matrix.
        steps: similarity of each task to the one before it, one less than there are tasks.
        similarity: the sum of ``steps``, which no order exceeds if ``exact``.
        nearest_neighbour: the sum of the best order that always goes on to the most similar task left.
        bound: no order has a larger sum; ``similarity`` itself if ``exact``.
        exact: whether no order can be better.
    """

    order: list[TaskName]
    indices: list[int]
    steps: list[float]
    similarity: float
    nearest_neighbour: float
    bound: float
    exact: bool

    def __repr__(self) -> str:
        """The order in one line; of many tasks the first and the last."""
        names = [printable(name) for name in self.order]
        if len(names) > 12:
            names = [*names[:6], f"... {len(names) - 12} more ...", *names[-6:]]
        return f"TaskOrder({' > '.join(names)}; similarity {self.similarity:.6g}, {self._kind()})"

    def __str__(self) -> str:
        """A line a task, with its similarity to the one before."""
        lines = [
            f"order of {len(self.order)} task(s), similarity {self.similarity:.6g} ({self._kind()}; "
            f"nearest neighbour {self.nearest_neighbour:.6g})"
        ]
        names = [printable(name) for name in self.order]
        width = max(map(len, names))
        for name, step in zip(names, [None, *self.steps], strict=True):
            lines.append(f"  {name:<{width}}" + ("" if step is None else f"  {step:.6g}"))
        return "\n".join(line.rstrip() for line in lines)

    def _kind(self) -> str:
        return "exact" if self.exact else f"not proven best, bound {self.bound:.6g}"


def order_tasks(
    similarity: Numbers,
    *,
    tasks: Sequence[TaskName] | None = None,
    start: TaskName | None = None,
    exact: bool | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> TaskOrder:
    """The order of tasks with the largest sum of similarities between neighbours.

    That is a path through all tasks, not a cycle: nothing is asked of the last task and the first one.
    After Data-CUBE (Min et al., arXiv 2401.03563), which trains tasks one after the other in such an
    order, found by simulated annealing. The moves and the schedule here are this package's own, not that
    paper's: a stretch turned round or two tasks exchanged; first temperature the mean change of 100
    moves, 100 T moves at each temperature, the next one 0.995 times it, until nothing moves any more or
    after 1400 of them; then single moves while one helps. It starts from the best order of "always on to
    the most similar task left" over all starts, and is never worse. The exact search is the dynamic
    programme of Held and Karp over sets of tasks.

    Without ``start`` an order and its reverse are worth the same; the one that begins with the task that
    comes first in the matrix is returned. Ctrl-C ends the computation within about 50 ms if it runs in
    the main thread.

    Args:
        similarity: [T, T] array or tensor, larger is more alike, symmetric up to 1e-5 of its largest
            entry; the diagonal is not used. See ``from_embeddings``, ``from_gram``, ``from_affinity``.
        tasks: names of the tasks, 0 to T - 1 by default.
        start: the task to begin with, by its name, or by its index where the names are strings.
        exact: True: the exact search, at most 22 tasks (8 bytes (T - 1) 2^(T - 1) of memory, 352 MB for
            22). False: annealing. None: exact up to 18 tasks (18 MB), annealing beyond.
        seed: of the annealing, from 0 to 2^64 - 1. The same seed gives the same order.
        progress: called with a fraction up to 1 about every 100 ms.

    Returns:
        The order, its similarities, and what to compare them with.

    Raises:
        TypeError: similarity does not hold real numbers.
        ValueError: it is not square, symmetric or finite, names do not fit, or there are too many tasks
            for the exact search.
        ImportError: flatmtl was installed without its compiled parts.
    """
    names, matrix = _read(similarity, tasks)
    n = len(names)
    first = -1 if start is None else names.index(start, "start")
    if exact not in (None, True, False):
        raise ValueError(f"exact must be True, False or None, got {exact!r}")
    if exact and n > MOST:
        raise ValueError(f"exact must be None or False for more than {MOST} tasks, got {n} tasks")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, got {seed!r}")
    core = _core()
    proven = n <= QUICK if exact is None else bool(exact)
    nearest: list[int] = core.order_by_nearest(matrix, start=first)
    if proven:
        found: list[int] = core.order_exact(matrix, start=first, progress=progress)
    else:
        found = core.order_by_annealing(
            matrix, nearest, start=first, seed=int(seed), progress=progress
        )
    if _sum(matrix, found) < _sum(matrix, nearest):  # by rounding
        found = nearest
    if first < 0 and found[-1] < found[0]:
        found = found[::-1]
    if progress is not None:
        progress(1.0)
    total = _sum(matrix, found)
    bound = total if proven else max(total, _bound(matrix))
    return TaskOrder(
        order=list(names.group(found)),
        indices=list(found),
        steps=_steps(matrix, found),
        similarity=total,
        nearest_neighbour=_sum(matrix, nearest),
        bound=bound,
        exact=total == bound,
    )


def _read(similarity: Numbers, tasks: Sequence[TaskName] | None) -> tuple[Tasks, Floats]:
    matrix = square("similarity", similarity)
    names = Tasks(range(len(matrix)) if tasks is None else tasks)
    if len(names) != len(matrix):
        raise ValueError(
            f"tasks must name the {len(matrix)} tasks of the matrix, got {len(names)} names"
        )
    np.fill_diagonal(matrix, 0)
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        a, b = bad[0]
        raise ValueError(
            f"similarity must be finite, got {matrix[a, b]} at [{a}, {b}] (tasks {names.names[a]!r} and "
            f"{names.names[b]!r}): leave the task out, or fill in a value of your own"
        )
    with np.errstate(over="ignore"):
        total = np.abs(matrix).sum()
    if not np.isfinite(total):
        raise ValueError("similarity must have entries whose sum is finite: scale the matrix down")
    remedy = ": for affinities, which have a direction, take flatmtl.curriculum.from_affinity"
    return names, symmetric("similarity", matrix, remedy)


def _steps(matrix: Floats, path: list[int]) -> list[float]:
    return [float(matrix[a, b]) for a, b in pairwise(path)]


def _sum(matrix: Floats, path: list[int]) -> float:
    return math.fsum(_steps(matrix, path))


def _bound(matrix: Floats) -> float:
    """No path has a larger sum: a path is a spanning tree, and this is the largest one's (Prim)."""
    reach = matrix[0].copy()
    reach[0] = -np.inf
    outside = np.arange(len(matrix)) > 0
    total = []
    for _ in range(len(matrix) - 1):
        nearest = int(reach.argmax())
        total.append(float(reach[nearest]))
        outside[nearest] = False
        reach = np.where(outside, np.maximum(reach, matrix[nearest]), -np.inf)
    return math.fsum(total)


def _core() -> ModuleType:
    try:
        from flatmtl import _core
    except ImportError as error:
        raise ImportError(
            "order_tasks needs flatmtl's compiled parts: install a C++ compiler (g++), then flatmtl again"
        ) from error
    return _core
