"""Task names as text."""

from __future__ import annotations

from collections.abc import Sequence

from flatmtl.losses import TaskName


def printable(task: TaskName) -> str:
    """The name on one line, however hostile."""
    text = str(task)
    return text if text.isprintable() else repr(text)[1:-1]


def known(tasks: Sequence[TaskName], names: Sequence[str]) -> list[TaskName]:
    """The tasks that are called so; a number may be the name of an int or of a string."""
    called = {str(task): task for task in tasks}
    strange = [name for name in names if name not in called]
    if strange:
        some = ", ".join(map(str, tasks[:8])) + (", ..." if len(tasks) > 8 else "")
        raise ValueError(f"unknown task {strange[0]!r}; the tasks are {some}")
    return [called[name] for name in names]
