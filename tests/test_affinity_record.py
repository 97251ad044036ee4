"""AffinityRecord against numpy over the raw samples, and what it saves, reads and refuses."""

from __future__ import annotations

import copy
import json
import pickle
import re
import zipfile

import numpy as np
import pytest

import flatmtl
from flatmtl import AffinityRecord, sample_overlap

pytestmark = pytest.mark.filterwarnings("error")

HOSTILE = ["a,b", 'say "hi"', "naïve 任务 🙂", "two\nlines", " padded ", 7, "7 of 9", "$x$"]


def samples(rng, steps=(13, 0, 29), tasks=4, missing=0.3) -> list[np.ndarray]:
    """[n, T, T] of each epoch; a missing one is NaN. A large common part tests the formula's rounding."""
    found = []
    for n in steps:
        values = rng.standard_normal((n, tasks, tasks)) + 50.0
        values[rng.random(values.shape) < missing] = np.nan
        values[:, 0, 1] = np.nan  # never measured
        found.append(values)
    return found


def moments(epochs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """mean, m2, count by epoch, each a plain loop over the samples that are there."""
    shape = (len(epochs), *epochs[0].shape[1:])
    mean, m2 = np.full(shape, np.nan), np.zeros(shape)
    count = np.zeros(shape, np.int64)
    for e, values in enumerate(epochs):
        for at in np.ndindex(*shape[1:]):
            there = [value[at] for value in values if not np.isnan(value[at])]
            count[(e, *at)] = len(there)
            if there:
                mean[(e, *at)] = np.mean(there)
                m2[(e, *at)] = np.sum((np.array(there) - np.mean(there)) ** 2)
    return {"mean": mean, "m2": m2, "count": count}


def a_record(epochs, tasks=None, **changes) -> AffinityRecord:
    found = moments(epochs)
    names = list(range(epochs[0].shape[1])) if tasks is None else tasks
    arguments = {
        **{part: {"affinity": values} for part, values in found.items()},
        "tasks": names,
        "groups": (),
        "group_mean": None,
        "group_m2": None,
        "group_count": None,
        "steps": [len(values) for values in epochs],
        "metadata": {"mode": "exact", "look_ahead": "sgd", "momentum": False},
    }
    return AffinityRecord(**(arguments | changes))


def all_of(epochs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and count of all samples together."""
    raw = np.concatenate(epochs)
    count = (~np.isnan(raw)).sum(axis=0)
    mean, error = np.full(count.shape, np.nan), np.full(count.shape, np.nan)
    for at in np.ndindex(*count.shape):
        there = raw[(slice(None), *at)]
        there = there[~np.isnan(there)]
        if len(there):
            mean[at] = there.mean()
        if len(there) > 1:
            error[at] = there.std(ddof=1) / np.sqrt(len(there))
    return mean, error, count


def same(one: AffinityRecord, other: AffinityRecord) -> bool:
    for name in ("group_mean", "group_m2", "group_count", "steps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("mean", "m2", "count"):
        assert list(getattr(one, name)) == list(getattr(other, name))
        for quantity, values in getattr(one, name).items():
            np.testing.assert_array_equal(values, getattr(other, name)[quantity])
    assert one.tasks == other.tasks and [type(t) for t in one.tasks] == [
        type(t) for t in other.tasks
    ]
    assert one.groups == other.groups and one.metadata == other.metadata
    assert (one.overlap is None) == (other.overlap is None)
    if one.overlap is not None:
        np.testing.assert_array_equal(one.overlap, other.overlap)
    return True


def full(rng, tasks=("ss", 3, "a,b", "edge")) -> AffinityRecord:
    epochs = samples(rng, tasks=len(tasks))
    groups = [tuple(tasks[:2]), tuple(tasks[1:])]
    joint = moments([values[:, :, :2] for values in epochs])
    other = moments(samples(rng, tasks=len(tasks)))
    mine = moments(epochs)
    return a_record(
        epochs,
        list(tasks),
        **{part: {"affinity": mine[part], "cosine": other[part]} for part in mine},
        groups=groups,
        **{f"group_{part}": joint[part] for part in joint},
        overlap=rng.random((len(tasks), len(tasks))),
    )


# ---------------------------------------------------------------- numbers


def test_means_and_errors_are_those_of_all_samples(rng):
    epochs = samples(rng)
    record = a_record(epochs)
    mean, error, count = all_of(epochs)
    np.testing.assert_allclose(record.matrix(), mean, rtol=1e-13)
    np.testing.assert_allclose(record.standard_error(), error, rtol=1e-9)
    np.testing.assert_array_equal(record.counts(), count)
    assert np.isnan(record.matrix()[0, 1]) and record.counts()[0, 1] == 0
    assert record.counts().dtype == np.int64 and record.matrix().dtype == np.float64
    assert record.quantities == ["affinity"]


@pytest.mark.parametrize(
    ("epochs", "at"),
    [(0, [0]), (-1, [2]), (np.int64(2), [2]), (slice(0, 2), [0, 1]), (slice(-2, None), [1, 2])],
)
def test_some_epochs(epochs, at, rng):
    raw = samples(rng)
    record = a_record(raw)
    mean, error, count = all_of([raw[e] for e in at])
    np.testing.assert_allclose(record.matrix(epochs=epochs), mean, rtol=1e-13)
    np.testing.assert_allclose(record.standard_error("affinity", epochs), error, rtol=1e-9)
    np.testing.assert_array_equal(record.counts("affinity", epochs), count)


def test_one_sample_has_no_error(rng):
    record = a_record([rng.random((1, 2, 2)), rng.random((0, 2, 2))])
    assert np.isnan(record.standard_error()).all() and (record.counts() == 1).all()
    np.testing.assert_array_equal(record.matrix(), record.mean["affinity"][0])


def test_an_epoch_without_measurements(rng):
    record = a_record(samples(rng, steps=(5, 0)))
    assert np.isnan(record.matrix(epochs=1)).all() and np.isnan(record.by_epoch()[1]).all()
    assert not record.counts(epochs=1).any()
    none = a_record([np.zeros((0, 3, 3))])
    assert np.isnan(none.matrix()).all() and np.isnan(none.standard_error()).all()


def test_a_record_without_epochs_knows_nothing():
    empty = {"affinity": np.zeros((0, 2, 2))}
    record = AffinityRecord(tasks=["a", "b"], mean=empty, m2=empty, count=empty, steps=[])
    assert np.isnan(record.matrix()).all() and not record.counts().any()
    assert record.caveats() and "a" in str(record)


def test_by_epoch_and_running(rng):
    raw = samples(rng, steps=(4, 0, 9, 6))
    record = a_record(raw)
    for e in range(4):
        np.testing.assert_allclose(record.by_epoch()[e], all_of([raw[e]])[0], rtol=1e-13)
        np.testing.assert_allclose(record.running()[e], all_of(raw[: e + 1])[0], rtol=1e-13)


def test_groups(rng):
    raw = samples(rng)
    joint = [values[:, :, :3] + 1.0 for values in raw]
    found = {f"group_{part}": values for part, values in moments(joint).items()}
    record = a_record(raw, groups=[(0, 1), [2, 3], (1, 2, 3)], **found)
    assert record.groups == [(0, 1), (2, 3), (1, 2, 3)]
    mean, error, _ = all_of(joint)
    np.testing.assert_allclose(record.group_matrix(), mean, rtol=1e-13)
    np.testing.assert_allclose(record.group_standard_error(), error, rtol=1e-9)
    np.testing.assert_allclose(record.group_matrix(0), all_of(joint[:1])[0], rtol=1e-13)
    assert a_record(raw).group_matrix().shape == (4, 0)


def test_normalised_rows_have_mean_0_and_deviation_1(rng):
    epochs = samples(rng, tasks=6)
    plain = a_record(epochs).matrix()
    plain[3] *= 1e-7
    plain[4, :] = 0.1  # constant but for rounding
    plain[4, 2] = 0.1 * (1 + 2e-16)
    found = AffinityRecord.from_matrix(plain).matrix(normalise=True)
    for i in range(6):
        others = [j for j in range(6) if j != i and not np.isnan(plain[i, j])]
        if i == 4:
            assert not found[4].any()
            continue
        np.testing.assert_allclose(found[i, others].mean(), 0.0, atol=1e-9)
        np.testing.assert_allclose(found[i, others].std(), 1.0, rtol=1e-9)
        # the diagonal is moved along, so that what is larger stays larger
        expected = (plain[i, i] - plain[i, others].mean()) / plain[i, others].std()
        np.testing.assert_allclose(found[i, i], expected, rtol=1e-7)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(plain))


def test_one_task_alone():
    record = AffinityRecord.from_matrix([[0.5]], ["only"])
    assert record.matrix()[0, 0] == 0.5 and record.matrix(normalise=True)[0, 0] == 0.0
    assert "only" in str(record) and not record.caveats()


def test_what_is_given_is_copied_and_cannot_be_changed(rng):
    matrix = rng.random((3, 3))
    record = AffinityRecord.from_matrix(matrix)
    before, matrix[:] = matrix.copy(), 0.0
    np.testing.assert_array_equal(record.matrix(), before)
    with pytest.raises(ValueError, match="read-only"):
        record.mean["affinity"][0, 0, 0] = 1.0
    with pytest.raises(AttributeError):
        record.tasks = []
    record.matrix()[0, 0] = 5.0
    assert record.matrix()[0, 0] != 5.0


def test_copies_and_pickles(rng):
    record = full(rng)
    assert same(copy.deepcopy(record), record)
    assert same(pickle.loads(pickle.dumps(record)), record)


# ---------------------------------------------------------------- sample overlap


def test_sample_overlap(rng):
    labelled = rng.random((60, 5)) < rng.random(5)
    labelled[:, 2] = labelled[:, 1]
    labelled[:, 4] = False
    labelled[0, :4] = True
    found = sample_overlap(labelled)
    for i in range(5):
        mine = labelled[:, i]
        for j in range(5):
            if i == 4:
                assert np.isnan(found[i, j])
            else:
                assert found[i, j] == pytest.approx((mine & labelled[:, j]).sum() / mine.sum())
    assert found[1, 2] == 1.0 and found[0, 4] == 0.0


def test_a_task_within_another():
    """Row = recipient: all of the small task's samples have the large one's label."""
    found = sample_overlap(np.array([[True, True], [True, False], [True, False], [True, False]]))
    np.testing.assert_array_equal(found, [[1.0, 0.25], [1.0, 1.0]])


def test_sample_overlap_refuses():
    with pytest.raises(TypeError, match="labelled must be bool, got float64"):
        sample_overlap(np.ones((3, 2)))
    with pytest.raises(ValueError, match=re.escape("labelled must have shape [samples, tasks]")):
        sample_overlap(np.ones(3, bool))


# ---------------------------------------------------------------- npz


def test_saved_and_loaded(rng, tmp_path):
    record = full(rng)
    record.save(tmp_path / "here.affinity")  # under this name, without .npz added
    assert [path.name for path in tmp_path.iterdir()] == ["here.affinity"]
    assert same(AffinityRecord.load(str(tmp_path / "here.affinity")), record)


def test_hostile_names_are_saved(rng, tmp_path):
    record = full(rng, HOSTILE)
    record.save(tmp_path / "r.npz")
    assert same(AffinityRecord.load(tmp_path / "r.npz"), record)
    assert not [line for line in str(record).splitlines() if line.startswith("lines")]


def test_an_int_and_a_string_that_read_alike(tmp_path):
    record = AffinityRecord.from_matrix(np.eye(2), [1, "1"])
    record.save(tmp_path / "r.npz")
    assert AffinityRecord.load(tmp_path / "r.npz").tasks == [1, "1"]
    with pytest.raises(ValueError, match="must read differently in a CSV file, got 1 twice"):
        record.write_csv(tmp_path / "r.csv")


def test_nothing_in_the_file_is_pickled(rng, tmp_path):
    full(rng).save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
        assert json.loads(str(file["about"]))["metadata"]["orientation"].startswith("row = rec")


def spoil(path, **changes):
    """Writes the file again with some of its arrays changed; None leaves one out."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def test_files_that_are_no_record(rng, tmp_path):
    path = tmp_path / "r.npz"

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            AffinityRecord.load(path)
        assert "r.npz" in str(caught.value) and "pickle" not in str(caught.value)

    with pytest.raises(FileNotFoundError):
        AffinityRecord.load(path)
    for content in (b"", b"no archive at all", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        refused("not an npz file")
    np.save(path.with_suffix(".npy"), np.eye(3))
    path.write_bytes(path.with_suffix(".npy").read_bytes())
    refused("not an npz file")
    np.savez(path, matrix=np.eye(3))
    refused("without metadata .it holds matrix")
    full(rng).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("cut short")
    full(rng).save(path)
    spoil(path, about=np.array("{"))
    refused("metadata cannot be read")
    full(rng).save(path)
    spoil(path, about=np.array('{"format": "something else"}'))
    refused("something else")
    full(rng).save(path)
    spoil(path, steps=None)
    refused("'steps' is missing")
    full(rng).save(path)
    spoil(path, **{"m2.cosine": None})
    refused("m2.cosine")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("about.npy", b"not an array")
    refused("AffinityRecord.save wrote")


def test_a_file_of_a_later_format(rng, tmp_path):
    record = full(rng)
    record.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as file:
        about = json.loads(str(file["about"]))
    spoil(tmp_path / "r.npz", about=np.array(json.dumps(about | {"version": 99})))
    with pytest.raises(ValueError, match="of format 99"):
        AffinityRecord.load(tmp_path / "r.npz")


# ---------------------------------------------------------------- CSV


def test_csv_and_back(rng, tmp_path):
    record = full(rng)
    for quantity in record.quantities:
        record.write_csv(tmp_path / "r.csv", quantity)
        back = AffinityRecord.read_csv(tmp_path / "r.csv")
        np.testing.assert_array_equal(back.matrix(), record.matrix(quantity))
        assert back.tasks == ["ss", "3", "a,b", "edge"] and back.metadata["mode"] == "given"
    assert (tmp_path / "r.csv").read_text().startswith("recipient\\source,ss,3,")


def test_hostile_names_in_a_csv(rng, tmp_path):
    record = AffinityRecord.from_matrix(rng.random((len(HOSTILE), len(HOSTILE))), HOSTILE)
    record.write_csv(tmp_path / "r.csv")
    back = AffinityRecord.read_csv(tmp_path / "r.csv")
    assert back.tasks == [str(name) for name in HOSTILE]
    np.testing.assert_array_equal(back.matrix(), record.matrix())


def test_whole_numbers_are_ints_again(rng, tmp_path):
    AffinityRecord.from_matrix(rng.random((3, 3)), [4, 0, -2]).write_csv(tmp_path / "r.csv")
    assert AffinityRecord.read_csv(tmp_path / "r.csv").tasks == [4, 0, -2]
    (tmp_path / "r.csv").write_text(",01,2\n01,1,2\n2,3,4\n")
    assert AffinityRecord.read_csv(tmp_path / "r.csv").tasks == ["01", "2"]


def test_a_csv_from_a_spreadsheet(tmp_path):
    """With a byte order mark, blank lines, spaces and an empty diagonal."""
    path = tmp_path / "r.csv"
    path.write_bytes(b"\xef\xbb\xbfrecipient\\source,a,b\r\na,, 0.5 \r\n\r\nb,-1e-3,\r\n")
    record = AffinityRecord.read_csv(path)
    np.testing.assert_array_equal(record.matrix(), [[np.nan, 0.5], [-1e-3, np.nan]])
    assert record.tasks == ["a", "b"] and not record.caveats()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "names in its first row and column"),
        ("1,2\n3,4\n", "name the same tasks"),
        (",a,b\na,1,2\n", "must be square, got 1 rows below 2 column names"),
        (",a,b\na,1,2\nb,1,2\nc,1,2\n", "must be square, got 3 rows"),
        (",a,b\na,1,2\nb,1\n", "2 cells in each row, got 1 in 'b'"),
        (",a,b\na,1,2,3\nb,1,2\n", "2 cells in each row, got 3 in 'a'"),
        (",a,b\na,1,\nb,1,2\n", "nan in every cell, got none in row 'a', column 'b'"),
        (",a,b\na,1,x\nb,1,2\n", "numbers, got 'x' in row 'a', column 'b'"),
        (",a,b\na,1,inf\nb,1,2\n", "finite numbers, got inf in row 'a', column 'b'"),
        (",a,b\nb,1,2\na,1,2\n", "in one order, got row 'b' where column 'a'"),
        (",a,a\na,1,2\na,1,2\n", "a name of their own each, got 'a' twice"),
        ("source\\recipient,a,b\na,1,2\nb,1,2\n", "transpose it"),
        (";a;b\na;1;2\nb;1;2\n", "separated by commas"),
    ],
)
def test_csv_files_that_are_no_matrix(text, match, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        AffinityRecord.read_csv(tmp_path / "bad.csv")


def test_a_csv_in_another_encoding(tmp_path):
    (tmp_path / "bad.csv").write_bytes(",é,b\né,1,2\nb,1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match="CSV file in UTF-8"):
        AffinityRecord.read_csv(tmp_path / "bad.csv")


# ---------------------------------------------------------------- caveats and text


def test_no_caveats_where_there_are_none(rng):
    epochs = [rng.random((40, 3, 3))]
    record = a_record(epochs, overlap=np.ones((3, 3)))
    assert record.caveats() == []
    assert "caveat" not in str(record)


def one_caveat(record, *words):
    found = [line for line in record.caveats() if all(word in line for word in words)]
    assert len(found) == 1, record.caveats()
    assert f"caveat: {found[0]}" in str(record).splitlines()
    return found[0]


def test_momentum_takes_the_sign_its_meaning(rng):
    epochs = [rng.random((40, 3, 3))]
    for metadata in ({"momentum": True}, {"look_ahead": "optimizer"}):
        one_caveat(a_record(epochs, metadata={"mode": "exact", **metadata}), "look-ahead", "sign")
    plain = {"mode": "exact", "look_ahead": "optimizer", "momentum": False}
    assert not a_record(epochs, metadata=plain).caveats()


def test_few_steps(rng):
    one_caveat(a_record([rng.random((4, 3, 3)), rng.random((5, 3, 3))]), "9 steps only")
    epochs = [rng.random((10, 3, 3))]
    epochs[0][:6, 1, 2] = np.nan
    line = one_caveat(a_record(epochs), "fewer than 10")
    assert "1 of 6 pairs (1 <- 2)" in line


def test_pairs_that_were_never_measured(rng):
    epochs = [rng.random((20, 3, 3))]
    epochs[0][:, 2, 0] = np.nan
    epochs[0][:, 1, 1] = np.nan  # the diagonal is no pair
    assert "1 of 6 pairs (2 <- 0)" in one_caveat(a_record(epochs), "never measured")


def test_little_sample_overlap(rng):
    share = np.full((4, 4), 0.9)
    share[0, 1], share[2, 3], share[3, 0] = 0.29, 0.35, np.nan
    np.fill_diagonal(share, 0.0)
    line = one_caveat(a_record([rng.random((20, 4, 4))], overlap=share), "arXiv 2604.07848")
    assert "3 of 12 pairs (0 <- 1, 2 <- 3, 3 <- 0)" in line and "2 of them below 30%" in line


def test_losses_that_were_not_positive(rng):
    """The gradients were there, and an affinity was not."""
    found = moments([rng.random((20, 3, 3))])
    fewer = found["count"].copy()
    fewer[0, 1] -= 7
    record = a_record(
        [rng.random((20, 3, 3))],
        ["a", "b", "c"],
        mean={"affinity": found["mean"], "cosine": found["mean"]},
        m2={"affinity": found["m2"], "cosine": found["m2"]},
        count={"affinity": fewer, "cosine": found["count"]},
    )
    assert "1 of 3 recipients: b (7)" in one_caveat(record, "not positive")


def test_values_that_are_not_finite(rng):
    epochs = [rng.random((20, 3, 3))]
    epochs[0][3, 0, 2] = np.inf
    with np.errstate(invalid="ignore"):
        assert "(0 <- 2) is not finite" in one_caveat(a_record(epochs), "not finite")


def test_the_text_says_the_orientation_and_the_values(rng):
    matrix = np.array([[9.0, 0.25, -0.5], [1.5, 9.0, np.nan], [0.125, 2.0, 9.0]])
    lines = str(AffinityRecord.from_matrix(matrix, ["ss", "depth", 3])).splitlines()
    assert lines[0].startswith("row = recipient") and "column = source" in lines[0]
    assert lines[3].split() == ["ss", "depth", "3"]
    assert [line.split() for line in lines[4:7]] == [
        ["ss", "9.00", "0.25", "-0.50"],
        ["depth", "1.50", "9.00", "-"],
        ["3", "0.12", "2.00", "9.00"],
    ]
    assert len({len(line) for line in lines[3:7]}) == 1
    assert "row = recipient" in repr(AffinityRecord.from_matrix(matrix))


def test_small_values_share_a_power_of_ten(rng):
    text = str(AffinityRecord.from_matrix([[1.0, 2.5e-4], [-1e-5, 1.0]], ["a", "b"]))
    assert "in 1e-4" in text and "2.50" in text and "-0.10" in text


def test_long_names_and_many_tasks(rng):
    names = [f"a task with a long name {i}" for i in range(5)]
    lines = str(AffinityRecord.from_matrix(rng.random((5, 5)), names)).splitlines()
    assert lines[3].split() == ["1", "2", "3", "4", "5"]
    assert lines[4].startswith(f" 1 {names[0]}")
    assert max(map(len, lines)) < 100
    many = rng.standard_normal((617, 617))
    many[3, 600] = 99.0
    text = str(AffinityRecord.from_matrix(many))
    assert "3 <- 600" in text and len(text.splitlines()) < 30


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tasks": ["a", "b", "c", "a"]}, "a name of their own each, got 'a' twice"),
        ({"tasks": [0, 1, 2]}, re.escape("mean['affinity'] must have shape [3, 3, 3]")),
        ({"steps": [1, 2]}, re.escape("mean['affinity'] must have shape [2, 4, 4], got [3, 4, 4]")),
        ({"steps": [[1, 2]]}, re.escape("steps must have shape ['epochs'], got [1, 2]")),
        ({"steps": [1, -2, 3]}, "steps must be whole numbers from 0 on"),
        ({"m2": {}}, "m2 must hold the quantities of mean"),
        ({"m2": {"affinity": np.zeros((3, 4, 5))}}, re.escape("m2['affinity'] must have shape")),
        ({"count": {"affinity": np.full((3, 4, 4), 0.5)}}, "must be whole numbers"),
        ({"mean": {"cosine": np.zeros((3, 4, 4))}}, "mean must hold 'affinity'"),
        ({"mean": {"affinity": 0, "speed": 0}}, "got 'affinity', 'speed'"),
        ({"groups": [(0, 9)]}, "groups must be sets of tasks"),
        ({"groups": [()]}, "groups must be sets of tasks"),
        ({"groups": [(0, 0)]}, "got 0 twice"),
        ({"groups": [(0, 1)]}, "group_mean must"),
        ({"group_mean": np.zeros((3, 4, 2))}, re.escape("group_mean must have shape [3, 4, 0]")),
        ({"overlap": np.zeros((4, 3))}, re.escape("overlap must have shape [4, 4]")),
        ({"metadata": {"orientation": "row = source"}}, "orientation"),
    ],
)
def test_arguments_that_do_not_fit(changes, match, rng):
    with pytest.raises((ValueError, TypeError), match=match):
        a_record(samples(rng), **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tasks": [0, 1, 2, None]}, "tasks must be ints or strings, got None"),
        ({"tasks": [0, 1, 2, True]}, "got True"),
        ({"groups": ["ab"]}, "tuples of task names, got the string 'ab'"),
        ({"metadata": {"lr": object()}}, "what JSON can hold"),
        ({"overlap": np.full((4, 4), "x")}, "overlap must be an array of numbers"),
    ],
)
def test_arguments_of_a_wrong_type(changes, match, rng):
    with pytest.raises(TypeError, match=match):
        a_record(samples(rng), **changes)


def test_readers_refuse(rng):
    record = a_record(samples(rng))
    for read in (record.matrix, record.counts, record.standard_error, record.running):
        with pytest.raises(ValueError, match="quantity must be one of 'affinity', got 'cosine'"):
            read("cosine")
    for epochs in (3, -4, slice(5, 9), slice(2, 2)):
        with pytest.raises(ValueError, match="3 epochs, got"):
            record.matrix(epochs=epochs)
    for epochs in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="epochs must be None, an int or a slice"):
            record.matrix(epochs=epochs)


def test_from_matrix_refuses():
    with pytest.raises(ValueError, match=re.escape("matrix must be square, got shape [2, 3]")):
        AffinityRecord.from_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="got inf"):
        AffinityRecord.from_matrix([[np.inf]])
    with pytest.raises(ValueError, match="tasks must be 2 names, as matrix is, got 3"):
        AffinityRecord.from_matrix(np.eye(2), ["a", "b", "c"])


def test_from_matrix_keeps_metadata():
    record = AffinityRecord.from_matrix(np.eye(2), metadata={"lr": [0.1, 0.01]})
    assert record.metadata["lr"] == [0.1, 0.01] and record.metadata["mode"] == "given"
    assert flatmtl.affinity.AffinityRecord is AffinityRecord
