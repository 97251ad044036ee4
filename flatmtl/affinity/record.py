"""What an affinity measurement has found, on the host."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flatmtl.affinity import _caveats, _files, _moments, _text
from flatmtl.losses import TaskName

QUANTITIES = ("affinity", "affinity_per_lr", "cosine", "first_order", "beyond_momentum")
ORIENTATION = "row = recipient, column = source"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class AffinityRecord:
    """Means, deviations and counts of what was measured, by epoch.

    Row = recipient (whose loss is measured), column = source (whose gradient made the step), everywhere.
    The arrays are copies and read-only. E epochs, T tasks, K groups of sources.

    Attributes:
        tasks: the tasks' names, T of them.
        groups: the sets of tasks whose joint step was measured, K of them.
        mean: quantity -> float64 [E, T, T], NaN where nothing was measured. "affinity" is
            1 - loss after / loss before, "affinity_per_lr" that divided by the learning rate, "cosine" the
            cosine of the two gradients; "first_order" and "beyond_momentum" where the probe has them.
        m2: quantity -> float64 [E, T, T], sums of squared deviations from ``mean``.
        count: quantity -> int64 [E, T, T], measured steps that have the pair.
        group_mean, group_m2, group_count: [E, T, K] of "affinity"; row = recipient, column = group.
        steps: int64 [E], measured steps of each epoch.
        metadata: what JSON can hold: "mode" ("exact", "first_order" or "given"), "look_ahead", "optimizer",
            "momentum", "every", "lr", "version", "orientation".
        overlap: float64 [T, T], the share of the recipient's labelled samples that the source has
            too, or None.

    Raises:
        TypeError: a name that is neither int nor str; metadata that JSON cannot hold.
        ValueError: names that come twice, unknown quantities or tasks, shapes that do not fit.
    """

    tasks: list[TaskName]
    groups: list[tuple[TaskName, ...]]
    mean: dict[str, np.ndarray]
    m2: dict[str, np.ndarray]
    count: dict[str, np.ndarray]
    group_mean: np.ndarray
    group_m2: np.ndarray
    group_count: np.ndarray
    steps: np.ndarray
    metadata: dict[str, Any]
    overlap: np.ndarray | None

    def __init__(
        self,
        *,
        tasks: Sequence[TaskName],
        mean: Mapping[str, ArrayLike],
        m2: Mapping[str, ArrayLike],
        count: Mapping[str, ArrayLike],
        steps: ArrayLike,
        groups: Sequence[Sequence[TaskName]] = (),
        group_mean: ArrayLike | None = None,
        group_m2: ArrayLike | None = None,
        group_count: ArrayLike | None = None,
        metadata: Mapping[str, Any] | None = None,
        overlap: ArrayLike | None = None,
    ) -> None:
        names = task_names(tasks)
        sets = [_group(group, names) for group in groups]
        each = _array("steps", steps, (-1,), np.int64)
        unknown = [name for name in mean if name not in QUANTITIES]
        if unknown or "affinity" not in mean:
            raise ValueError(
                f"mean must hold 'affinity' and else only {_quoted(QUANTITIES[1:])}, "
                f"got {_quoted(mean)}"
            )
        square = (len(each), len(names), len(names))
        oblong = (len(each), len(names), len(sets))
        self._put(tasks=names, groups=sets, steps=each, metadata=_metadata(metadata or {}))
        self._put(
            mean=_by_quantity("mean", mean, mean, square, np.float64),
            m2=_by_quantity("m2", m2, mean, square, np.float64),
            count=_by_quantity("count", count, mean, square, np.int64),
        )
        none = None if sets else np.zeros(oblong)
        self._put(
            group_mean=_array("group_mean", none if group_mean is None else group_mean, oblong),
            group_m2=_array("group_m2", none if group_m2 is None else group_m2, oblong),
            group_count=_array(
                "group_count", none if group_count is None else group_count, oblong, np.int64
            ),
            overlap=None if overlap is None else _array("overlap", overlap, square[1:]),
        )

    def _put(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def quantities(self) -> list[str]:
        """The names of what was measured; "affinity" is always one of them."""
        return list(self.mean)

    # ------------------------------------------------------------ reading

    def matrix(
        self,
        quantity: str = "affinity",
        *,
        epochs: int | slice | None = None,
        normalise: bool = False,
    ) -> np.ndarray:
        """The mean over the measured steps of the epochs, each step counting alike.

        Args:
            quantity: one of ``quantities``.
            epochs: one epoch, counted from 0 or from the end, or a slice of them; None: all.
            normalise: moves and scales each row so that its entries off the diagonal have mean 0 and
                deviation 1. Selection follows the rows that are spread widely; normalised rows have
                the same say. A constant row becomes 0.

        Returns:
            float64 [T, T], row = recipient, column = source; NaN where nothing was measured.

        Raises:
            ValueError: no such quantity or epochs.
        """
        found = self._merged(quantity, epochs)[0]
        return _normalised(found) if normalise else found

    def counts(self, quantity: str = "affinity", epochs: int | slice | None = None) -> np.ndarray:
        """int64 [T, T]: how many measured steps of the epochs each pair has."""
        return self._merged(quantity, epochs)[2]

    def standard_error(
        self, quantity: str = "affinity", epochs: int | slice | None = None
    ) -> np.ndarray:
        """float64 [T, T]: the standard error of ``matrix``; NaN below two measured steps.

        As if the steps were independent. Steps that follow one another are not: take it for a lower
        limit.
        """
        return _moments.standard_error(*self._merged(quantity, epochs)[1:])

    def by_epoch(self, quantity: str = "affinity") -> np.ndarray:
        """float64 [E, T, T]: the mean of each epoch, NaN where it measured nothing."""
        self._check(quantity)
        return np.where(self.count[quantity] > 0, self.mean[quantity], np.nan)

    def running(self, quantity: str = "affinity") -> np.ndarray:
        """float64 [E, T, T]: the mean over all epochs up to each one."""
        self._check(quantity)
        return _moments.running(self.mean[quantity], self.count[quantity])

    def group_matrix(self, epochs: int | slice | None = None) -> np.ndarray:
        """float64 [T, K]: the affinity of each group's joint step for each recipient."""
        return self._merged_groups(epochs)[0]

    def group_standard_error(self, epochs: int | slice | None = None) -> np.ndarray:
        """float64 [T, K]: the standard error of ``group_matrix``; NaN below two measured steps."""
        return _moments.standard_error(*self._merged_groups(epochs)[1:])

    def caveats(self) -> list[str]:
        """What to know before trusting the matrix, a sentence each; empty if nothing is known."""
        return _caveats.of(self)

    def __str__(self) -> str:
        return _text.table(self)

    def __repr__(self) -> str:
        return (
            f"AffinityRecord({len(self.tasks)} tasks, {len(self.groups)} groups, "
            f"{len(self.steps)} epochs, {int(self.steps.sum())} measured steps; {ORIENTATION})"
        )

    def _check(self, quantity: str) -> None:
        if quantity not in self.mean:
            raise ValueError(f"quantity must be one of {_quoted(self.mean)}, got {quantity!r}")

    def _merged(
        self, quantity: str, epochs: int | slice | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check(quantity)
        at = self._epochs(epochs)
        return _moments.merged(
            self.mean[quantity][at], self.m2[quantity][at], self.count[quantity][at]
        )

    def _merged_groups(
        self, epochs: int | slice | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = self._epochs(epochs)
        return _moments.merged(self.group_mean[at], self.group_m2[at], self.group_count[at])

    def _epochs(self, epochs: int | slice | None) -> slice:
        number = len(self.steps)
        if epochs is None:
            return slice(None)
        if isinstance(epochs, slice):
            if not len(range(*epochs.indices(number))):
                given = f"{epochs.start}:{epochs.stop}".replace("None", "")
                raise ValueError(f"epochs must choose some of the {number} epochs, got {given}")
            return epochs
        if isinstance(epochs, bool) or not isinstance(epochs, int | np.integer):
            raise TypeError(f"epochs must be None, an int or a slice, got {epochs!r}")
        if not -number <= epochs < number:
            raise ValueError(f"epochs must be one of the {number} epochs, got {epochs}")
        first = int(epochs) % number
        return slice(first, first + 1)

    # ------------------------------------------------------------ files

    def save(self, path: str | PathLike[str]) -> None:
        """Writes all of it to one npz file, under exactly this name; nothing in it is pickled."""
        _files.save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AffinityRecord:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file.
        """
        return cls(**_files.load(path))

    def write_csv(self, path: str | PathLike[str], quantity: str = "affinity") -> None:
        """Writes ``matrix(quantity)`` with the tasks' names in the first row and column.

        The corner says which is which; "nan" stands where nothing was measured.

        Raises:
            ValueError: no such quantity, or two names that read alike, such as 1 and "1".
        """
        _files.write_matrix(path, self.tasks, self.matrix(quantity))

    @classmethod
    def read_csv(cls, path: str | PathLike[str]) -> AffinityRecord:
        """Reads a matrix with the tasks' names in the first row and, in the same order, in the first column.

        Row = recipient, column = source. Names are strings, but ints where all of them are whole numbers.
        A pair that was not measured is "nan"; cells of the diagonal may be empty.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a table; the message says where.
        """
        tasks, matrix = _files.read_matrix(path)
        return cls.from_matrix(matrix, tasks)

    @classmethod
    def from_matrix(
        cls,
        matrix: ArrayLike,
        tasks: Sequence[TaskName] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AffinityRecord:
        """A record of a matrix that comes from elsewhere: one epoch, each pair measured once.

        Args:
            matrix: [T, T], row = recipient, column = source; NaN where nothing was measured.
            tasks: the names; None: 0 to T - 1.
            metadata: goes into the record's beside "mode": "given".

        Raises:
            ValueError: not square, infinite, or another number of names.
        """
        values = np.asarray(matrix, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(f"matrix must be square, got shape {list(values.shape)}")
        if np.isinf(values).any():
            raise ValueError("matrix must be finite, or NaN where nothing was measured, got inf")
        names = list(range(len(values))) if tasks is None else task_names(tasks)
        if len(names) != len(values):
            raise ValueError(f"tasks must be {len(values)} names, as matrix is, got {len(names)}")
        known = ~np.isnan(values[None])
        return cls(
            tasks=names,
            mean={"affinity": values[None]},
            m2={"affinity": np.zeros(known.shape)},
            count={"affinity": known.astype(np.int64)},
            steps=np.ones(1, np.int64),
            metadata={**(metadata or {}), "mode": "given"},
        )


def task_names(names: Sequence[TaskName]) -> list[TaskName]:
    """The names as plain ints and strings, each of them once."""
    found: list[TaskName] = []
    for name in names:
        if isinstance(name, bool | np.bool_) or not isinstance(name, int | str | np.integer):
            raise TypeError(f"tasks must be ints or strings, got {name!r}")
        found.append(str(name) if isinstance(name, str) else int(name))
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"tasks must have a name of their own each, got {twice!r} twice")
    return found


def _group(group: Sequence[TaskName], tasks: list[TaskName]) -> tuple[TaskName, ...]:
    if isinstance(group, str):
        raise TypeError(f"groups must be tuples of task names, got the string {group!r}")
    names = task_names(group)
    strange = [name for name in names if name not in tasks]
    if strange or not names:
        raise ValueError(f"groups must be sets of tasks, got {strange or tuple(group)!r}")
    return tuple(names)


def _by_quantity(
    name: str,
    given: Mapping[str, ArrayLike],
    wanted: Mapping[str, object],
    shape: tuple[int, ...],
    kind: type[np.generic],
) -> dict[str, np.ndarray]:
    if set(given) != set(wanted):
        raise ValueError(
            f"{name} must hold the quantities of mean, {_quoted(wanted)}, got {_quoted(given)}"
        )
    return {q: _array(f"{name}[{q!r}]", given[q], shape, kind) for q in wanted}


def _array(
    name: str,
    given: ArrayLike | None,
    shape: tuple[int, ...],
    kind: type[np.generic] = np.float64,
) -> np.ndarray:
    values = np.asarray(given)
    if values.dtype.kind not in "iufb":
        raise TypeError(f"{name} must be an array of numbers, got {values.dtype}")
    fits = len(values.shape) == len(shape) and all(
        want in (-1, is_) for want, is_ in zip(shape, values.shape, strict=True)
    )
    if not fits:
        wanted = ["epochs" if size < 0 else size for size in shape]
        raise ValueError(f"{name} must have shape {wanted}, got {list(values.shape)}")
    whole = issubclass(kind, np.integer)
    if whole and not (np.isfinite(values) & (values >= 0) & (values == np.floor(values))).all():
        raise ValueError(f"{name} must be whole numbers from 0 on, got {values.min()} as smallest")
    copy = np.array(values, dtype=kind)
    copy.flags.writeable = False
    return copy


def _metadata(given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # through JSON, so that a record is the same before and after it was saved
        found = json.loads(json.dumps(dict(given)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold, got {error}") from None
    stated = found.setdefault("orientation", ORIENTATION)
    if stated != ORIENTATION:
        raise ValueError(f"metadata['orientation'] must be {ORIENTATION!r}, got {stated!r}")
    return found


def _normalised(matrix: np.ndarray) -> np.ndarray:
    others = matrix.copy()
    np.fill_diagonal(others, np.nan)
    known = ~np.isnan(others)
    number = np.maximum(known.sum(axis=1, keepdims=True), 1)
    values = np.where(known, others, 0.0)
    centre = values.sum(axis=1, keepdims=True) / number
    apart = np.where(known, others - centre, 0.0)
    deviation = np.sqrt((apart**2).sum(axis=1, keepdims=True) / number)
    # a row that differs by rounding alone says nothing
    constant = deviation <= 1e-14 * np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    scaled = (matrix - centre) / np.where(constant, 1.0, deviation)
    return np.where(constant & ~np.isnan(matrix), 0.0, scaled)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
