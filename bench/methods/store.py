"""Results on disk: a file for each finished cell, and all of them in one for the docs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.methods.cells import Cell

Result = dict[str, Any]


def write(path: Path, content: object, indent: int | None = None) -> None:
    """A JSON file; the old one stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(content, indent=indent) + "\n")
    new.replace(path)


class Store:
    """The cells of a folder. A cell whose file is absent, broken or of another fingerprint is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, cell: Cell, fingerprint: str, metrics: list[float], seconds: float) -> Result:
        """Keeps a finished cell."""
        result = {
            **asdict(cell),
            "fingerprint": fingerprint,
            "seconds": round(seconds, 2),
            "metrics": [float(f"{value:.6g}") for value in metrics],
        }
        write(self._path(cell), result)
        return result

    def fail(self, cell: Cell, fingerprint: str, error: str) -> Result:
        """Keeps a cell's error; it runs again in the next call."""
        result = {**asdict(cell), "fingerprint": fingerprint, "error": error}
        write(self._path(cell), result)
        return result

    def get(self, cell: Cell, fingerprint: str) -> Result | None:
        """A cell, finished or failed; None if it has to run for the first time."""
        try:
            result = json.loads(self._path(cell).read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(result, dict) and result.get("fingerprint") == fingerprint
        return result if known else None

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"


def write_all(path: Path, about: dict[str, Any], results: list[Result]) -> None:
    """One file for the docs: a line a cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in results)
    new = path.with_name(f"{path.name}.new")
    new.write_text(f'{{"about": {json.dumps(about)},\n"cells": [\n{lines}\n]}}\n')
    new.replace(path)
