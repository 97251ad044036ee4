"""A record as one npz file, and a matrix as CSV."""

from __future__ import annotations

import csv
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmtl.losses import TaskName

if TYPE_CHECKING:
    from flatmtl.affinity.record import AffinityRecord

_FORMAT = "flatmtl affinity record"
_VERSION = 1
_PARTS = ("mean", "m2", "count")
_SINGLE = ("group_mean", "group_m2", "group_count", "steps")
CORNER = "recipient\\source"


def save(record: AffinityRecord, path: str | PathLike[str]) -> None:
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "tasks": list(record.tasks),
        "groups": [list(group) for group in record.groups],
        "quantities": record.quantities,
        "metadata": record.metadata,
    }
    arrays = {name: getattr(record, name) for name in _SINGLE}
    for part in _PARTS:
        for quantity, values in getattr(record, part).items():
            arrays[f"{part}.{quantity}"] = values
    if record.overlap is not None:
        arrays["overlap"] = record.overlap
    with Path(path).open("wb") as file:  # a path would get ".npz" added
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def load(path: str | PathLike[str]) -> dict[str, Any]:
    """The arguments of the constructor."""
    wrong = f"path must be an npz file that AffinityRecord.save wrote, got {fspath(path)!r}"
    with Path(path).open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{wrong}: not an npz file, or cut short")
        file.seek(0)
        try:
            arrays = dict(np.load(file, allow_pickle=False))
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{wrong}: {error}") from None
    if "about" not in arrays:
        raise ValueError(f"{wrong}: without metadata (it holds {', '.join(sorted(arrays))})")
    try:
        about = json.loads(str(arrays["about"]))
    except ValueError as error:
        raise ValueError(f"{wrong}: its metadata cannot be read: {error}") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError(f"{wrong}: its metadata are those of something else")
    if about["version"] != _VERSION:
        raise ValueError(f"{wrong}: of format {about['version']}, this flatmtl reads {_VERSION}")
    try:
        found = {name: about[name] for name in ("tasks", "groups", "metadata")}
        found |= {name: arrays[name] for name in _SINGLE}
        for part in _PARTS:
            found[part] = {q: arrays[f"{part}.{q}"] for q in about["quantities"]}
    except KeyError as error:
        raise ValueError(f"{wrong}: {error} is missing in it") from None
    return {**found, "overlap": arrays.get("overlap")}


def write_matrix(path: str | PathLike[str], tasks: Sequence[TaskName], matrix: np.ndarray) -> None:
    names = [str(task) for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tasks must read differently in a CSV file, got {twice} twice")
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([CORNER, *names])
        for name, row in zip(names, matrix.tolist(), strict=True):
            writer.writerow([name, *map(repr, row)])


def read_matrix(path: str | PathLike[str]) -> tuple[list[TaskName], np.ndarray]:
    where = fspath(path)
    with Path(path).open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet's mark goes
        try:
            rows = [row for row in csv.reader(file) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{where} must be a CSV file in UTF-8, got {error}") from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ValueError(
            f"{where} must have the tasks' names in its first row and column, separated by commas"
        )
    names = rows[0][1:]
    if rows[0][0].replace(" ", "").lower() == "source\\recipient":
        raise ValueError(
            f"{where} must have recipients in its rows and sources in its columns; its corner says "
            "the opposite: transpose it"
        )
    if len(rows) != len(names) + 1:
        raise ValueError(
            f"{where} must be square, got {len(rows) - 1} rows below {len(names)} column names"
        )
    for name, row in zip(names, rows[1:], strict=True):
        if row[0] != name:
            raise ValueError(
                f"{where} must name the same tasks in rows and columns, in one order, "
                f"got row {row[0]!r} where column {name!r} has its place"
            )
        if len(row) != len(names) + 1:
            raise ValueError(
                f"{where} must have {len(names)} cells in each row, got {len(row) - 1} in {name!r}"
            )
    matrix = [
        [_cell(where, names, i, j, text) for j, text in enumerate(row[1:])]
        for i, row in enumerate(rows[1:])
    ]
    tasks: list[TaskName] = list(names)
    if all(_is_whole(name) for name in names):
        tasks = [int(name) for name in names]
    return tasks, np.array(matrix)


def _cell(where: str, names: list[str], row: int, column: int, text: str) -> float:
    at = f"row {names[row]!r}, column {names[column]!r}"
    if not text.strip():
        if row == column:
            return math.nan
        raise ValueError(f"{where} must have a number or nan in every cell, got none in {at}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where} must hold numbers, got {text!r} in {at}") from None
    if math.isinf(value):
        raise ValueError(f"{where} must hold finite numbers, got {text.strip()} in {at}")
    return value


def _is_whole(name: str) -> bool:
    try:
        return str(int(name)) == name
    except ValueError:
        return False
