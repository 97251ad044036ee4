"""The results of a run as arrays: metrics, Delta_m and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.methods.cells import DECOMPOSED, PLAIN, SINGLE
from bench.methods.collect import SHOWN, lower_is_better
from flatmtl.measures import delta_m, mean_rank

Row = tuple[str, str]  # method, sharpness


class Results:
    """What a results file has.

    Attributes:
        about: settings and versions.
        seeds: those of which any cell is there.
        datasets: those of which any cell is there, in the tables' order.
        failed: the cells that ended in an error.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.about = content["about"]
        self.failed = [cell for cell in content["cells"] if "error" in cell]
        done = [cell for cell in content["cells"] if "error" not in cell]
        self._test = {
            (c["dataset"], c["method"], c["sharpness"], c["seed"]): np.array(c["metrics"])
            for c in done
        }
        self.count = len(done)
        self.seconds = sum(cell["seconds"] for cell in done)
        self.seeds = sorted({cell["seed"] for cell in done})
        self.datasets = [name for name in SHOWN if any(cell["dataset"] == name for cell in done)]
        self._order = list(dict.fromkeys(cell["method"] for cell in done))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those of a file."""
        return cls(json.loads(path.read_text()))

    def methods(self, sharpness: str = PLAIN) -> list[str]:
        """The methods that every data set and seed has a result of, but for single-task training."""
        return [
            method
            for method in self._order
            if method != SINGLE
            and all(self.has(name, (method, sharpness)) for name in self.datasets)
        ]

    def partial(self, sharpness: str) -> list[str]:
        """The methods that have some of these results and not all."""
        known = {m for _, m, s, _ in self._test if s == sharpness} - {SINGLE}
        return sorted(known - set(self.methods(sharpness)))

    def has(self, dataset: str, row: Row) -> bool:
        """Whether every seed of a data set has a result."""
        return all((dataset, *row, seed) in self._test for seed in self.seeds)

    def rows(self) -> list[Row]:
        """The rows that are ranked: the complete ones, plain and with SAM."""
        return [
            (method, sharpness)
            for method in self._order
            for sharpness in (PLAIN, DECOMPOSED)
            if method in self.methods(sharpness)
        ]

    def metrics(self, dataset: str, row: Row) -> np.ndarray:
        """The test metrics of a row: [S, T]."""
        return np.stack([self._test[(dataset, *row, seed)] for seed in self.seeds])

    def delta(self, dataset: str, row: Row) -> np.ndarray:
        """Delta_m in % of every seed against that seed's single-task networks, negative is better: [S]."""
        single = self.metrics(dataset, (SINGLE, PLAIN))
        return np.array(
            [
                delta_m(found, base, lower_is_better=lower_is_better(dataset))
                for found, base in zip(self.metrics(dataset, row), single, strict=True)
            ]
        )

    def deltas(self, row: Row) -> np.ndarray:
        """Delta_m on every data set: [D, S]."""
        return np.stack([self.delta(name, row) for name in self.datasets])

    def ranks(self, dataset: str) -> dict[Row, float]:
        """The mean rank of every row, by metrics averaged over the seeds; 1 is the best."""
        rows = self.rows()
        table = np.stack([self.metrics(dataset, row).mean(0) for row in rows])  # [R, T]
        found = mean_rank(table, lower_is_better=lower_is_better(dataset))
        return {row: float(rank) for row, rank in zip(rows, found, strict=True)}
