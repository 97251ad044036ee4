"""The demo: its data files, its pairs, and a quick run from end to end."""

import argparse
import gzip
import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from flatmtl.demo.idx import IdxError, LabelledImages, load_split, read_idx
from flatmtl.demo.multifashion import CANVAS, make_pairs, make_splits
from flatmtl.demo.run import BUNDLED_DATA, add_arguments, main
from flatmtl.demo.summary import difference
from flatmtl.demo.train import RunConfig, RunResult

EXTRA = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]


def idx_bytes(array: np.ndarray) -> bytes:
    """The bytes of an IDX file that holds ``array``."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_split(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes a train split, the images gzipped and the labels plain."""
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


@pytest.fixture
def few() -> LabelledImages:
    """40 random images with no black pixel, four of each class."""
    generator = np.random.default_rng(7)
    images = generator.integers(1, 256, size=(40, 28, 28), dtype=np.uint8)
    return LabelledImages(images, np.arange(40, dtype=np.uint8) % 10)


def test_split_reads_gzipped_and_plain_files(tmp_path: Path, few: LabelledImages) -> None:
    write_split(tmp_path, few.images, few.labels)
    read = load_split(tmp_path, "train")
    np.testing.assert_array_equal(read.images, few.images)
    np.testing.assert_array_equal(read.labels, few.labels)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdxError, match="train-images-idx3-ubyte: no such file"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not an IDX file .* starts with nothing"),
        (b"\x89PNG\r\n", "not an IDX file .* starts with 89 50 4e"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),  # floats
        (b"\0\0\x08\x03\0\0\0\x01", "truncated: the header alone has 16 bytes, got 8"),
        (idx_bytes(np.ones((2, 3), np.uint8))[:-1], r"truncated: .*\[2, 3\], 18 .* got 17"),
        (idx_bytes(np.ones((2, 3), np.uint8)) + b"x", "too long: .* got 19"),
        (
            gzip.compress(idx_bytes(np.ones(99, np.uint8)), mtime=0)[:-9],
            "truncated: the gzip stream",
        ),
        (b"\x1f\x8bnonsense", "damaged gzip stream"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "some-file"
    path.write_bytes(content)
    with pytest.raises(IdxError, match=f"some-file: {complaint}"):
        read_idx(path)


@pytest.mark.parametrize(
    ("image_shape", "labels", "complaint"),
    [
        ((3, 28, 28), [1, 2], "train-labels.*3 images, got 2 labels"),
        ((2, 27, 28), [1, 2], r"train-images.*shape \[N, 28, 28\], got \[2, 27, 28\]"),
        ((2, 28, 28), [[1], [2]], r"train-labels.*shape \[N\], got \[2, 1\]"),
        ((2, 28, 28), [1, 10], "train-labels.*labels must be 0 to 9, got 10"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, image_shape: tuple[int, ...], labels: list, complaint: str
) -> None:
    write_split(tmp_path, np.zeros(image_shape, np.uint8), np.array(labels, np.uint8))
    with pytest.raises(IdxError, match=complaint):
        load_split(tmp_path, "train")


def test_bundled_data_is_whole_and_balanced() -> None:
    for split, count in (("train", 5000), ("t10k", 3500)):
        data = load_split(BUNDLED_DATA, split)
        assert data.images.shape == (count, 28, 28)
        assert np.bincount(data.labels, minlength=10).min() > 0.9 * count / 10


def test_pairs_hold_both_images_at_their_offsets(few: LabelledImages) -> None:
    pairs = make_pairs(few, np.arange(40), count=300, seed=3)
    assert pairs.images.shape == (300, CANVAS, CANVAS)
    np.testing.assert_array_equal(pairs.labels, few.labels[pairs.sources])
    assert (pairs.labels[:, 0] != pairs.labels[:, 1]).all()
    for image, sources, offsets in zip(pairs.images, pairs.sources, pairs.offsets, strict=True):
        expected = np.zeros_like(image)
        for source, (row, column) in zip(sources, offsets, strict=True):
            window = expected[row : row + 28, column : column + 28]
            np.maximum(window, few.images[source], out=window)
        np.testing.assert_array_equal(image, expected)
    # Every offset of the 5 x 5 at each place occurs, and no other.
    for place, first in ((0, 0), (1, 4)):
        grid = {(first + i, first + j) for i in range(5) for j in range(5)}
        assert set(map(tuple, pairs.offsets[:, place].tolist())) == grid


def test_partners_are_uniform_over_the_other_classes() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 2], dtype=np.uint8)
    data = LabelledImages(np.zeros((7, 28, 28), np.uint8), labels)
    pairs = make_pairs(data, np.arange(7), count=7_000, seed=0)
    counts = np.zeros((7, 7))
    np.add.at(counts, (pairs.sources[:, 0], pairs.sources[:, 1]), 1)
    np.testing.assert_array_equal(counts.sum(axis=1), 1_000)
    allowed = labels[:, None] != labels[None, :]
    assert (counts[~allowed] == 0).all()
    expected = 1_000 / allowed.sum(axis=1, keepdims=True)
    deviation = np.abs(counts - expected)[allowed] / np.sqrt(expected + 0 * counts)[allowed]
    assert deviation.max() < 5.0


def test_splits_are_fixed_and_share_no_image(few: LabelledImages) -> None:
    marks = np.arange(1, 61, dtype=np.uint8)  # one grey value for each of 40 + 20 images
    images = np.broadcast_to(marks[:, None, None], (60, 28, 28))
    train = LabelledImages(images[:40], few.labels)
    test = LabelledImages(images[40:], few.labels[:20])
    splits, again = (make_splits(train, test, (200, 60, 60)) for _ in range(2))
    seen = []
    for name in ("train", "validation", "test"):
        pairs, repeated = getattr(splits, name), getattr(again, name)
        np.testing.assert_array_equal(pairs.images, repeated.images)
        np.testing.assert_array_equal(pairs.labels, repeated.labels)
        seen.append(set(np.unique(pairs.images)) - {0})
    assert seen == [set(range(1, 33)), set(range(33, 41)), set(range(41, 61))]
    other = make_splits(train, test, (200, 60, 60), seed=1)
    assert (other.train.sources != splits.train.sources).any()


def test_splits_need_two_classes(few: LabelledImages) -> None:
    one_class = LabelledImages(few.images, np.zeros(40, np.uint8))
    with pytest.raises(ValueError, match="test images must have at least two classes"):
        make_splits(few, one_class, (8, 8, 8))


def made_up_runs(method: str, accuracies: list[float]) -> list[RunResult]:
    """One run a seed that ends at the given percentages, after an epoch that must not count."""
    return [
        RunResult(RunConfig(method, seed, 4), test=[[0.0, 0.0], *[[a / 100, a / 100]] * 3])
        for seed, a in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("flat", "verdict"),
    [
        ([71.0, 72.5, 71.5], "a gain in every seed"),
        ([69.0, 69.5, 69.2], "a loss in every seed"),
        ([69.0, 73.0, 71.0], "no clear difference"),
        ([70.1, 73.0, 70.2], "no clear difference"),  # all above, but within the noise
    ],
)
def test_verdict_on_the_difference(flat: list[float], verdict: str) -> None:
    plain = [70.0, 71.0, 70.0]
    runs = made_up_runs("f-pcgrad", flat) + made_up_runs("pcgrad", plain)
    found = difference(runs[::-1])
    np.testing.assert_allclose(found.per_seed, np.subtract(flat, plain))
    assert found.spread.mean == pytest.approx(np.mean(found.per_seed))
    assert found.spread.deviation == pytest.approx(np.std(found.per_seed, ddof=1))
    assert found.verdict == verdict


def test_one_seed_carries_no_verdict() -> None:
    runs = made_up_runs("f-pcgrad", [72.0]) + made_up_runs("pcgrad", [70.0])
    assert difference(runs).verdict == "one seed only, so no statement"


def parse(*arguments: str) -> argparse.Namespace:
    """The demo's arguments as the command line gives them."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_missing_extra_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
    assert main(parse("--quick")) == 2
    assert "pip install flatmtl[demo]" in capsys.readouterr().err


@pytest.mark.skipif(bool(EXTRA), reason=f"needs {', '.join(EXTRA)}")
class TestRun:
    def test_quick_run_writes_results_and_curves(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "some" / "where"
        assert main(parse("--quick", "--epochs", "2", "--out", str(out))) == 0
        results = json.loads((out / "results.json").read_text())
        assert results["rho"] in (0.02, 0.05)
        trained = {(r["config"]["method"], r["config"]["seed"]) for r in results["runs"]}
        assert trained == {("mean", 0), ("pcgrad", 0), ("f-pcgrad", 0)}
        for run in results["runs"]:
            accuracy = np.array([run["validation"], run["test"]])
            assert accuracy.shape == (2, 2, 2)  # [splits, epochs, tasks]
            assert ((accuracy >= 0.0) & (accuracy <= 1.0)).all()
            assert run["loss"][-1] < run["loss"][0]
            assert run["seconds_per_step"] > 0.0
            assert 0.0 < run["own_share"] < 1.0
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
        printed = capfd.readouterr().out
        for words in ("F-PCGrad", "chosen on validation pairs", "F-PCGrad - PCGrad:", "curves.png"):
            assert words in printed

    def test_bad_data_is_an_error_before_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert main(parse("--data", str(tmp_path), "--out", str(out))) == 2
        assert "train-images-idx3-ubyte: no such file" in capsys.readouterr().err
        assert not out.exists()
