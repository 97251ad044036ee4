"""The benchmark of methods: data and their traps, cells, resuming, tables; on small made-up data."""

from __future__ import annotations

import csv
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from bench.methods import cells, data, nets, parts, run, stats, store
from bench.methods.cells import DECOMPOSED, DIRECT, PLAIN, SINGLE, WIDE, Cell
from bench.methods.settings import FULL, QUICK, Setting

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
SETTING = Setting(60, 20, 20, batch=20, epochs=2, lr=1e-3, rho=0.07, wide=0.3, width=4)


def adult_row(rng, income, extra=""):
    return [
        str(rng.integers(18, 80)), rng.choice(["Private", "State-gov", "?"]), "77516",
        "Bachelors", str(rng.choice([9, 12, 13, 16])), rng.choice(["Never-married", "Divorced"]),
        rng.choice(["Sales", "Tech-support"]), rng.choice(["Husband", "Wife"]), "White",
        rng.choice(["Male", "Female"]), "0", "0", str(rng.integers(10, 60)),
        "United-States" + extra, income,
    ]  # fmt: skip


def make_adult(folder, rng, training=120, other=40):
    (folder / "adult").mkdir(parents=True)
    incomes = ["<=50K", ">50K"]
    with gzip.open(folder / "adult" / "adult.data.gz", "wt") as file:
        for k in range(training):
            file.write(", ".join(adult_row(rng, incomes[k % 2])) + "\n")
        file.write("\n")
    with gzip.open(folder / "adult" / "adult.test.gz", "wt") as file:
        file.write("|1x3 Cross validator\n")
        for k in range(other):
            file.write(", ".join(adult_row(rng, incomes[k % 2] + ".", "?" * (k == 0))) + "\n")
        file.write("\n")
    return folder


def make_qm8(folder, rng, rows=140):
    """As the real file: the PBE0 columns twice, and the first molecule twice."""
    (folder / "qm8").mkdir(parents=True)
    kinds = ("E1", "E2", "f1", "f2")
    header = [f"{k}-{m}" for m in ("CC2", "PBE0", "PBE0", "CAM") for k in kinds]
    texts = ["C" * (1 + k % 9) + "N" * (1 + k // 9) for k in range(rows - 1)]
    values = rng.normal(size=(rows, 12)) * rng.uniform(0.1, 30, 12)
    table = np.concatenate([values[:, :8], values[:, 4:8], values[:, 8:]], axis=1)
    with gzip.open(folder / "qm8" / "qm8.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", *header])
        for text, row in zip([*texts, texts[0]], table):
            writer.writerow([text, *map(repr, row.tolist())])
    return folder, values


def make_tox21(folder, rng, rows=140):
    (folder / "tox21").mkdir(parents=True)
    with (folder / "tox21" / "tox21.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", *(f"assay{k}" for k in range(12))])
        for k in range(rows):
            labels = ["" if rng.random() < 0.2 else int(rng.random() < 0.4) for _ in range(12)]
            labels[3] = ""  # an assay without a label: no loss, no metric
            writer.writerow(["C" * (1 + k % 9) + "O" * (1 + k // 9), *labels])
    return folder


# ---------------------------------------------------------------- data


def test_adult_leaves_out_what_gives_a_target_away(tmp_path, rng):
    make_adult(tmp_path, rng)
    training, other = (data.read_adult(tmp_path / file) for file in data.FILES["adult"])
    assert len(training) == 120 and len(other) == 40  # neither the comment nor an empty line
    x, y, names = data.adult_table(training, other)
    assert x.shape == (160, len(names)) and y.shape == (160, 3)
    forbidden = ("marital", "relationship", "education", "fnlwgt", "income")
    assert not [name for name in names if name.startswith(forbidden)]
    assert not [name for name in names if name.endswith("?") and "country" in name]  # test only
    rows = training + other
    assert y[:, 0].tolist() == [float(row[14] == ">50K") for row in rows]
    assert {row[14] for row in other} == {"<=50K", ">50K"}  # the full stop is off
    assert y[:, 1].tolist() == [float(row[5] == "Never-married") for row in rows]
    assert y[:, 2].tolist() == [float(int(row[4]) >= 13) for row in rows]


def test_adult_is_split_by_the_seed_and_keeps_the_given_test_rows(tmp_path, rng):
    make_adult(tmp_path, rng)
    first, again, other = (
        data.load("adult", tmp_path, SETTING, seed, tmp_path / "cache") for seed in (0, 0, 1)
    )
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.train.x, other.train.x)
    assert torch.equal(first.test.y, other.test.y)
    assert [len(p.x) for p in (first.train, first.validation, first.test)] == [60, 20, 20]


def test_equal_rows_of_adult_stand_on_one_side(tmp_path, rng):
    (tmp_path / "adult").mkdir()
    rows = [", ".join(adult_row(rng, ">50K")) for _ in range(40)]
    for file in ("adult.data.gz", "adult.test.gz"):
        (tmp_path / "adult" / file).write_bytes(gzip.compress("\n".join(2 * rows).encode()))
    setting = replace(SETTING, train=40, validation=40)
    loaded = data.load("adult", tmp_path, setting, 0, tmp_path / "cache")
    sides = [{tuple(row) for row in part.x.tolist()} for part in (loaded.train, loaded.validation)]
    assert not sides[0] & sides[1]


def test_qm8_has_twelve_tasks_and_its_twins_on_one_side(tmp_path, rng):
    _, values = make_qm8(tmp_path, rng)
    for seed in range(8):
        loaded = data.load("qm8", tmp_path, SETTING, seed, tmp_path / "cache")
        assert len(loaded.tasks) == len(set(loaded.tasks)) == 12
        assert loaded.train.y.mean(0).abs().max() < 1e-5
        assert torch.allclose(loaded.train.y.std(0, correction=0), torch.ones(12), atol=1e-4)
        parts = [loaded.train, loaded.validation, loaded.test]
        twins = [(part.x == part.x[k]).all(1).sum() for part in parts for k in range(len(part.x))]
        assert max(twins) <= 2
    with pytest.raises(ValueError, match="equal"):
        text = gzip.decompress((tmp_path / "qm8" / "qm8.csv.gz").read_bytes()).decode().split("\n")
        cellsplit = text[1].split(",")
        cellsplit[5] = "99.5"  # no longer equal to its namesake
        text[1] = ",".join(cellsplit)
        (tmp_path / "qm8" / "qm8.csv.gz").write_bytes(gzip.compress("\n".join(text).encode()))
        data.load("qm8", tmp_path, SETTING, 0, tmp_path / "cache")


def test_features_are_made_once(tmp_path, rng, monkeypatch):
    make_qm8(tmp_path, rng)
    first = data.load("qm8", tmp_path, SETTING, 0, tmp_path / "cache")
    monkeypatch.setattr(data, "ngram_features", lambda smiles: pytest.fail("made again"))
    again = data.load("qm8", tmp_path, SETTING, 0, tmp_path / "cache")
    assert torch.equal(first.train.x, again.train.x)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_absent_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"qm8\.csv\.gz: no such file.*--data"):
        data.check_folder(tmp_path, ["qm8"])


def test_fashion_and_mnist_share_no_image_between_parts(tmp_path, rng):
    """One byte of each image tells which it is; the halves stand where they should."""
    for name in ("mnist", "fashion-mnist"):
        (tmp_path / name).mkdir()
        for part, count in (("train", 120), ("t10k", 40)):
            images = np.zeros((count, 28, 28), np.uint8)
            images[:, 14, 14] = 1 + np.arange(count)
            labels = (np.arange(count) % 10).astype(np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                head = bytes([0, 0, 8, array.ndim]) + b"".join(
                    n.to_bytes(4, "big") for n in array.shape
                )
                (tmp_path / name / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    loaded = data.load("fashion_mnist", tmp_path, SETTING, 0, tmp_path / "cache")
    seen = []
    for part in (loaded.train, loaded.validation, loaded.test):
        marks = (part.x[:, 0] * 255).round().long()
        left, right = marks[:, 14:19, 14:19].amax((1, 2)), marks[:, 18:23, 18:23].amax((1, 2))
        clear = (marks > 0).sum((1, 2)) == 2
        assert clear.sum() > 0.5 * len(clear)
        apart = (
            clear
            & (marks[:, 14:18, 14:18].amax((1, 2)) > 0)
            & (marks[:, 19:, 19:].amax((1, 2)) > 0)
        )
        digits = marks[apart][:, 14:18, 14:18].amax((1, 2))
        assert torch.equal((digits - 1) % 10, part.y[apart, 0])
        seen.append(set(digits.tolist()))
        assert len(left) == len(right)
    assert not seen[0] & seen[1]


# ---------------------------------------------------------------- metrics


def test_auc_counts_ordered_pairs(rng):
    for _ in range(20):
        scores = rng.integers(0, 6, 30).astype(float)
        flags = rng.integers(0, 2, 30).astype(float)
        flags[:2] = 0, 1
        ones, zeros = scores[flags == 1], scores[flags == 0]
        pairs = [(a > b) + 0.5 * (a == b) for a in ones for b in zeros]
        assert nets.auc(scores, flags) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(nets.auc(np.ones(3), np.ones(3)))


def test_missing_labels_count_in_neither_loss_nor_metric(tmp_path, rng):
    make_tox21(tmp_path, rng)
    loaded = data.load("tox21", tmp_path, SETTING, 0, tmp_path / "cache")
    model = nets.Network(loaded, 4)
    x, y = loaded.train.x, loaded.train.y
    losses = model.losses(x, y, range(12))
    assert losses[3] is None
    known = ~y[:, 0].isnan()
    assert 0 < known.sum() < len(y)
    out = model(x, [0])[0].double().detach().numpy()[known]
    flags = y[known, 0].double().numpy()
    expected = np.mean(np.log1p(np.exp(out)) - flags * out)
    assert float(losses[0].detach()) == pytest.approx(expected, rel=1e-5)
    found = nets.metrics(model, loaded.test, loaded, range(12))
    assert math.isnan(found[3]) and all(0 <= v <= 100 for k, v in enumerate(found) if k != 3)


def test_errors_of_numbers_are_in_the_target_s_unit(tmp_path, rng):
    _, values = make_qm8(tmp_path, rng)
    loaded = data.load("qm8", tmp_path, SETTING, 0, tmp_path / "cache")
    model = nets.Network(loaded, 4)
    with torch.no_grad():
        for head in model.net.heads.values():
            head.weight.zero_()
            head.bias.fill_(0.5)  # says half a deviation above the mean of the training rows
    found = nets.metrics(model, loaded.test, loaded, [7])
    y = loaded.test.y[:, 7].double().numpy()
    assert found[0] == pytest.approx(loaded.scale[7] * np.abs(y - 0.5).mean(), rel=1e-5)
    spread = loaded.scale[7] / values[:, 7].std()
    assert 0.5 < spread < 2  # the deviation of that very column, up to the rows


# ---------------------------------------------------------------- cells


def test_seeds_stand_outermost_and_every_cell_has_its_own_key():
    found = cells.all_cells(["a", "b"], ["mean", "rlw"], 3)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    assert len({cell.key for cell in found}) == len(found)
    kinds = [(c.method, c.sharpness) for c in cells.all_cells(["a"], ["pcgrad"], 1, [WIDE, DIRECT])]
    assert kinds == [("pcgrad", WIDE), ("pcgrad", DIRECT)]
    first = [(c.method, c.sharpness) for c in found if c.seed == 0 and c.dataset == "a"]
    assert first == [
        (SINGLE, PLAIN), (SINGLE, DECOMPOSED), ("mean", PLAIN), ("mean", DECOMPOSED),
        ("mean", DIRECT), ("rlw", PLAIN), ("rlw", DECOMPOSED),
    ]  # fmt: skip


def test_the_issue_s_least_is_there():
    assert len(cells.METHODS) >= 12 and len(FULL) == 5 and list(QUICK) == list(FULL)
    assert set(cells.COMPARED_DIRECT) <= set(cells.METHODS)
    for label in cells.METHODS:
        assert isinstance(cells.TABLE[label](cells.Run(1, 3, 5)), cells.Weighting)


def test_a_fingerprint_knows_all_that_a_result_follows_from():
    cell = Cell("adult", "mean", PLAIN, 0)
    marks = [
        cells.fingerprint(cell, SETTING, 1, "test"),
        cells.fingerprint(cell, SETTING, 2, "test"),
        cells.fingerprint(cell, SETTING, 1, "validation"),
        cells.fingerprint(replace(cell, seed=1), SETTING, 1, "test"),
        cells.fingerprint(replace(cell, sharpness=DECOMPOSED), SETTING, 1, "test"),
        *(
            cells.fingerprint(
                cell, replace(SETTING, **{field: getattr(SETTING, field) + 1}), 1, "test"
            )
            for field in SETTING.__dataclass_fields__
        ),
    ]
    assert len(set(marks)) == len(marks)
    assert cells.fingerprint(cell, SETTING, 1, "test") == marks[0]


@pytest.mark.parametrize("sharpness", cells.SHARPNESS)
def test_a_cell_trains_as_its_name_says(sharpness):
    model = torch.nn.Linear(1, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = cells.make_optimizer(model, base, Cell("adult", "cagrad", sharpness, 0), SETTING, 2)
    assert type(optimizer.weighting).__name__ == "CAGrad"
    if sharpness == PLAIN:
        assert optimizer.sharpness is None
    else:
        assert optimizer.sharpness.rho == (0.3 if "wide" in sharpness else 0.07)
        assert optimizer.sharpness.aggregate == (
            "direct" if sharpness.endswith("direct") else "decomposed"
        )


def test_training_learns_repeats_and_differs_by_seed(tmp_path, rng):
    make_tox21(tmp_path, rng)
    loaded = data.load("tox21", tmp_path, SETTING, 0, tmp_path / "cache")
    flags = (loaded.train.x > 0).float()
    loaded.train.y[:, 0] = flags[:, (flags.mean(0) - 0.5).abs().argmin()]  # about as many of each
    setting = replace(SETTING, epochs=40, lr=1e-2, width=8)
    cell = Cell("tox21", "mean", PLAIN, 0)
    model = cells._trained(loaded, setting, cell, list(range(12)))
    assert nets.metrics(model, loaded.train, loaded, [0])[0] > 95
    found = [cells.train(loaded, SETTING, c, "test") for c in (cell, cell, replace(cell, seed=1))]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2], equal_nan=True)


@pytest.mark.parametrize("sharpness", [PLAIN, DECOMPOSED])
@pytest.mark.parametrize("method", cells.METHODS)
def test_every_method_trains(tmp_path, rng, method, sharpness):
    make_adult(tmp_path, rng)
    loaded = data.load("adult", tmp_path, SETTING, 0, tmp_path / "cache")
    found = cells.train(loaded, SETTING, Cell("adult", method, sharpness, 0), "test")
    assert len(found) == 3 and all(0 <= value <= 100 for value in found)


def test_single_tasks_are_networks_of_their_own(tmp_path, rng):
    """The mean of one task is that task: its network is that of a training that knows no other."""
    make_adult(tmp_path, rng)
    loaded = data.load("adult", tmp_path, SETTING, 0, tmp_path / "cache")
    setting = replace(SETTING, lr=3e-2, epochs=5, width=8)
    cell = Cell("adult", SINGLE, PLAIN, 0)
    found = cells.train(loaded, setting, cell, "test")
    alone = [
        nets.metrics(cells._trained(loaded, setting, cell, [k]), loaded.test, loaded, [k])[0]
        for k in range(3)
    ]
    assert found == alone
    together = cells.train(loaded, setting, replace(cell, method="mean"), "test")
    assert found != together


class Quadratic(torch.nn.Module):
    """L_t = w A_t w / 2: the gradient A_t w gains rho A_t A_t w / ||A_t w||; a head that takes no part."""

    def __init__(self, matrices, w):
        super().__init__()
        self.matrices = torch.from_numpy(matrices)
        self.w = torch.nn.Parameter(torch.from_numpy(w))
        self.net = torch.nn.ModuleDict({"heads": torch.nn.Linear(1, 1)})

    def losses(self, x, y, tasks):
        return [0.5 * self.w @ self.matrices[task] @ self.w for task in tasks]


def test_what_gradients_gain_at_the_radius(tmp_path, rng):
    make_adult(tmp_path, rng)
    loaded = data.load("adult", tmp_path, SETTING, 0, tmp_path / "cache")
    matrices = rng.normal(size=(3, 5, 5))
    matrices += matrices.transpose(0, 2, 1)
    w = rng.normal(size=5)
    model = Quadratic(matrices, w.copy())
    plain, flat = parts._rows(model, loaded, SETTING)
    for task, matrix in enumerate(matrices):
        g = matrix @ w
        np.testing.assert_allclose(plain[task], g, rtol=1e-9, atol=1e-9)
        gain = SETTING.rho * matrix @ g / np.linalg.norm(g)
        np.testing.assert_allclose(flat[task], gain, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(model.w.detach(), w, rtol=1e-12, atol=1e-12)


def test_nash_mtl_s_flat_part_is_as_large_as_the_other(tmp_path, rng):
    """Its update has the norm sqrt(T) whatever the gradients are."""
    make_adult(tmp_path, rng)
    setting = replace(SETTING, rho=1e-3, width=16)
    job = run.make_job(tmp_path, tmp_path / "out", {"adult": setting}, ["adult"])
    found = parts.ratios(job, ["mean", "nash_mtl"], lambda line: None)["adult"]
    assert found["nash_mtl"] == pytest.approx(1, rel=0.05)
    assert found["mean"] < 0.5 and found["rows"] < 0.5


# ---------------------------------------------------------------- running and resuming


@pytest.fixture
def job(tmp_path, rng):
    make_adult(tmp_path / "data", rng)
    return run.make_job(tmp_path / "data", tmp_path / "out", {"adult": SETTING}, ["adult"])


def worked(job, todo, monkeypatch):
    """The cells that a run would work on, done in this process."""
    done = []

    def results(_, pending, __):
        for cell in pending:
            done.append(cell)
            run._Worker.job, run._Worker.loaded = job, None
            yield cell, run.work(cell)

    monkeypatch.setattr(run, "_results", results)
    lines = []
    run.run(job, todo, 1, lines.append)
    return done, lines


def test_a_finished_cell_is_not_run_again_and_a_half_written_one_is(job, monkeypatch):
    todo = [Cell("adult", "mean", sharpness, 0) for sharpness in cells.SHARPNESS]
    assert worked(job, todo, monkeypatch)[0] == todo
    assert worked(job, todo, monkeypatch)[0] == []
    path = job.out / "cells" / f"{todo[1].key}.json"
    path.write_text(path.read_text()[:-20])
    assert worked(job, todo, monkeypatch)[0] == [todo[1]]
    other = replace(job, settings={"adult": replace(SETTING, lr=0.5)})
    assert worked(other, todo, monkeypatch)[0] == todo
    assert not list((job.out / "cells").glob("*.new"))


def test_a_cell_that_fails_is_kept_shown_and_tried_again(job, monkeypatch):
    todo = [Cell("adult", "mean", PLAIN, 0), Cell("adult", "rlw", PLAIN, 0)]
    with monkeypatch.context() as patch:
        patch.setitem(cells.TABLE, "rlw", lambda run: 1 / 0)
        done, lines = worked(job, todo, patch)
    assert done == todo
    assert sum("rlw-plain-0: FAILED: ZeroDivisionError" in line for line in lines) == 2
    assert "error" in job.known(todo[1]) and not run.finished(job.known(todo[1]))
    assert worked(job, todo, monkeypatch)[0] == [todo[1]]
    assert run.finished(job.known(todo[1]))


def test_worker_processes_give_what_one_process_gives(job, monkeypatch):
    todo = [Cell("adult", "mean", PLAIN, 0)]
    results = run.run(job, todo, 1, lambda line: None)
    monkeypatch.setattr(run._Worker, "job", job, raising=False)
    monkeypatch.setattr(run._Worker, "loaded", None)
    assert run.work(todo[0])["metrics"] == results[0]["metrics"]


# ---------------------------------------------------------------- statistics


def test_one_data_set_s_interval_is_the_t_interval(rng):
    values = rng.normal(size=3)
    found = stats.over_seeds(values)
    expected = scipy_stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(expected.pvalue)


def test_two_data_sets_are_welch_s_test(rng):
    """The mean of two independent means is half of the difference of one and the other's negative."""
    values = rng.normal(size=(2, 4)) * [[1.0], [5.0]]
    found = stats.stratified(values)
    expected = scipy_stats.ttest_ind(values[0], -values[1], equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.half == pytest.approx((high - low) / 4)
    assert math.isnan(stats.over_seeds(np.array([1.0])).half)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([]) == []


# ---------------------------------------------------------------- tables


def made_up_results():
    """Two data sets, two seeds: numbers that are easy by hand."""
    test = {
        ("multifashion", SINGLE, PLAIN): [[50, 80], [50, 80]],
        ("multifashion", "mean", PLAIN): [[55, 80], [50, 80]],  # -5, 0
        ("multifashion", "mean", DECOMPOSED): [[60, 80], [55, 80]],  # -10, -5
        ("multifashion", "mean", DIRECT): [[60, 80], [55, 80]],
        ("multifashion", "rlw", PLAIN): [[40, 72], [40, 72]],  # 15, 15
        ("multifashion", "rlw", DECOMPOSED): [[50, 80], [50, 80]],  # 0, 0
        ("qm8", SINGLE, PLAIN): [[2e-3] * 12, [2e-3] * 12],
        ("qm8", "mean", PLAIN): [[1e-3] * 12, [2e-3] * 12],  # -50, 0
        ("qm8", "mean", DECOMPOSED): [[1e-3] * 12, [1e-3] * 12],  # -50, -50
        ("qm8", "mean", DIRECT): [[1e-3] * 12, [2e-3] * 12],  # -50, 0
        ("qm8", "rlw", PLAIN): [[4e-3] * 12, [3e-3] * 12],  # 100, 50
    }
    done = [
        {"dataset": d, "method": m, "sharpness": s, "seed": seed, "metrics": row, "seconds": 2.0}
        for (d, m, s), rows in test.items()
        for seed, row in enumerate(rows)
    ]
    failed = {
        "dataset": "qm8", "method": "rlw", "sharpness": DECOMPOSED, "seed": 0, "error": "bad | luck",
    }  # fmt: skip
    about = {
        "settings": {name: vars(FULL[name]) for name in ("multifashion", "qm8")},
        "torch": "2", "python": "3", "asked": 24,
    }  # fmt: skip
    return {"about": about, "cells": [*done, failed]}


@pytest.fixture
def results():
    from bench.methods.results import Results

    return Results(made_up_results())


def test_delta_and_ranks_by_hand(results):
    assert results.methods(PLAIN) == ["mean", "rlw"]
    assert results.methods(DECOMPOSED) == ["mean"] and results.partial(DECOMPOSED) == ["rlw"]
    np.testing.assert_allclose(results.delta("multifashion", ("mean", PLAIN)), [-5, 0])
    np.testing.assert_allclose(results.delta("qm8", ("rlw", PLAIN)), [100, 50])
    # accuracy: mean + SAM 57.5, mean 52.5, rlw 40; then 80, 80, 72
    assert results.ranks("multifashion") == {
        ("mean", PLAIN): 1.75, ("mean", DECOMPOSED): 1.25, ("rlw", PLAIN): 3.0,
    }  # fmt: skip
    assert results.ranks("qm8") == {
        ("mean", PLAIN): 2.0, ("mean", DECOMPOSED): 1.0, ("rlw", PLAIN): 3.0,
    }  # fmt: skip


def test_tables_have_these_numbers(results):
    from bench.methods import report

    times = {
        "multifashion": {"mean": {PLAIN: 0.01, DECOMPOSED: 0.02}},
        "qm8": {"mean": {PLAIN: 0.01, DECOMPOSED: 0.08}},
    }
    text = report.overall(results, times).splitlines()
    assert text[2].startswith("| mean + SAM | 1.1 | -28.75 ± ") and text[2].endswith("| 4.00× |")
    assert text[3].startswith("| mean | 1.9 | -13.75 ± ") and text[3].endswith("| 1.00× |")
    # rlw - mean: 20, 15 and 150, 50
    assert text[4].startswith("| rlw | 3.0 | +45.00 ± ") and "| +58.75 ± " in text[4]
    sharp = report.sharpness_effect(results)
    assert "| mean | -5.00 ± 0.00 | -25.00 ± " in sharp and "rlw" not in sharp
    assert "-25.00 ± 317.66" in sharp  # t of one degree of freedom: 12.706 * 35.36 / sqrt(2)
    direct = report.direct_effect(results, DECOMPOSED, DIRECT)
    assert "| mean | +0.00 ± 0.00 | -25.00 ± 317.66 | -12.50 ± 158.83 |" in direct
    images = report.dataset_table(results, "multifashion", times)
    assert "| mean | 52.50 | 80.00 | 66.25 ± 15.88 | 1.8 | -2.50 ± 31.77 | 10.0 |" in images
    assert "| single-task | 50.00 | 80.00 | 65.00 ± 0.00 |  | 0 by definition |  |" in images
    many = report.dataset_table(results, "qm8", times)
    assert "<details>" in many and "| mean | 1.50 ± 6.35 |" in many  # 1e-3 of the unit
    assert "rlw + SAM" not in many
    ran = report.run_block(results)
    assert "22 cells finished, 1 failed, of 24" in ran and "44 CPU seconds" in ran
    assert "qm8, rlw + SAM, seed 0: `bad | luck`" in ran
    assert "some cells missing + SAM: rlw" in ran


def test_a_page_keeps_its_prose(tmp_path, results):
    from bench.methods import report

    source = tmp_path / "methods.json"
    about = made_up_results()
    store.write_all(source, about["about"], about["cells"])
    assert json.loads(source.read_text()) == about
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- begin qm8 -->\nold\n<!-- end qm8 -->\n\nProse \\1 stays.\n")
    report.write_report(source, page)
    text = page.read_text()
    assert "old" not in text and "Prose \\1 stays." in text and text.count("begin overall") == 1
    report.write_report(source, page)
    assert page.read_text() == text


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    from bench.methods.__main__ import main

    assert main(["run", "--data", str(tmp_path), "--datasets", "qm8", "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "--methods", "nonsense"])


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not here")
def test_the_real_adult_file_reads():
    training = data.read_adult(REAL / "adult" / "adult.data.gz")
    other = data.read_adult(REAL / "adult" / "adult.test.gz")
    assert (len(training), len(other)) == (32561, 16281)
