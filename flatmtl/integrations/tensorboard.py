"""A ``History`` as TensorBoard scalars."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np

from flatmtl.history import History

# What is written of each task, and its name in the history's arrays.
_BY_TASK = (
    ("loss", "losses"),
    ("weight", "weights"),
    ("flat_weight", "flat_weights"),
    ("norm", "norms"),
    ("sharpness", "sharpness"),
)


class Scalars(Protocol):
    """What of a ``torch.utils.tensorboard.SummaryWriter`` is used."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any:  # noqa: ANN401
        """Writes one number."""


class HistoryWriter:
    """Writes the steps of a history that it has not written yet.

    The tags are ``<prefix>/loss/<task>``, ``weight``, ``flat_weight``, ``norm`` and ``sharpness``
    likewise, ``<prefix>/conflict`` (the share of pairs of tasks in conflict) and ``<prefix>/cosine`` (the
    mean over the pairs). What is missing (NaN) is left out. ::

        writer = HistoryWriter(SummaryWriter("runs/one"))
        for epoch in range(epochs):
            ...
            writer.write(optimizer.history)

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter`` (``pip install 'flatmtl[tensorboard]'``), or
            anything with its ``add_scalar``. Flushing and closing it is left to you.
        prefix: of the tags; with "" each kind of number is a section of its own in TensorBoard.
        offset: added to the steps' numbers: those made before a resumed run.

    Attributes:
        lost: how many steps were gone before they could be written.

    Raises:
        TypeError: ``writer`` cannot write scalars.
    """

    def __init__(self, writer: Scalars, prefix: str = "flatmtl", *, offset: int = 0) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "writer must be a torch.utils.tensorboard.SummaryWriter, got "
                f"{type(writer).__name__}"
            )
        self.writer = writer
        self.prefix = prefix
        self.offset = offset
        self.lost = 0
        self._history: History | None = None
        self._next = 0  # the first step not written yet

    def write(self, history: History) -> int:
        """Writes the new steps; reads the device once, and waits for it.

        Args:
            history: always the same one.

        Returns:
            How many steps were written.

        Raises:
            ValueError: it is another history than before, whose steps would get the same tags and numbers.

        Warns:
            UserWarning: steps had left the ring, or were cleared, before they were written; the first
                time only. ``lost`` counts all of them.
        """
        if self._history not in (None, history):
            raise ValueError(
                "history must be the one written before: give another one a HistoryWriter of its own, "
                "with another prefix, or with an offset if it goes on where the first one ended"
            )
        self._history, due = history, self._next
        arrays = history.arrays(since=due)
        steps = arrays["step"]
        if not len(steps):
            return 0
        self._next = int(steps[-1]) + 1
        if steps[0] > due:
            self._missed(due, int(steps[0]), history.capacity)
        for row, step in enumerate(steps.tolist()):
            for tag, what in _BY_TASK:
                for task, value in zip(history.tasks, arrays[what][row], strict=True):
                    self._add(f"{tag}/{task}", value, step)
            self._add("conflict", arrays["conflict"][row], step)
            self._add("cosine", _mean_of_pairs(arrays["cosines"][row]), step)
        return len(steps)

    def _missed(self, due: int, first: int, capacity: int) -> None:
        if not self.lost:
            warnings.warn(
                f"steps {due} to {first - 1} were gone from the history before they were written: write "
                f"more often than every {capacity} steps, or keep more of them (said once)",
                stacklevel=3,
            )
        self.lost += first - due

    def _add(self, tag: str, value: float, step: int) -> None:
        if not np.isnan(value):
            name = f"{self.prefix}/{tag}" if self.prefix else tag
            self.writer.add_scalar(name, float(value), step + self.offset)


def _mean_of_pairs(cosines: np.ndarray) -> float:
    """The mean of the cosines [T, T] above the diagonal that are there; NaN without one."""
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    known = pairs[~np.isnan(pairs)]
    return float(known.mean()) if len(known) else np.nan
