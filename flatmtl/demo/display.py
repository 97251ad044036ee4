"""What the demo shows on the terminal: progress bars while it runs, tables at the end."""

from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from flatmtl.demo.experiment import (
    Outcome,
    Settings,
    comparison_configs,
    percent,
    search_configs,
)
from flatmtl.demo.multifashion import TASKS
from flatmtl.demo.summary import Spread, difference, summarise
from flatmtl.demo.train import LAST, RunConfig, RunResult, steps_per_epoch

NAMES = {"mean": "Mean", "pcgrad": "PCGrad", "f-pcgrad": "F-PCGrad"}
# Cost of a step in forwards, a backward counted as two: 1 forward and a backward for each of two
# tasks, and with flatness one more forward and backward for each.
_COST = {"mean": 5, "pcgrad": 5, "f-pcgrad": 11}


class ProgressBars:
    """One bar for all runs and one for each that is under way; a context manager."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self._settings = settings
        self._bars = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        configs = set(search_configs(settings) + comparison_configs(settings, settings.rhos[0]))
        total = sum(_COST[config.method] * self._steps(config) for config in configs)
        self._all = self._bars.add_task("all runs", total=total)
        self._of: dict[RunConfig, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def on_step(self, config: RunConfig) -> None:
        """Moves the bars of one run one step on."""
        if config not in self._of:
            self._of[config] = self._bars.add_task(_title(config), total=self._steps(config))
        self._bars.advance(self._of[config])
        self._bars.advance(self._all, _COST[config.method])

    def on_done(self, result: RunResult) -> None:
        """Replaces the bar of a run by a line with its accuracy."""
        if result.config in self._of:
            self._bars.update(self._of[result.config], visible=False)
        score = mean(percent(result.validation))
        self._bars.console.print(f"{_title(result.config):24} {score:5.1f} % validation accuracy")

    def _steps(self, config: RunConfig) -> int:
        return config.epochs * steps_per_epoch(self._settings.pairs[0])


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The results table, the choice of rho and the difference that flatness makes."""
    scores = ", ".join(
        f"{run.config.rho:g}: {mean(percent(run.validation)):.1f} %" for run in outcome.search
    )
    console.print(f"\nrho {outcome.rho:g} chosen on validation pairs ({scores})\n")
    table = Table(
        title=f"Test accuracy, % (last {LAST} epochs, mean ± deviation over seeds)",
        caption="flatmtl: share of a step that is not forward, backward or base optimizer",
    )
    table.add_column("method")
    for heading in (*TASKS, "average", "ms/step", "flatmtl"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise(outcome.runs):
        table.add_row(
            NAMES[row.method],
            *(_spread(task) for task in row.tasks),
            _spread(row.average),
            f"{1e3 * row.seconds_per_step:.0f}",
            f"{100.0 * row.own_share:.1f} %",
        )
    console.print(table)
    change = difference(outcome.runs)
    seeds = ", ".join(f"{value:+.2f}" for value in change.per_seed)
    console.print(
        f"F-PCGrad - PCGrad: {change.spread.mean:+.2f} points"
        f"{_deviation(change.spread)} (by seed: {seeds}): {change.verdict}"
    )


def _title(config: RunConfig) -> str:
    rho = f" rho {config.rho:g}" if config.method == "f-pcgrad" else ""
    return f"{NAMES[config.method]}{rho} seed {config.seed}"


def _spread(value: Spread) -> str:
    return f"{value.mean:.2f}{_deviation(value)}"


def _deviation(value: Spread) -> str:
    return "" if value.deviation is None else f" ± {value.deviation:.2f}"
