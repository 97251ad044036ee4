"""Chooses rate and radius of each data set on validation samples of seed 0, with the mean of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

from bench.methods.cells import DECOMPOSED, PLAIN, Cell
from bench.methods.run import Job, finished, run
from bench.methods.settings import SCANNED_LR, SCANNED_RHO
from bench.methods.store import Result

Scanned = dict[
    str, dict[str, dict[str, Any]]
]  # data set -> "lr" or "rho" -> value -> validation metric


def scan(job: Job, workers: int, say: Callable[[str], None] = print) -> Scanned:
    """Trains with every rate, then with every radius at the best rate."""
    found: Scanned = {name: {} for name in job.settings}
    rates = _try(job, workers, say, "lr", PLAIN, {name: SCANNED_LR for name in job.settings})
    best: dict[str, float] = {}
    for name, by_rate in rates.items():
        found[name]["lr"] = {f"{rate:g}": value for rate, value in by_rate.items()}
        pick = min if name == "qm8" else max  # errors there
        best[name] = pick(by_rate, key=by_rate.__getitem__)
    chosen = {name: replace(job.settings[name], lr=best[name]) for name in best}
    radii = _try(
        replace(job, settings=chosen), workers, say, "rho", DECOMPOSED,
        {name: SCANNED_RHO[name] for name in chosen},
    )  # fmt: skip
    for name, by_radius in radii.items():
        found[name]["rho"] = {f"{rho:g}": value for rho, value in by_radius.items()}
    return found


def _try(
    job: Job,
    workers: int,
    say: Callable[[str], None],
    field: str,
    sharpness: str,
    values: dict[str, tuple[float, ...]],
) -> dict[str, dict[float, float]]:
    """data set -> value of the field -> validation metric, the mean over the tasks."""
    found: dict[str, dict[float, float]] = {name: {} for name in values}
    for at in range(max(map(len, values.values()))):
        tried = {name: choices[at] for name, choices in values.items() if at < len(choices)}
        settings = {name: replace(job.settings[name], **{field: v}) for name, v in tried.items()}
        out = job.out / "scan" / f"{field}{at}"
        one = replace(job, settings=settings, out=out, part="validation")
        cells = [Cell(name, "mean", sharpness, 0) for name in tried]
        run(one, cells, workers, say)
        for cell in cells:
            result = one.known(cell)
            if finished(result):
                found[cell.dataset][tried[cell.dataset]] = _score(result)
    return found


def _score(result: Result | None) -> float:
    assert result is not None
    return float(f"{mean(result['metrics']):.5g}")
