"""A record as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flatmtl.affinity._names import printable

if TYPE_CHECKING:
    from flatmtl.affinity.record import AffinityRecord

_WIDEST = 9  # names up to here can stand over their column
_MOST_COLUMNS = 12  # as many fit on a line of a terminal
_STRONGEST = 8


def table(record: AffinityRecord) -> str:
    """The affinities with their standard errors, the groups, and the caveats."""
    names = [printable(task) for task in record.tasks]
    matrix, error = record.matrix(), record.standard_error()
    factor, unit = _unit(matrix)
    lines = ["row = recipient (its loss), column = source (its gradient)"]
    lines += [_about(record, bool(np.isfinite(error).any())) + unit, ""]
    if len(names) <= _MOST_COLUMNS:
        lines += _grid(names, names, matrix / factor, error / factor)
    else:
        lines += _strongest(names, matrix / factor, error / factor)
    if record.groups and len(names) <= 2 * _MOST_COLUMNS:
        heads = ["+".join(printable(task) for task in group) for group in record.groups]
        joint, its_error = record.group_matrix(), record.group_standard_error()
        lines += ["", "after a joint step of a group:"]
        lines += _grid(names, heads, joint / factor, its_error / factor)
    lines += [f"caveat: {line}" for line in record.caveats()]
    return "\n".join(lines)


def _unit(matrix: np.ndarray) -> tuple[float, str]:
    """What to divide by so that two decimals say enough, from the entries off the diagonal."""
    others = np.abs(matrix[~np.eye(len(matrix), dtype=bool)])
    largest = others[np.isfinite(others)].max(initial=0.0)
    if largest == 0.0 or 0.1 <= largest < 1e4:
        return 1.0, ""
    power = math.floor(math.log10(largest))
    return 10.0**power, f", in 1e{power}"


def _about(record: AffinityRecord, errors: bool) -> str:
    known = record.metadata
    if known.get("mode") == "given":
        return f"affinity of {len(record.tasks)} tasks, given"
    epochs = len(record.steps)
    parts = [f"{len(record.tasks)} tasks", f"{int(record.steps.sum())} measured steps"]
    parts += [f"{epochs} {'epoch' if epochs == 1 else 'epochs'}"]
    parts += [str(known["mode"])] if "mode" in known else []
    parts += [f"{known['look_ahead']} look-ahead"] if known.get("look_ahead") else []
    return f"affinity of {', '.join(parts)}" + ("; mean ± standard error" if errors else "")


def _grid(
    rows: Sequence[str], columns: Sequence[str], matrix: np.ndarray, error: np.ndarray
) -> list[str]:
    numbered = max(map(len, columns)) > _WIDEST
    left = max(map(len, rows))
    square = numbered and list(rows) == list(columns)
    labels = [f"{name:<{left}}" for name in rows]
    if square:
        labels = [f"{n:>2} {label}" for n, label in enumerate(labels, 1)]
    heads = [str(n) for n in range(1, len(columns) + 1)] if numbered else list(columns)
    with_errors = bool(np.isfinite(error).any()) and len(columns) <= 6
    cells = [
        [_cell(v, e, with_errors) for v, e in zip(*pair, strict=True)]
        for pair in zip(matrix.tolist(), error.tolist(), strict=True)
    ]
    width = max(map(len, [*heads, *(cell for row in cells for cell in row)])) + 2
    lines = [" " * len(labels[0]) + "".join(f"{head:>{width}}" for head in heads)]
    for label, row in zip(labels, cells, strict=True):
        lines.append(label + "".join(f"{cell:>{width}}" for cell in row))
    if numbered and not square:
        lines += [f"{n:>2} = {name}" for n, name in enumerate(columns, 1)]
    return lines


def _strongest(names: Sequence[str], matrix: np.ndarray, error: np.ndarray) -> list[str]:
    """The pairs at both ends, where the table would be too wide to read."""
    at = np.argwhere(np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool))
    order = np.argsort([matrix[i, j] for i, j in at], kind="stable")
    low, high = order[:_STRONGEST], order[::-1][:_STRONGEST]
    lines: list[str] = []
    for head, chosen in (("largest (recipient <- source):", high), ("smallest:", low)):
        lines.append(head)
        for i, j in at[chosen]:
            lines.append(f"  {_cell(matrix[i, j], error[i, j], True):<24}{names[i]} <- {names[j]}")
    return lines


def _cell(value: float, error: float, with_error: bool) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.2f}" + (f" ± {error:.2f}" if with_error and np.isfinite(error) else "")
