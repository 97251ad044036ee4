"""flatmtl.plots: what is drawn is what was recorded, with the tasks' names, gaps and fitting scales."""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from flatmtl import plots
from flatmtl.history import History

matplotlib.use("Agg")

LINES = ("losses", "weights", "norms", "sharpness")
NAMES = ["left", "right", "depth", 3]


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    pyplot.close("all")


def a_history(rng, tasks=NAMES, steps=30, capacity=100, **changes) -> History:
    """Random steps; ``changes`` are [steps, T] values, or None to leave one out."""
    history, count = History(capacity, tasks), len(tasks)
    values = {name: rng.uniform(0.5, 1.5, (steps, count)) for name in (*LINES, "flat_weights")}
    jac = rng.standard_normal((steps, count, count + 3))
    values["gram"] = jac @ jac.transpose(0, 2, 1)
    values.update(changes)
    for n in range(steps):
        bits = torch.tensor(0)
        given = {k: torch.from_numpy(v[n]) for k, v in values.items() if v is not None}
        history.record(**given, status=bits)
    return history


def drawn(ax) -> dict[str, np.ndarray]:
    """label -> y, of the lines that have one."""
    return {
        line.get_label(): line.get_ydata()
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def texts(ax) -> dict[tuple[int, int], str]:
    return {
        (round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts
    }


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize("what", LINES)
def test_a_line_for_each_task(what, rng):
    history = a_history(rng, steps=40, capacity=25)
    ax = getattr(plots, what)(history, smooth=1)
    arrays = history.arrays()
    assert list(drawn(ax)) == ["left", "right", "depth", "3"]
    for i, values in enumerate(drawn(ax).values()):
        np.testing.assert_allclose(values, arrays[what][:, i], rtol=1e-12)
    for line in ax.get_lines():
        np.testing.assert_array_equal(line.get_xdata(), np.arange(15, 40))
    assert len(ax.get_lines()) == 4
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(drawn(ax))
    assert ax.get_xlabel() == "step" and ax.get_title()
    assert len({line.get_color() for line in ax.get_lines()}) == 4


def test_the_weights_of_the_flat_parts(rng):
    history = a_history(rng)
    ax = plots.weights(history, flat=True, smooth=1)
    np.testing.assert_allclose(drawn(ax)["depth"], history.arrays()["flat_weights"][:, 2])
    assert "flat" in ax.get_title()
    assert "flat" not in plots.weights(history).get_title()


@pytest.mark.parametrize("window", [2, 5, 6, 500])
def test_the_running_mean_is_drawn_over_the_values(window, rng):
    losses = rng.uniform(0.5, 1.5, (20, 2))
    losses[3:6, 1] = np.nan
    losses[::2, 0] = np.nan
    losses[12, 1] = np.inf  # would drown its neighbours
    ax = plots.losses(a_history(rng, ["a", "b"], 20, losses=losses), smooth=window)
    faint = [line for line in ax.get_lines() if line.get_label().startswith("_")]
    assert len(faint) == 2 and len(drawn(ax)) == 2
    window = min(window, 20)
    for i, mean in enumerate(drawn(ax).values()):
        np.testing.assert_array_equal(faint[i].get_ydata(), losses[:, i])
        assert faint[i].get_alpha() < 0.5
        for n in range(20):
            start = n - (window - (window - 1) // 2 - 1)
            around = losses[max(0, start) : start + window, i]
            around = around[np.isfinite(around)]
            expected = around.mean() if len(around) else np.nan
            np.testing.assert_allclose(mean[n], expected, rtol=1e-12)


def test_a_short_history_is_drawn_as_it_is(rng):
    history = a_history(rng, steps=30)
    np.testing.assert_array_equal(
        drawn(plots.norms(history))["left"], history.arrays()["norms"][:, 0]
    )
    assert len(plots.norms(a_history(rng, steps=400, capacity=400)).get_lines()) == 8


def test_missing_values_are_gaps_and_single_ones_dots(rng):
    losses = rng.uniform(1, 2, (12, 3))
    losses[4:8, 0] = np.nan
    losses[::2, 1] = np.nan
    losses[:, 2] = np.nan
    losses[0, 2] = 1.5
    ax = plots.losses(a_history(rng, ["gap", "odd", "once"], 12, losses=losses), smooth=1)
    for i, line in enumerate(ax.get_lines()):
        np.testing.assert_array_equal(line.get_ydata(), losses[:, i])
    gap, odd, once = ax.get_lines()
    assert gap.get_marker() in ("None", None)
    assert odd.get_marker() == "." and odd.get_markevery() == [1, 3, 5, 7, 9, 11]
    assert once.get_marker() == "." and once.get_markevery() == [0]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0], "linear"),
        ([0.001, 1.0], "log"),
        ([-1.0, 1.0], "linear"),
        ([0.0, 1.0], "linear"),
        ([0.001, -3.0, 0.002, 0.001], "symlog"),
    ],
)
@pytest.mark.parametrize("what", LINES)
def test_the_scale_fits_the_values(what, values, scale, rng):
    table = np.array(values)[np.arange(32) % len(values)][:, None] * rng.uniform(0.99, 1, (32, 2))
    ax = getattr(plots, what)(a_history(rng, ["a", "b"], 32, **{what: table}))
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low <= table.min() and table.max() <= high
    zero = [line for line in ax.get_lines() if list(line.get_ydata()) == [0, 0]]
    assert len(zero) == (table.min() < 0)


def test_a_single_step(rng):
    ax = plots.losses(a_history(rng, ["a", "b"], 1))
    assert [line.get_marker() for line in ax.get_lines()] == [".", "."]
    assert all(tick == int(tick) for tick in ax.get_xticks())


# ---------------------------------------------------------------- many tasks


@pytest.mark.parametrize("what", LINES)
@pytest.mark.parametrize("tasks", [11, 40])
def test_many_tasks_are_a_map(what, tasks, rng):
    names = [f"attribute {i}" for i in range(tasks)]
    values = rng.uniform(0.5, 1.5, (20, tasks))
    values[3, 4] = np.nan
    ax = getattr(plots, what)(a_history(rng, names, 20, capacity=12, **{what: values}))
    (image,) = ax.get_images()
    shown = image.get_array()
    np.testing.assert_array_equal(np.ma.filled(shown, np.nan), values[8:].T)
    assert image.get_extent() == [7.5, 19.5, tasks - 0.5, -0.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert not ax.get_lines()
    later = a_history(rng, names, 6, **{what: values})
    assert getattr(plots, what)(later).get_images()[0].get_array().mask[4].tolist() == [
        n == 3 for n in range(6)
    ]


def test_the_colours_of_a_map_are_not_spent_on_outliers(rng):
    values = rng.uniform(1, 2, (200, 20))
    values[5, 5] = 1e6
    (image,) = plots.norms(a_history(rng, [*range(20)], 200, 200, norms=values)).get_images()
    assert image.norm.vmax <= 2 and image.colorbar.extend == "both"
    values = 10.0 ** rng.uniform(-3, 3, (200, 20))
    (image,) = plots.norms(a_history(rng, [*range(20)], 200, 200, norms=values)).get_images()
    assert isinstance(image.norm, LogNorm)
    values = rng.uniform(-1, 0.5, (200, 20))
    (image,) = plots.weights(a_history(rng, [*range(20)], 200, 200, weights=values)).get_images()
    assert image.norm.vmin == -image.norm.vmax


# ---------------------------------------------------------------- conflict and cosines


def test_conflict(rng):
    history = a_history(rng, steps=25)
    dots, mean = plots.conflict(history, smooth=1).get_lines()
    share = 100 * history.arrays()["conflict"]
    np.testing.assert_allclose(dots.get_ydata(), share)
    np.testing.assert_allclose(mean.get_ydata(), share)
    ax = plots.conflict(history)
    assert ax.get_ylim()[0] <= 0 and ax.get_ylim()[1] >= 100
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata()[12], share[8:17].mean())


@pytest.mark.parametrize("tasks", [2, 5, 40])
def test_cosines_are_written_into_their_cells(tasks, rng):
    names = [f"t{i}" for i in range(tasks)]
    history = a_history(rng, names, 7)
    ax = plots.cosines(history)
    mean = history.arrays()["cosines"].mean(axis=0)
    shown = ax.get_images()[0].get_array()
    written = texts(ax)
    assert len(written) == tasks * (tasks - 1)
    for i, j in itertools.permutations(range(tasks), 2):
        assert float(written[i, j]) == pytest.approx(mean[i, j], abs=0.00501)
        assert shown[i, j] == pytest.approx(mean[i, j], rel=1e-12)
    assert [t.get_text() for t in ax.get_xticklabels()] == names
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    image = ax.get_images()[0]
    assert image.norm.vmin == -image.norm.vmax
    assert image.norm.vmax >= np.abs(mean[~np.eye(tasks, dtype=bool)]).max()


def test_cosines_are_the_mean_of_the_steps_that_have_them(rng):
    jac = rng.standard_normal((9, 4, 6))
    jac[:5, 1] = 0  # missing there
    jac[:, 3] = 0  # and everywhere
    gram = jac @ jac.transpose(0, 2, 1)
    history = a_history(rng, steps=9, gram=gram)
    written = texts(plots.cosines(history))
    known = [gram[n, 0, 1] / math.sqrt(gram[n, 0, 0] * gram[n, 1, 1]) for n in range(5, 9)]
    assert float(written[0, 1]) == pytest.approx(np.mean(known), abs=0.00501)
    assert set(written) == set(itertools.permutations(range(3), 2))


def test_values_in_the_cells_stay_readable(rng):
    """Their font shrinks with the cells, and below 3.5 points they are left out."""
    few = plots.cosines(a_history(rng, [*range(3)], 2)).texts
    many = plots.cosines(a_history(rng, [*range(40)], 2)).texts
    assert few[0].get_fontsize() > many[0].get_fontsize() >= 3.5
    too_many = plots.cosines(a_history(rng, [*range(150)], 2))
    assert not too_many.texts
    assert 5 < len(too_many.get_yticklabels()) < 150, "and of the names some are shown"
    assert too_many.get_yticklabels()[1].get_fontsize() >= 4.9


# ---------------------------------------------------------------- one figure with all of them


def titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.get_axes() if ax.get_title()]


@pytest.mark.parametrize("tasks", [2, 3, 10, 40])
def test_overview(tasks, rng):
    figure = plots.overview(a_history(rng, [f"t{i}" for i in range(tasks)], 100, 60))
    assert len(titles(figure)) == len(set(titles(figure))) == 7
    assert "steps 40 to 99" in figure.get_suptitle()
    legends = [legend for part in figure.subfigs for legend in part.legends]
    named = [[t.get_text() for t in legend.get_texts()] for legend in legends]
    assert named == ([[f"t{i}" for i in range(tasks)]] if tasks <= 10 else [])
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for ax in figure.get_axes():  # nothing reaches over the edge
        box = ax.get_tightbbox()
        assert box.x0 > -3 and box.y0 > -3 and box.x1 < width + 3 and box.y1 < height + 3


def test_overview_leaves_out_what_there_is_not(rng):
    plain = a_history(rng, flat_weights=None, sharpness=None)
    assert not any("flat" in title or "sharp" in title for title in titles(plots.overview(plain)))
    assert len(titles(plots.overview(plain))) == 5
    bare = a_history(rng, flat_weights=None, sharpness=None, gram=None, weights=None)
    assert titles(plots.overview(bare)) == ["loss", "gradient norm"]
    assert len(titles(plots.overview(a_history(rng, ["only"], 3)))) == 5


def test_overview_is_saved_without_pyplot(tmp_path, rng):
    path = tmp_path / "overview.png"
    figure = plots.overview(a_history(rng), path)
    assert isinstance(figure, Figure) and not pyplot.get_fignums()
    height, width = pyplot.imread(path).shape[:2]
    assert width > 1000 and height > 500
    plots.overview(a_history(rng))
    assert len(pyplot.get_fignums()) == 1


def test_overview_tells_of_solvers_in_trouble(rng):
    history = History(10, ["a", "b"])
    for bits, flat in [(0, 0), (4, 0), (0, 4), (4, 4), (2, 0), (3, 16), (32, 0)]:
        history.record(
            losses=torch.ones(2), status=torch.tensor(bits), flat_status=torch.tensor(flat)
        )
    headline = plots.overview(history).get_suptitle()
    assert "3 with a solver short" in headline and "2 with a task without" in headline
    assert "1 with the method's fallback" in headline and "1 with an invalid" in headline
    history.clear()
    history.record(losses=torch.ones(2))
    assert plots.overview(history).get_suptitle() == "step 7"


def test_overview_reads_the_device_once(rng, monkeypatch):
    history, reads = a_history(rng), []
    arrays = History.arrays
    monkeypatch.setattr(History, "arrays", lambda self: reads.append(1) or arrays(self))
    plots.overview(history)
    assert len(reads) == 1


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("what", [*LINES, "conflict", "cosines"])
def test_given_axes_are_used(what, rng):
    figure = Figure()
    ax = figure.add_subplot()
    assert getattr(plots, what)(a_history(rng), ax) is ax
    assert not pyplot.get_fignums()
    assert getattr(plots, what)(a_history(rng)).figure.number in pyplot.get_fignums()


@pytest.mark.parametrize("tasks", [3, 15])
def test_values_that_are_not_finite_draw_without_a_warning(tasks, rng):
    losses = rng.uniform(0.5, 1.5, (20, tasks))
    losses[4] = np.inf
    losses[5, 1] = -np.inf
    losses[6:9, 2] = np.nan
    gram = np.zeros((20, tasks, tasks))
    gram[:] = np.eye(tasks)
    gram[3] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.overview(a_history(rng, [*range(tasks)], 20, losses=losses, gram=gram))
        figure.canvas.draw()


@pytest.mark.parametrize("what", [*LINES, "conflict", "cosines", "overview"])
def test_what_cannot_be_drawn(what, rng, monkeypatch):
    plot = getattr(plots, what)
    with pytest.raises(ValueError, match="at least one step"):
        plot(History(3, ["a", "b"]))
    with pytest.raises(TypeError, match="history must be a flatmtl History, got dict"):
        plot({})
    nothing = History(3, ["a", "b"])
    nothing.record(losses=torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="history must hold some .*, got none in 1 steps"):
        plot(nothing)
    if what != "cosines":
        for smooth in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="smooth must be"):
                plot(a_history(rng), smooth=smooth)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"flatmtl\[plots\]"):
        plot(a_history(rng))
