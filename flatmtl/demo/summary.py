"""Numbers of the results table and the results file."""

from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from flatmtl.demo.experiment import Outcome, Settings, percent
from flatmtl.demo.multifashion import TASKS
from flatmtl.demo.train import METHODS, RunResult


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the latter is None with one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def over(cls, values: list[float]) -> "Spread":
        """The spread of ``values``."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table; accuracies in percent."""

    method: str
    tasks: list[Spread]
    average: Spread
    seconds_per_step: float
    own_share: float


@dataclass(frozen=True)
class Difference:
    """F-PCGrad minus PCGrad, in points of the average accuracy, seed by seed."""

    per_seed: list[float]
    spread: Spread
    verdict: str


def summarise(runs: list[RunResult]) -> list[MethodSummary]:
    """One summary for each method."""
    rows = []
    for method in METHODS:
        own = of_method(runs, method)
        finals = [percent(run.test) for run in own]  # [seeds][tasks]
        rows.append(
            MethodSummary(
                method,
                [Spread.over([final[k] for final in finals]) for k in range(len(TASKS))],
                Spread.over([mean(final) for final in finals]),
                mean(run.seconds_per_step for run in own),
                mean(run.own_share for run in own),
            )
        )
    return rows


def difference(runs: list[RunResult]) -> Difference:
    """What flatness changes, with a verdict that a few seeds can carry.

    It is called a gain (or a loss) only if all seeds agree in sign and the mean is at least two
    standard errors from zero.
    """
    flat, plain = (
        [mean(percent(run.test)) for run in of_method(runs, method)]
        for method in ("f-pcgrad", "pcgrad")
    )
    per_seed = [a - b for a, b in zip(flat, plain, strict=True)]
    spread = Spread.over(per_seed)
    if spread.deviation is None:
        verdict = "one seed only, so no statement"
    elif abs(spread.mean) < 2.0 * spread.deviation / len(per_seed) ** 0.5:
        verdict = "no clear difference"
    elif min(per_seed) > 0.0:
        verdict = "a gain in every seed"
    elif max(per_seed) < 0.0:
        verdict = "a loss in every seed"
    else:
        verdict = "no clear difference"
    return Difference(per_seed, spread, verdict)


def of_method(runs: list[RunResult], method: str) -> list[RunResult]:
    """The runs of one method, by seed."""
    return sorted((r for r in runs if r.config.method == method), key=lambda r: r.config.seed)


def as_json(settings: Settings, outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured, for the results file."""
    return {
        "tasks": list(TASKS),
        "settings": asdict(settings),
        "rho": outcome.rho,
        "rho_search": [asdict(run) for run in outcome.search],
        "runs": [asdict(run) for run in outcome.runs],
        "summary": [asdict(row) for row in summarise(outcome.runs)],
        "f_pcgrad_minus_pcgrad": asdict(difference(outcome.runs)),
    }
