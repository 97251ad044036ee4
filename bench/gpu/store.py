"""bench/results/<device>.json: one entry a part, rewritten whenever a part has got further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu import machine

RESULTS = Path(__file__).parents[1] / "results"
Record = dict[str, Any]


def path_for(device: str, quick: bool) -> Path:
    """Where the results of this machine lie; small runs never over a real one."""
    name = machine.short_name(machine.describe(device))
    return RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")


def load(path: Path) -> Record:
    """What is there; {} without a file."""
    return json.loads(path.read_text()) if path.exists() else {}


class Part:
    """The results of one part; the other parts' stay as they are.

    Attributes:
        records: what was measured.
        missing: what was not for want of time.
    """

    def __init__(self, name: str, device: str, path: Path) -> None:
        self.records: list[Record] = []
        self.missing: list[str] = []
        self._name, self._path = name, path
        self._about: Record = {
            "machine": machine.describe(device),
            "clocks_before": machine.clocks(device),
        }

    def note(self, **values: object) -> None:
        """Keeps something about the part as a whole."""
        self._about.update(values)

    def save(self) -> None:
        """Writes what there is by now."""
        results = load(self._path)
        results[self._name] = {
            **self._about,
            "records": self.records,
            "missing": self.missing,
        }
        self._path.parent.mkdir(exist_ok=True)
        text = json.dumps(results, indent=1)
        whole = self._path.with_suffix(".tmp")
        whole.write_text(text)
        whole.replace(self._path)  # a run that is killed here leaves the old file
