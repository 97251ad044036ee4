"""Reads MNIST and Fashion-MNIST from IDX files, plain or gzipped, errors name the file."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE = 28
CLASSES = 10
_UINT8 = 0x08  # the IDX code for unsigned bytes
_GZIP_MAGIC = b"\x1f\x8b"


class IdxError(ValueError):
    """A data file is missing, damaged, or does not fit the file it belongs to."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with one class each."""

    images: np.ndarray  # uint8 [N, 28, 28]
    labels: np.ndarray  # uint8 [N]


def read_idx(path: Path) -> np.ndarray:
    """The array of one IDX file of unsigned bytes; gzip is recognised by its first two bytes."""
    raw = _read_bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UINT8 or raw[3] == 0:
        raise IdxError(
            f"{path}: not an IDX file of unsigned bytes: "
            f"must start with 00 00 08, starts with {raw[:3].hex(' ') or 'nothing'}"
        )
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise IdxError(f"{path}: truncated: the header alone has {header} bytes, got {len(raw)}")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "too long"
        raise IdxError(
            f"{path}: {state}: the header promises shape {list(shape)}, "
            f"{expected} bytes in all, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def load_split(folder: Path, split: str) -> LabelledImages:
    """Images and labels of one split (``"train"`` or ``"t10k"``) of a folder of IDX files."""
    image_path = _find(folder, f"{split}-images-idx3-ubyte")
    label_path = _find(folder, f"{split}-labels-idx1-ubyte")
    images = read_idx(image_path)
    labels = read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise IdxError(
            f"{image_path}: must hold images of shape [N, {SIDE}, {SIDE}], got {list(images.shape)}"
        )
    if labels.ndim != 1:
        raise IdxError(f"{label_path}: must hold labels of shape [N], got {list(labels.shape)}")
    if len(images) != len(labels):
        raise IdxError(
            f"{label_path}: must hold one label for each image of {image_path.name}: "
            f"{len(images)} images, got {len(labels)} labels"
        )
    if len(labels) and labels.max() >= CLASSES:
        raise IdxError(f"{label_path}: labels must be 0 to {CLASSES - 1}, got {labels.max()}")
    return LabelledImages(images, labels)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise IdxError(f"{folder / name}: no such file, with or without .gz")


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IdxError(f"{path}: cannot be read: {error.strerror}") from error
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError as error:
        raise IdxError(f"{path}: truncated: the gzip stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path}: damaged gzip stream: {error}") from error
