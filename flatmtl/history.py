"""What the last steps did: a ring of diagnostics on the device, read only when asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flatmtl.losses import TaskName

if TYPE_CHECKING:
    import pandas as pd

_VECTORS = ("losses", "weights", "flat_weights", "norms", "sharpness")
_SCALARS = ("status", "flat_status", "residual")
_WHOLE = ("status", "flat_status")


class History:
    """The diagnostics of the last ``capacity`` steps, in one buffer on the device.

    ``record`` copies and counts on the device alone: it reads nothing on the host, and a captured CUDA
    graph that holds it fills the ring at every replay. ``len``, ``arrays`` and ``pandas`` read the
    device (and wait for it). A step takes 8 (5 T + 3 + T (T + 1)/2) bytes: 192 for 3 tasks, 8 KB for
    40, 1.5 MB for 617 (the Gram matrix's upper triangle, of which the cosines are made on reading).

    Where several processes train, every one of them has a history. Weights, norms, cosines, status and
    residual are of the gradients of all, the same on each. So are the losses (means over all processes)
    where the step sends them: with a weighting that looks at losses, and at steps of one backward pass
    for all tasks (``weights_every``). At other steps the losses are this process's own, and so is the
    sharpness at all steps.

    Args:
        capacity: how many steps are kept.
        tasks: the tasks' names, in order.
        device: where the tensors to be recorded are.

    Attributes:
        capacity: as given.
        tasks: as given, a list.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    def __init__(
        self, capacity: int, tasks: Sequence[TaskName], device: torch.device | str = "cpu"
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity must be an int, got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
        for name in tasks:
            if isinstance(name, bool) or not isinstance(name, (int, str)):
                raise TypeError(f"tasks must be ints or strings, got {name!r}")
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks must be one or more different names, got {list(tasks)}")
        self.capacity = capacity
        self.tasks = list(tasks)
        # The ring and, behind it, two int64 counters, so that one copy to the host is one state.
        memory = torch.full(
            (capacity * self._width + 2,), torch.nan, dtype=torch.float64, device=device
        )
        memory[-2:].view(torch.int64).zero_()
        self._place(memory)

    @property
    def _width(self) -> int:
        tasks = len(self.tasks)
        return len(_VECTORS) * tasks + len(_SCALARS) + tasks * (tasks + 1) // 2

    def _place(self, memory: Tensor) -> None:
        """Takes ``memory`` as the buffer and makes what ``record`` needs beside it."""
        device, tasks = memory.device, len(self.tasks)
        self._memory = memory
        self._ring = memory[:-2].view(self.capacity, self._width)
        counters = memory[-2:].view(torch.int64)
        self._count = counters[:1]  # steps recorded so far
        self._first = counters[1:]  # the first one not cleared away
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._capacity = torch.full_like(self._position, self.capacity)
        self._one = torch.ones_like(self._position)
        self._row = torch.empty(1, self._width, dtype=torch.float64, device=device)
        fields = self._row[0].split(
            [tasks] * len(_VECTORS) + [1] * len(_SCALARS) + [tasks * (tasks + 1) // 2]
        )
        self._fields = dict(zip((*_VECTORS, *_SCALARS, "gram"), fields, strict=True))
        for name in _SCALARS:
            self._fields[name] = self._fields[name].squeeze(0)
        self._shapes = {name: field.shape for name, field in self._fields.items()}
        self._shapes["gram"] = torch.Size([tasks, tasks])
        rows, columns = torch.triu_indices(tasks, tasks, device=device)
        self._triangle = rows * tasks + columns

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "tasks": self.tasks, "memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.capacity, self.tasks = state["capacity"], state["tasks"]
        self._place(state["memory"])

    def __repr__(self) -> str:
        return f"History(capacity={self.capacity}, tasks={self.tasks}, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """Where the ring is."""
        return self._memory.device

    @property
    def nbytes(self) -> int:
        """What the ring takes on its device."""
        return self._memory.nbytes

    # ------------------------------------------------------------ writing

    @torch.no_grad()
    def record(
        self,
        *,
        losses: Tensor,
        weights: Tensor | None = None,
        flat_weights: Tensor | None = None,
        norms: Tensor | None = None,
        gram: Tensor | None = None,
        sharpness: Tensor | None = None,
        status: Tensor | None = None,
        flat_status: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """Takes in one step; what is None, and a task's NaN, is kept as missing.

        All of any floating-point dtype and on the history's device; copied, never kept.

        Args:
            losses: [T], the clean losses; NaN for a task that this batch lacks.
            weights: [T], of the task gradients.
            flat_weights: [T], of the flat parts.
            norms: [T], of the task gradients.
            gram: [T, T], of the task gradients; its upper triangle is kept.
            sharpness: [T], losses at the perturbed points minus the clean ones.
            status: 0-dim, integer: the bits of the solve for ``weights``.
            flat_status: 0-dim, integer: those of the solve for ``flat_weights``.
            residual: 0-dim: the residual of the solve for ``weights``.

        Raises:
            ValueError, TypeError: a tensor does not fit. Nothing is recorded then.
        """
        if losses is None:
            raise TypeError("losses must be a Tensor, got None")
        given = {
            "losses": losses,
            "weights": weights,
            "flat_weights": flat_weights,
            "norms": norms,
            "sharpness": sharpness,
            "status": status,
            "flat_status": flat_status,
            "residual": residual,
            "gram": gram,
        }
        targets, sources = [], []
        for name, value in given.items():
            if value is not None:
                self._check(name, value)
                targets.append(self._fields[name])
                sources.append(value if name != "gram" else value.take(self._triangle))
        if len(sources) < len(given):
            self._row.fill_(torch.nan)
        torch._foreach_copy_(targets, sources)
        # Where to write is known on the device alone: a replayed graph goes on by itself.
        torch.remainder(self._count, self._capacity, out=self._position)
        self._ring.index_copy_(0, self._position, self._row)
        self._count.add_(self._one)

    def _check(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        shape = self._shapes[name]
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)} ({len(self.tasks)} tasks), "
                f"got {list(value.shape)}"
            )
        if name in _WHOLE:
            if value.is_floating_point() or value.is_complex():
                raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
        elif not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {value.dtype}")
        if value.device != self._memory.device:
            raise ValueError(f"{name} must be on {self.device}, as the history, got {value.device}")

    def clear(self) -> None:
        """Forgets the steps; their numbers go on. Reads nothing on the host."""
        self._first.copy_(self._count)

    # ------------------------------------------------------------ reading

    def __len__(self) -> int:
        """How many steps are kept; waits for the device."""
        count, first = self._memory[-2:].cpu().view(torch.int64).tolist()
        return min(count - first, self.capacity)

    def arrays(self, since: int = 0) -> dict[str, np.ndarray]:
        """The kept steps, oldest first; copies the ring to the host once and waits for it.

        The cosines take 8 T^2 bytes a step: 3 MB for 617 tasks.

        Args:
            since: leaves out the steps before this number.

        Returns:
            "step": int64 [N], the step's number, from 0, counted over all steps ever recorded;
            "losses", "weights", "flat_weights", "norms", "sharpness": [N, T]; "cosines": [N, T, T],
            NaN beside a task whose gradient is zero or not finite, 1 on the diagonal of the others;
            "conflict": [N], the share of negative cosines among the pairs that have one, NaN without
            such a pair; "status", "flat_status": int64 [N], -1 where there was none; "residual": [N].
            All float64 but for the integers; missing values are NaN.
        """
        memory = self._memory.cpu().numpy()
        count, first = (int(n) for n in memory[-2:].view(np.int64))
        steps = np.arange(max(first, count - self.capacity, since), count, dtype=np.int64)
        # indexed by an array: copies, although on the CPU ``memory`` is the ring itself
        rows = memory[:-2].reshape(self.capacity, self._width)[steps % self.capacity]
        return {"step": steps, **self._columns(rows)}

    def _columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        tasks, start = len(self.tasks), 0
        found: dict[str, np.ndarray] = {}
        for name in _VECTORS:
            found[name] = rows[:, start : start + tasks].copy()
            start += tasks
        found["cosines"], found["conflict"] = _cosines(rows[:, start + len(_SCALARS) :], tasks)
        for name in _SCALARS:
            found[name] = rows[:, start].copy()
            start += 1
        for name in _WHOLE:
            found[name] = np.nan_to_num(found[name], nan=-1.0).astype(np.int64)
        return found

    def pandas(self, *, cosines: bool = True) -> pd.DataFrame:
        """The kept steps as a DataFrame, a row a step, indexed by the step's number.

        The columns have two levels, what and of which task: ``frame["losses"]`` is a frame with a
        column for each task, ``frame["conflict"]`` a series.

        Args:
            cosines: with the columns ``frame["cosines"]``, one for each pair of tasks, named
                ``"a|b"``; T (T - 1)/2 of them.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as missing:
            raise ImportError(
                "History.pandas needs pandas: pip install 'flatmtl[plots]' (arrays() does without)"
            ) from missing
        found = self.arrays()
        columns: dict[tuple[str, TaskName], np.ndarray] = {}
        for what in _VECTORS:
            for i, task in enumerate(self.tasks):
                columns[what, task] = found[what][:, i]
        if cosines:
            for (i, a), (j, b) in itertools.combinations(enumerate(self.tasks), 2):
                columns["cosines", f"{a}|{b}"] = found["cosines"][:, i, j]
        for what in ("conflict", *_SCALARS):
            columns[what, ""] = found[what]
        frame = pd.DataFrame(columns, index=pd.Index(found["step"], name="step"))
        frame.columns.names = ["what", "task"]
        return frame


def _cosines(triangles: np.ndarray, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Upper triangles of Gram matrices [N, T(T+1)/2] -> cosines [N, T, T], conflict shares [N]."""
    rows, columns = np.triu_indices(tasks)
    square = triangles[:, rows == columns]
    active = np.isfinite(square) & (square > 0)
    inverse = 1.0 / np.sqrt(np.where(active, square, np.nan))
    with np.errstate(invalid="ignore"):  # a product with an inactive task may be infinite
        upper = np.clip(triangles * inverse[:, rows] * inverse[:, columns], -1.0, 1.0)
    upper[:, rows == columns] = np.where(active, 1.0, np.nan)  # not 1 - 1e-16
    cosines = np.empty((len(triangles), tasks, tasks))
    cosines[:, rows, columns] = upper
    cosines[:, columns, rows] = upper
    pairs = upper[:, rows != columns]
    known = np.count_nonzero(~np.isnan(pairs), axis=1)
    negative = np.count_nonzero(pairs < 0, axis=1)
    return cosines, np.where(known > 0, negative / np.maximum(known, 1), np.nan)
