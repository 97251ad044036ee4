"""Task names as text."""

from __future__ import annotations

from flatmtl.losses import TaskName


def printable(task: TaskName) -> str:
    """The name on one line, however hostile."""
    text = str(task)
    return text if text.isprintable() else repr(text)[1:-1]
