"""Task names and their places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np

from flatmtl.losses import TaskName


class Tasks:
    """The tasks of a problem; each is meant by its name, or by its index where names are strings."""

    def __init__(self, names: Sequence[TaskName]) -> None:
        self.names = [self._name(name) for name in names]
        if len(set(self.names)) < len(self.names):
            twice = next(x for x in self.names if self.names.count(x) > 1)
            raise ValueError(f"tasks must have different names, got {twice!r} twice")
        self._at = {name: i for i, name in enumerate(self.names)}
        self._indices = all(isinstance(name, str) for name in self.names)

    @staticmethod
    def _name(name: object) -> TaskName:
        if isinstance(name, str):
            return str(name)
        if isinstance(name, Integral) and not isinstance(name, (bool, np.bool_)):
            return int(name)
        raise ValueError(f"tasks must be named by strings or integers, got {name!r}")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: object, where: str) -> int:
        """The place of a task; ``where`` names the argument that it came in."""
        key = self._name(name)
        if key in self._at:
            return self._at[key]
        if self._indices and isinstance(key, int) and 0 <= key < len(self.names):
            return key
        known = ", ".join(repr(x) for x in self.names[:12]) + (", ..." if len(self) > 12 else "")
        raise ValueError(f"{where} must name tasks out of {known}; got {name!r}")

    def indices(self, group: object, where: str) -> tuple[int, ...]:
        """The places of a group's tasks, ascending."""
        if isinstance(group, (str, bytes)) or not isinstance(group, Iterable):
            raise ValueError(f"{where} must hold groups such as ('a', 'b'), got {group!r}")
        found = [self.index(name, where) for name in group]
        if not found:
            raise ValueError(f"{where} must hold groups of at least one task, got an empty one")
        if len(set(found)) < len(found):
            raise ValueError(f"{where} must name a task once in a group, got {tuple(group)!r}")
        return tuple(sorted(found))

    def group(self, indices: Iterable[int]) -> tuple[TaskName, ...]:
        """The names at these places."""
        return tuple(self.names[i] for i in indices)


def mask(indices: Iterable[int]) -> int:
    """A set of places as bits."""
    return sum(1 << i for i in indices)


def members(bits: int) -> tuple[int, ...]:
    """The places of a mask's bits, ascending."""
    return tuple(i for i in range(bits.bit_length()) if bits >> i & 1)
