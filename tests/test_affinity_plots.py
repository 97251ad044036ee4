"""flatmtl.plots of affinities and groupings: what is drawn is what was measured and chosen."""

from __future__ import annotations

import re
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from flatmtl import AffinityRecord, plots
from flatmtl.grouping import evaluate_groups, select_groups

matplotlib.use("Agg")

NAMES = ["ss", "depth", "normals", 3, "edge"]
GROUPS = [("ss", "depth"), ("depth", "normals", "edge"), (3, "edge")]


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    pyplot.close("all")


def a_record(rng, tasks=NAMES, epochs=3, scale=1.0, **changes) -> AffinityRecord:
    shape = (epochs, len(tasks), len(tasks))
    count = np.full(shape, 20)
    arguments = {
        "mean": {"affinity": scale * rng.standard_normal(shape)},
        "m2": {"affinity": scale**2 * rng.random(shape)},
        "count": {"affinity": count},
        "metadata": {"mode": "exact", "look_ahead": "sgd"},
    }
    return AffinityRecord(tasks=list(tasks), steps=[20] * epochs, **(arguments | changes))


def cells(ax) -> dict[tuple[int, int], str]:
    """(row, column) -> text."""
    found = {}
    for text in ax.texts:
        x, y = text.get_position()
        found[round(y), round(x)] = text.get_text()
    return found


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def inside(figure) -> bool:
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for ax in figure.get_axes():
        box = ax.get_tightbbox()
        if box is not None and not (
            box.x0 > -3 and box.y0 > -3 and box.x1 < width + 3 and box.y1 < height + 3
        ):
            return False
    return True


# ---------------------------------------------------------------- map


def test_the_map_shows_the_matrix(rng):
    record = a_record(rng)
    ax = plots.affinity(record)
    image = ax.images[0]
    shown = np.ma.filled(image.get_array(), np.nan)
    matrix = record.matrix()
    off = ~np.eye(5, dtype=bool)
    factor = shown[off][0] / matrix[off][0]  # one power of ten for all
    assert np.log10(factor) == pytest.approx(round(np.log10(factor)), abs=1e-9)
    np.testing.assert_allclose(shown[off], factor * matrix[off])
    assert np.isnan(np.diag(shown)).all(), "the diagonal is set apart"
    low, high = image.get_clim()
    assert low == -high and high == pytest.approx(np.abs(shown[off]).max())
    assert "recipient" in ax.get_ylabel() and "loss" in ax.get_ylabel()
    assert "source" in ax.get_xlabel() and "gradient" in ax.get_xlabel()
    assert labels(ax.xaxis) == labels(ax.yaxis) == [str(name) for name in NAMES]
    for (i, j), text in cells(ax).items():
        assert float(text) == pytest.approx(factor * matrix[i, j], abs=0.00501)
    assert len(ax.texts) == 25
    assert "1 - loss after / loss before" in ax.get_title()


def test_the_row_is_the_recipient(rng):
    """Two tasks, one way only: no symmetric mistake hides."""
    ax = plots.affinity(np.array([[9.0, 0.75], [-0.25, 9.0]]), tasks=["up", "low"])
    assert cells(ax) == {(0, 0): "9.00", (0, 1): "0.75", (1, 0): "-0.25", (1, 1): "9.00"}
    ax.figure.canvas.draw()
    blue, red = ax.images[0].to_rgba([[0.7, -0.7]])[0]
    assert blue[2] > blue[0] and red[0] > red[2]


def test_a_wide_diagonal_does_not_dim_the_rest(rng):
    matrix = rng.uniform(0.5, 1.0, (4, 4)) + 1e6 * np.eye(4)
    assert plots.affinity(matrix).images[0].get_clim()[1] <= 1.0


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 0.3, 1.0, 5e3])
def test_any_scale_can_be_read(scale, rng):
    record = a_record(rng, scale=scale)
    ax = plots.affinity(record)
    off = record.matrix()[~np.eye(5, dtype=bool)]
    bar = ax.figure.axes[1].get_ylabel()
    power = int(re.search(r"\{(-?\d+)\}", bar)[1]) if bar else 0
    largest = np.abs(off).max() / 10.0**power
    assert 0.1 <= largest < 100
    assert max(abs(float(text)) for (i, j), text in cells(ax).items() if i != j) == pytest.approx(
        largest, rel=0.06
    )


def test_what_was_not_measured_is_no_zero(rng):
    matrix = rng.standard_normal((3, 3))
    matrix[0, 2] = np.nan
    ax = plots.affinity(matrix)
    assert cells(ax)[0, 2] == "–"
    assert np.ma.getmaskarray(ax.images[0].get_array())[0, 2]


def test_some_tasks_in_an_order(rng):
    record = a_record(rng)
    matrix = record.matrix()[np.ix_([4, 0, 3], [4, 0, 3])]
    ax = plots.affinity(record, tasks=["edge", "ss", 3])
    assert labels(ax.yaxis) == ["edge", "ss", "3"]
    factor = max(float(text) / matrix[at] for at, text in cells(ax).items())
    for at, text in cells(ax).items():
        assert float(text) == pytest.approx(round(factor) * matrix[at], abs=0.00501 * 1.01)


def test_other_quantities(rng):
    found = {part: dict(getattr(a_record(rng), part)) for part in ("mean", "m2", "count")}
    for part in found.values():
        part["cosine"] = part["affinity"] / 4
    found["count"]["cosine"] = found["count"]["affinity"]
    ax = plots.affinity(a_record(rng, **found), quantity="cosine")
    assert "cosine" in ax.get_title()


def test_epochs_and_normalised_rows(rng):
    record = a_record(rng)
    grouping = evaluate_groups(GROUPS, record)
    options = {"epochs": slice(1, 3), "normalise": True}
    expected = record.matrix(**options)
    off = ~np.eye(5, dtype=bool)
    for ax in (
        plots.affinity(record, **options),
        plots.grouping_report(record, grouping, **options).get_axes()[0],
    ):
        shown = np.ma.filled(ax.images[0].get_array(), np.nan)
        np.testing.assert_allclose(shown[off], expected[off])
        assert "normalised" in ax.get_title()


def test_values_and_names_stay_readable(rng):
    few, many = plots.affinity(rng.random((5, 5))), plots.affinity(rng.random((40, 40)))
    assert few.texts[0].get_fontsize() > many.texts[0].get_fontsize() >= 3.5
    huge = plots.affinity(rng.standard_normal((617, 617)))
    assert not huge.texts and 5 < len(labels(huge.yaxis)) < 300
    assert huge.get_yticklabels()[1].get_fontsize() >= 4.9


@pytest.mark.parametrize("tasks", [4, 20])
def test_hostile_and_long_names_draw(tasks, rng):
    names = ["$\\frac{", "two\nlines", "a$b$c", "x" * 200, *(f"{'n' * 40} {i}" for i in range(99))]
    names = names[:tasks]
    record = a_record(rng, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inside(plots.affinity(record).figure)
        assert inside(plots.affinity_over_time(record).figure)
        grouping = evaluate_groups([tuple(names)], record)
        assert inside(plots.groups(grouping).figure)
        assert inside(plots.grouping_report(record, grouping))
    shown = labels(plots.affinity(record).yaxis)
    assert max(map(len, shown)) <= 30 and len(set(shown)) == tasks


# ---------------------------------------------------------------- by epoch


def test_the_given_pairs_by_epoch(rng):
    record = a_record(rng, epochs=4, scale=0.5)
    ax = plots.affinity_over_time(record, pairs=[("ss", "depth"), (3, "edge")])
    drawn = {line.get_label(): line for line in ax.get_lines() if "←" in line.get_label()}
    assert list(drawn) == ["ss ← depth", "3 ← edge"]
    mean, error = record.mean["affinity"], np.sqrt(record.m2["affinity"] / (20 * 19))
    scale = drawn["ss ← depth"].get_ydata()[0] / mean[0, 0, 1]
    for name, at in {"ss ← depth": (0, 1), "3 ← edge": (3, 4)}.items():
        values = mean[(slice(None), *at)]
        np.testing.assert_allclose(drawn[name].get_ydata(), scale * values)
    for band, at in zip(ax.collections, [(0, 1), (3, 4)], strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        low = (mean - error)[(slice(None), *at)].min()
        assert heights.min() == pytest.approx(scale * low)
    assert ax.get_xlabel() == "epoch" and "recipient ← source" in ax.get_title()


def test_the_largest_pairs_by_default(rng):
    matrix = np.full((4, 4), 0.1) + 9 * np.eye(4)
    matrix[2, 1], matrix[0, 3] = -3.0, 2.0
    ax = plots.affinity_over_time(AffinityRecord.from_matrix(matrix))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(names) == 6 and names[:2] == ["2 ← 1", "0 ← 3"]


def test_epochs_without_a_pair_are_gaps(rng):
    count = np.full((4, 2, 2), 20)
    count[1, 0, 1] = 0
    ax = plots.affinity_over_time(
        a_record(rng, ["a", "b"], 4, count={"affinity": count}), pairs=[("a", "b"), ("b", "a")]
    )
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert np.isnan(drawn["a ← b"]).tolist() == [False, True, False, False]
    assert not np.isnan(drawn["b ← a"]).any()


def test_pairs_that_are_refused(rng):
    record = a_record(rng)
    for pairs in ([], [("ss", "depth")] * 11):
        with pytest.raises(ValueError, match="pairs must be 1 to 10, got"):
            plots.affinity_over_time(record, pairs=pairs)
    with pytest.raises(ValueError, match="tasks must be among those of the record, got 'x'"):
        plots.affinity_over_time(record, pairs=[("ss", "x")])


# ---------------------------------------------------------------- groups


def test_the_value_by_number_of_groups(rng):
    ax = plots.value_by_count([None, None, 0.5, 0.75])
    line = ax.get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, np.nan, 0.5, 0.75])
    assert [text.get_text() for text in ax.texts] == ["not possible"]
    grouping = select_groups(a_record(rng), 4)
    ax = plots.value_by_count(grouping)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), grouping.by_count)
    ring = next(line for line in ax.get_lines() if "fewest" in str(line.get_label()))
    assert ring.get_xdata()[0] == grouping.fewest
    assert str(grouping.fewest) in ax.get_legend().get_texts()[0].get_text()
    for nothing in ([], [None, None]):
        with pytest.raises(ValueError, match="grouping must hold values"):
            plots.value_by_count(nothing)


def dots(ax) -> dict[tuple[int, str], bool]:
    """(group, task) -> whether its dot is full."""
    rows = labels(ax.yaxis)
    found = {}
    for line in ax.get_lines():
        if line.get_marker() == "o":
            full = to_rgba(line.get_markerfacecolor()) != to_rgba("white")
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                found[int(x), rows[int(y)]] = full
    return found


def test_who_trains_where_and_is_served_where(rng):
    record = a_record(rng)
    grouping = evaluate_groups(GROUPS, record)
    ax = plots.groups(grouping)
    expected = {
        (g, str(task)): grouping.served_by[task] == g
        for g, group in enumerate(grouping.groups)
        for task in group
    }
    assert dots(ax) == expected
    assert labels(ax.xaxis) == [str(g + 1) for g in range(len(grouping.groups))]
    right = ax.child_axes[0]
    scores = dict(zip(labels(ax.yaxis), map(float, labels(right.yaxis)), strict=True))
    unit = max(scores.values(), key=abs) / max(grouping.scores.values(), key=abs)
    for task, score in grouping.scores.items():
        assert scores[str(task)] == pytest.approx(10 ** round(np.log10(unit)) * score, abs=0.00501)
    assert not ax.texts


def test_the_score_in_every_group(rng):
    record = a_record(rng)
    grouping = evaluate_groups(GROUPS, record)
    ax, matrix = plots.groups(grouping, affinity=record), record.matrix()
    rows = labels(ax.yaxis)
    written = {(note.xy[0], rows[note.xy[1]]): float(note.get_text()) for note in ax.texts}
    assert set(written) == set(dots(ax))
    place = {str(task): n for n, task in enumerate(NAMES)}
    units = []
    for (g, task), value in written.items():
        others = [place[str(o)] for o in grouping.groups[g] if str(o) != task]
        mean = matrix[place[task], others].mean()
        units.append((value, mean))
    unit = 10 ** round(np.log10(max(abs(v) for v, _ in units) / max(abs(m) for _, m in units)))
    for value, mean in units:
        assert value == pytest.approx(unit * mean, abs=0.00501)
    again = plots.groups(grouping, affinity=matrix)
    assert [note.get_text() for note in again.texts] == [note.get_text() for note in ax.texts]
    with pytest.raises(ValueError, match="those of another record"):
        plots.groups(grouping, affinity=a_record(rng, [*NAMES[:4], "other"]))


def test_tasks_are_ordered_by_the_group_that_serves_them(rng):
    grouping = evaluate_groups([(3, "ss", "edge"), ("normals", "depth")], a_record(rng))
    assert labels(plots.groups(grouping).yaxis) == ["ss", "3", "edge", "depth", "normals"]


# ---------------------------------------------------------------- all in one


def titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.get_axes() if ax.get_title()]


@pytest.mark.parametrize(("tasks", "epochs"), [(2, 1), (5, 6), (14, 2)])
def test_report(tasks, epochs, rng, tmp_path):
    names = [f"t{i}" for i in range(tasks)]
    record = a_record(rng, names, epochs)
    most = min(3, tasks // 2)
    grouping = select_groups(record, most)
    path = tmp_path / "report.png"
    figure = plots.grouping_report(record, grouping, path)
    assert isinstance(figure, Figure) and not pyplot.get_fignums()
    assert len(titles(figure)) == 2 + (most > 1) + (epochs > 1)
    assert pyplot.imread(path).shape[0] > 500
    assert f"{tasks} tasks" in str([part.get_suptitle() for part in figure.subfigs])
    assert inside(figure)
    plots.grouping_report(record, grouping)
    assert len(pyplot.get_fignums()) == 1


def test_the_report_of_617_tasks(rng):
    names = [f"assay_{i}" for i in range(617)]
    record = a_record(rng, names, 1)
    parts = [tuple(names[k::12]) for k in range(12)]
    figure = plots.grouping_report(record, evaluate_groups(parts, record))
    assert inside(figure)
    assert len(titles(figure)) == 2


def test_the_report_has_the_caveats(rng):
    record = a_record(rng, metadata={"mode": "exact", "momentum": True})
    figure = plots.grouping_report(record, evaluate_groups(GROUPS, record))
    said = " ".join(" ".join(text.get_text().split()) for text in figure.subfigs[1].texts)
    assert record.caveats()
    for caveat in record.caveats():
        assert caveat in said


def test_scores_of_another_matrix_are_not_mixed_in(rng):
    """Beside the dots stand the record's means: only if the scores come from there."""
    record = a_record(rng)
    mine = evaluate_groups(GROUPS, record)
    other = evaluate_groups(GROUPS, record.matrix(epochs=0), tasks=NAMES)

    def notes(grouping):
        return next(
            len(ax.texts)
            for ax in plots.grouping_report(record, grouping).get_axes()
            if "scores" in ax.get_title()
        )

    assert notes(mine) and not notes(other)


@pytest.mark.parametrize("what", ["affinity", "affinity_over_time", "groups", "value_by_count"])
def test_given_axes_are_used(what, rng):
    record = a_record(rng)
    grouping = select_groups(record, 2)
    shown = record if what.startswith("affinity") else grouping
    ax = Figure().add_subplot()
    assert getattr(plots, what)(shown, ax) is ax
    assert not pyplot.get_fignums()
    assert getattr(plots, what)(shown).figure.number in pyplot.get_fignums()


def test_what_cannot_be_drawn(rng, monkeypatch):
    record = a_record(rng)
    grouping = evaluate_groups(GROUPS, record)
    nothing = AffinityRecord.from_matrix(np.full((5, 5), np.nan), NAMES)
    for draw in (plots.affinity, plots.affinity_over_time):
        with pytest.raises(ValueError, match="record must hold a measured pair of two tasks"):
            draw(nothing)
    with pytest.raises(ValueError, match="matrix must be square"):
        plots.affinity(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="quantity must be one of"):
        plots.affinity(record, quantity="speed")
    with pytest.raises(ValueError, match="tasks must be among"):
        plots.affinity(record, tasks=["ss", "nobody"])
    with pytest.raises(TypeError, match="record must be a flatmtl AffinityRecord, got ndarray"):
        plots.grouping_report(np.eye(5), grouping)
    with pytest.raises(TypeError, match="record must be a flatmtl AffinityRecord, got dict"):
        plots.affinity_over_time({})
    for draw in (plots.groups, lambda g: plots.grouping_report(record, g), plots.value_by_count):
        with pytest.raises(TypeError, match="grouping must be a flatmtl Grouping"):
            draw({"groups": GROUPS})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: plots.affinity(record),
        lambda: plots.affinity_over_time(record),
        lambda: plots.groups(grouping),
        lambda: plots.value_by_count(grouping),
        lambda: plots.grouping_report(record, grouping),
    ):
        with pytest.raises(ImportError, match=r"flatmtl\[plots\]"):
            draw()
