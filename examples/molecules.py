"""Tables of molecules for the affinity examples: reading, features, splits; numpy alone.

A table is a CSV file, gzipped or not: a column `smiles`, then a number a task, empty where it is missing.
"""

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np

FEATURES = 1024


def read_table(path):
    """The molecules and what is known of them.

    A column whose name and values came before is left out: QM8's file has its PBE0 columns twice.

    Args:
        path: `.csv` or `.csv.gz`.

    Returns:
        smiles: list of N strings.
        names: list of T task names.
        values: float64 [N, T], NaN where missing.

    Raises:
        ValueError: no `smiles` column first, or a name with two different columns.
    """
    opened = gzip.open if Path(path).suffix == ".gz" else open
    with opened(path, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    if header[0] != "smiles":
        raise ValueError(f"the first column must be 'smiles', got {header[0]!r}")
    table = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows])
    names, columns = [], []
    for column, name in enumerate(header[1:]):
        if name not in names:
            names.append(name)
            columns.append(column)
        elif not np.array_equal(
            table[:, column], table[:, columns[names.index(name)]], equal_nan=True
        ):
            raise ValueError(f"columns of one name must be equal, got two different {name!r}")
    return [row[0] for row in rows], names, table[:, columns]


def ngram_features(smiles, longest=4):
    """Hashed counts of the character n-grams, n = 1..longest, as log(1 + count).

    The hash is CRC-32, the same in every process (Python's own is not).

    Args:
        smiles: N strings.
        longest: the longest n-gram.

    Returns:
        float32 [N, 1024].
    """
    places = {}
    counts = np.zeros((len(smiles), FEATURES), np.float32)
    for row, text in zip(counts, smiles, strict=True):
        for n in range(1, longest + 1):
            for start in range(len(text) - n + 1):
                gram = text[start : start + n]
                if gram not in places:
                    places[gram] = zlib.crc32(gram.encode()) % FEATURES
                row[places[gram]] += 1
    return np.log1p(counts)


def split(smiles, sizes, seed):
    """A random split in which all rows of one molecule stand on the same side.

    Args:
        smiles: N strings.
        sizes: rows of the first, the second, ... part; the last part takes the rest.
        seed: of the draw.

    Returns:
        One int64 array of row numbers a part. A part is short of its size by at most one molecule's
        rows less one.
    """
    rows = {}
    for row, text in enumerate(smiles):
        rows.setdefault(text, []).append(row)
    molecules = list(rows.values())
    parts = [[] for _ in range(len(sizes) + 1)]
    part = 0
    for at in np.random.default_rng(seed).permutation(len(molecules)):
        while part < len(sizes) and len(parts[part]) + len(molecules[at]) > sizes[part]:
            part += 1
        parts[part] += molecules[at]
    return [np.array(part) for part in parts]


def standardise(values, training):
    """Each column with mean 0 and deviation 1 over the training rows; a constant column becomes 0.

    Args:
        values: [N, C].
        training: row numbers.
    """
    mean, deviation = values[training].mean(0), values[training].std(0)
    return (values - mean) / np.where(deviation > 0, deviation, 1)
