"""The learning curves of the demo as a PNG."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatmtl.demo.experiment import Outcome, Settings
from flatmtl.demo.multifashion import TASKS
from flatmtl.demo.summary import of_method
from flatmtl.demo.train import METHODS, steps_per_epoch

# Okabe and Ito's colours for all kinds of colour vision; line and marker differ as well.
_STYLES = {
    "mean": ("Mean", "#E69F00", ":", "s"),
    "pcgrad": ("PCGrad", "#0072B2", "--", "o"),
    "f-pcgrad": ("F-PCGrad", "#009E73", "-", "^"),
}

_HEIGHT = 20.0  # points shown: the first epochs are far below what tells the methods apart


def save_curves(path: Path, settings: Settings, outcome: Outcome) -> None:
    """Test accuracy of each task by epoch, and of both by training time."""
    # Not through pyplot, whose backend may want a screen; a bare figure saves with Agg.
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    epochs = np.arange(1, settings.epochs + 1)
    for method in METHODS:
        runs = of_method(outcome.runs, method)
        accuracy = 100.0 * np.array([run.test for run in runs])  # [seeds, epochs, tasks]
        for k in range(len(TASKS)):
            _curve(axes[k], method, epochs, accuracy[:, :, k])
        seconds = np.mean([run.seconds_per_step for run in runs])
        time = epochs * steps_per_epoch(settings.pairs[0]) * seconds
        _curve(axes[-1], method, time, accuracy.mean(axis=2))
    for k, task in enumerate(TASKS):
        axes[k].set(title=f"Task {k + 1}: image at the {task}", xlabel="epoch")
        axes[k].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].set_ylim(bottom=max(0.0, axes[0].get_ylim()[1] - _HEIGHT))
    axes[-1].set(title="Both tasks, by training time", xlabel="training time on one core, s")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", frameon=False)
    figure.suptitle(
        f"Two images on one canvas: mean and range of {settings.seeds} "
        f"{'seed' if settings.seeds == 1 else 'seeds'}, rho {outcome.rho:g}"
    )
    figure.savefig(path, dpi=150)


def _curve(axis: Axes, method: str, x: np.ndarray, accuracy: np.ndarray) -> None:
    """One method's mean over seeds as a line in a band from the worst to the best seed."""
    name, colour, line, marker = _STYLES[method]
    axis.fill_between(x, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.15, lw=0)
    mean = accuracy.mean(axis=0)
    axis.plot(x, mean, line, color=colour, marker=marker, markersize=5, lw=1.8, label=name)
