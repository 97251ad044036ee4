"""The experiment of the demo: choose rho on validation pairs, compare methods on test pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from flatmtl.demo.train import LAST, METHODS, RunConfig, RunResult
from flatmtl.demo.workers import Workers

_SEARCH_SEED = 0


@dataclass(frozen=True)
class Settings:
    """How much the experiment trains."""

    pairs: tuple[int, int, int]  # train, validation, test
    seeds: int
    epochs: int
    rhos: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What the experiment found."""

    search: list[RunResult]  # one run for each candidate rho
    rho: float
    runs: list[RunResult]  # every method and seed


def search_configs(settings: Settings) -> list[RunConfig]:
    """One F-PCGrad run for each candidate rho.

    These are full runs: in the first epochs a smaller rho always looks better. The run of the rho
    that is chosen serves in the comparison, too.
    """
    return [RunConfig("f-pcgrad", _SEARCH_SEED, settings.epochs, rho) for rho in settings.rhos]


def comparison_configs(settings: Settings, rho: float) -> list[RunConfig]:
    """Every method and seed, the long runs first so that the workers end at about one time."""
    return [
        RunConfig(method, seed, settings.epochs, rho if method == "f-pcgrad" else 0.0)
        for method in reversed(METHODS)
        for seed in range(settings.seeds)
    ]


def run_experiment(
    settings: Settings,
    workers: Workers,
    on_step: Callable[[RunConfig], None],
    on_done: Callable[[RunResult], None],
) -> Outcome:
    """Runs the search, then what is left of the comparison."""
    search = workers.run(search_configs(settings), on_step, on_done)
    best = max(search, key=_validation_score)
    rho = best.config.rho
    rest = [c for c in comparison_configs(settings, rho) if c != best.config]
    return Outcome(search, rho, [best, *workers.run(rest, on_step, on_done)])


def percent(curve: list[list[float]]) -> list[float]:
    """Accuracy of each task over the last epochs of ``curve`` ([epochs][tasks])."""
    return [100.0 * mean(task) for task in zip(*curve[-LAST:], strict=True)]


def _validation_score(run: RunResult) -> float:
    return mean(percent(run.validation))
