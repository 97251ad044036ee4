"""Gathers the cells of a run into the one file that the tables are made from."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.methods.cells import Cell
from bench.methods.nets import LOWER_IS_BETTER
from bench.methods.run import Job
from bench.methods.store import Result, write_all

#: of every data set: kind of data, the metric's name and its factor in the tables, names of the tasks
SHOWN: dict[str, dict[str, Any]] = {
    "multifashion": {
        "kind": "classes", "metric": "Accuracy, %", "tasks": ["top left", "bottom right"],
    },
    "fashion_mnist": {"kind": "classes", "metric": "Accuracy, %", "tasks": ["digit", "garment"]},
    "qm8": {
        "kind": "numbers", "metric": "Mean absolute error, 1e-3",
        "tasks": [f"{what}-{how}" for how in ("CC2", "PBE0", "CAM") for what in ("E1", "E2", "f1", "f2")],
    },
    "tox21": {
        "kind": "flags", "metric": "ROC-AUC, %",
        "tasks": [
            "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma",
            "SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
        ],
    },
    "adult": {
        "kind": "flags", "metric": "ROC-AUC, %",
        "tasks": ["income > 50K", "never married", "education-num >= 13"],
    },
}  # fmt: skip


def collect(job: Job, cells: list[Cell], path: Path) -> None:
    """Writes what there is of some cells, errors too; cells that never ran are missing."""
    results: list[Result] = [r for r in map(job.known, cells) if r is not None]
    about = {
        "settings": {name: asdict(setting) for name, setting in job.settings.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "asked": len(cells),
    }
    kept = [{k: v for k, v in result.items() if k != "fingerprint"} for result in results]
    write_all(path, about, kept)


def lower_is_better(dataset: str) -> bool:
    """Whether a data set's metric is an error."""
    return LOWER_IS_BETTER[SHOWN[dataset]["kind"]]
