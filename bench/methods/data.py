"""The five data sets, split for a seed: every one as tensors x, y with NaN where a label is missing."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.methods.settings import Setting
from examples.molecules import ngram_features, read_table, split, standardise
from flatmtl.demo.idx import load_split
from flatmtl.demo.multifashion import CANVAS, SHIFTS, SIDE, make_splits, place

FILES = {
    "multifashion": ("fashion-mnist",),
    "fashion_mnist": ("mnist", "fashion-mnist"),
    "qm8": ("qm8/qm8.csv.gz",),
    "tox21": ("tox21/tox21.csv",),
    "adult": ("adult/adult.data.gz", "adult/adult.test.gz"),
}


@dataclass(frozen=True)
class Part:
    """Some samples: x [N, ...], y [N, T] (classes as int64; else float32, NaN where missing)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    """One data set, split.

    ``kind`` names loss and metric: "classes" (cross-entropy, accuracy), "numbers" (squared error of
    standardised targets, mean absolute error in the target's unit) or "flags" (logistic loss, ROC-AUC).
    """

    kind: str
    tasks: list[str]
    train: Part
    validation: Part
    test: Part
    scale: list[float]  # of each task: unit of the target over that of y


def check_folder(folder: Path, names: list[str]) -> None:
    """Whether the files of some data sets are there.

    Raises:
        FileNotFoundError: one is not.
    """
    for name in names:
        for file in FILES[name]:
            if not (folder / file).exists():
                raise FileNotFoundError(
                    f"{folder / file}: no such file, which {name} needs; --data names the folder that "
                    "has it, --datasets leaves data sets out"
                )


def checksum(folder: Path, name: str) -> int:
    """CRC-32 of the files of a data set, one after the other."""
    crc = 0
    for file in FILES[name]:
        path = folder / file
        for each in sorted(path.glob("*ubyte*")) if path.is_dir() else [path]:
            crc = zlib.crc32(each.read_bytes(), crc)
    return crc


def load(name: str, folder: Path, setting: Setting, seed: int, cache: Path) -> Data:
    """A data set as the seed splits it; features that take long to make are kept in ``cache``."""
    if name == "multifashion":
        fashion = load_split(folder / "fashion-mnist", "train")
        test = load_split(folder / "fashion-mnist", "t10k")
        counts = setting.train, setting.validation, setting.test
        pairs = make_splits(fashion, test, counts, 10 * seed)
        parts = [
            _image_part(p.images, p.labels) for p in (pairs.train, pairs.validation, pairs.test)
        ]
        return Data("classes", ["top left", "bottom right"], *parts, [1.0, 1.0])
    if name == "fashion_mnist":
        return _digit_and_garment(folder, setting, seed)
    if name == "adult":
        return _adult(folder, setting, seed)
    kind = {"qm8": "numbers", "tox21": "flags"}[name]
    return _molecules(folder / FILES[name][0], kind, setting, seed, cache)


def _image_part(images: np.ndarray, labels: np.ndarray) -> Part:
    x = torch.from_numpy(images).float().div_(255.0).unsqueeze(1)  # [N, 1, 36, 36]
    return Part(x.to(memory_format=torch.channels_last), torch.from_numpy(labels))


def _digit_and_garment(folder: Path, setting: Setting, seed: int) -> Data:
    """A digit of MNIST at the top left, a garment of Fashion-MNIST at the bottom right."""
    generator = np.random.default_rng(seed)
    parts = []
    for split_name, counts in (
        ("train", (setting.train, setting.validation)),
        ("t10k", (setting.test,)),
    ):
        sources = [load_split(folder / s, split_name) for s in ("mnist", "fashion-mnist")]
        orders = [generator.permutation(len(s.labels)) for s in sources]
        start = 0
        for count in counts:  # no image stands in two parts
            halves, labels = [], []
            for k, (source, order) in enumerate(zip(sources, orders, strict=True)):
                chosen = order[start : start + count]
                offsets = generator.integers(0, SHIFTS, size=(len(chosen), 2))
                offsets += k * (CANVAS - SIDE - (SHIFTS - 1))
                halves.append(place(source.images[chosen], offsets))
                labels.append(source.labels[chosen].astype(np.int64))
            parts.append(_image_part(np.maximum(*halves), np.stack(labels, axis=1)))
            start += count
    return Data("classes", ["digit", "garment"], *parts, [1.0, 1.0])


def _molecules(path: Path, kind: str, setting: Setting, seed: int, cache: Path) -> Data:
    smiles, tasks, values = read_table(path)
    features = _cached(cache / f"{path.name}-{zlib.crc32(path.read_bytes()):08x}.npy", smiles)
    sizes = [setting.train, setting.validation, setting.test]
    rows = split(smiles, sizes, seed)[:3]
    # a rare n-gram stands many deviations out
    x = np.clip(standardise(features, rows[0]), -5, 5).astype(np.float32)
    scale = np.ones(len(tasks))
    if kind == "numbers":
        scale = values[rows[0]].std(0)
        values = standardise(values, rows[0])
    return Data(kind, tasks, *_parts(x, values, rows), scale.tolist())


def _cached(path: Path, smiles: list[str]) -> np.ndarray:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.stem}.{os.getpid()}.npy")  # two workers may come here at once
        np.save(new, ngram_features(smiles))
        new.replace(path)
    return np.load(path)


def _parts(x: np.ndarray, values: np.ndarray, rows: list[np.ndarray]) -> list[Part]:
    return [
        Part(torch.from_numpy(x[r]), torch.from_numpy(values[r].astype(np.float32))) for r in rows
    ]


# Adult's columns. Left out: those that targets are made of (income, marital-status, education-num), those
# that give them away (relationship, education), and fnlwgt, a weight of the census and no trait.
_NUMBERS = {"age": 0, "capital-gain": 10, "capital-loss": 11, "hours-per-week": 12}
_CHOICES = {"workclass": 1, "occupation": 6, "race": 8, "sex": 9, "native-country": 13}
_MARITAL, _EDUCATION_NUM, _INCOME = 5, 4, 14
ADULT_TASKS = ["income > 50K", "never married", "education-num >= 13"]


def read_adult(path: Path) -> list[list[str]]:
    """The rows of one of UCI's files; its comment and the full stops of its labels are taken off."""
    with gzip.open(path, "rt", newline="") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if len(row) == 15]
    return [[cell.strip().rstrip(".") for cell in row] for row in rows]


def adult_table(
    training: list[list[str]], other: list[list[str]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Inputs, targets and the names of the inputs for all rows, the first ones ``training``.

    Returns:
        x float32 [N, F]; y [N, 3], 0 or 1; F names. A value that ``training`` lacks has no column.
    """
    rows = training + other
    columns, names = [], []
    for name, at in _NUMBERS.items():
        values = np.array([float(row[at]) for row in rows])
        columns.append(np.log1p(values) if name.startswith("capital") else values)
        names.append(name)
    for name, at in _CHOICES.items():
        for choice in sorted({row[at] for row in training}):
            columns.append(np.array([float(row[at] == choice) for row in rows]))
            names.append(f"{name}={choice}")
    targets = [
        [row[_INCOME] == ">50K", row[_MARITAL] == "Never-married", int(row[_EDUCATION_NUM]) >= 13]
        for row in rows
    ]
    return np.stack(columns, axis=1).astype(np.float32), np.array(targets, dtype=np.float64), names


def _adult(folder: Path, setting: Setting, seed: int) -> Data:
    training, other = (read_adult(folder / file) for file in FILES["adult"])
    x, y, _ = adult_table(training, other)
    # rows that are equal in every column stand on one side
    rows = split([" ".join(row) for row in training], [setting.train, setting.validation], seed)[:2]
    rows.append(len(training) + np.arange(min(setting.test, len(other))))
    return Data("flags", ADULT_TASKS, *_parts(standardise(x, rows[0]), y, rows), [1.0] * 3)
