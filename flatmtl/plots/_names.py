"""Task names as they can stand in a picture."""

from __future__ import annotations

from collections.abc import Iterable

from flatmtl.affinity._names import printable

LONGEST = 24


def shown(tasks: Iterable[int | str], longest: int = LONGEST) -> list[str]:
    """On one line, the middle of long ones left out, and with dollars that are no mathematics."""
    found = []
    for task in tasks:
        name = printable(task)
        if len(name) > longest:  # names that belong together begin alike and differ at the end
            name = f"{name[: longest // 2]}…{name[len(name) - (longest - longest // 2) + 1 :]}"
        found.append(name.replace("$", r"\$"))
    return found
