"""Arrays and tensors as float64 on the host, checked."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Floats: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.ArrayLike | torch.Tensor

TOLERANCE = 1e-5  # of the largest entry: what rounding in float32 makes of a symmetric matrix


def floats(name: str, given: Numbers) -> Floats:
    """A float64 copy on the host, of any shape; TypeError where it holds no real numbers."""
    if isinstance(given, torch.Tensor):
        if given.is_complex():
            raise TypeError(f"{name} must be real, got {given.dtype}")
        return given.detach().to("cpu", torch.float64, copy=True).numpy()
    try:
        values = np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array: {error}") from None
    if values.dtype.kind not in "iufb":
        raise TypeError(f"{name} must be an array of numbers, got {values.dtype}")
    return values.astype(np.float64)


def square(name: str, given: Numbers) -> Floats:
    """[T, T] float64, T at least 1; whether it is finite is not looked at."""
    matrix = floats(name, given)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"{name} must be a square matrix [T, T] with T at least 1, got shape {list(matrix.shape)}"
        )
    return matrix


def symmetric(name: str, matrix: Floats, remedy: str) -> Floats:
    """The mean of a finite matrix and its transpose, which may differ by rounding."""
    scale = float(np.abs(matrix).max())
    half = matrix / 2
    if scale > 0:
        apart = np.abs(half - half.T)
        if float(apart.max()) > TOLERANCE / 2 * scale:
            a, b = np.unravel_index(int(apart.argmax()), apart.shape)
            raise ValueError(
                f"{name} must be symmetric, got {matrix[a, b]:.6g} at [{a}, {b}] and "
                f"{matrix[b, a]:.6g} at [{b}, {a}]{remedy}"
            )
    return half + half.T
