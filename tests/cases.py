"""Inputs and error measures for the tests of the ops.

The bound everywhere: an op may be at most twice as wrong as plain torch in the same accumulation
type, plus a floor of a few roundings for inputs on which plain torch happens to be exact.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TASKS = [1, 2, 3, 5, 8, 9, 16, 17, 33, 40, 65, 200]
SIZES = [0, 1, 7, 63, 1023, 4097]
LARGE = [(1, 1_000_003), (3, 1_000_000), (9, 100_003), (40, 50_021), (200, 20_011)]
LARGE_REFERENCE = [(3, 300_001), (40, 20_011)]  # plain torch is slower, and simpler

# The type of rows, and of what lies beside them: gradients, parameters, an update.
MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
PAIRS = [(d, d) for d in DTYPES] + MIXED

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def pair_name(pair: tuple[torch.dtype, torch.dtype]) -> str:
    names = [str(d).removeprefix("torch.") for d in pair]
    return names[0] if names[0] == names[1] else "+".join(names)


pairs = pytest.mark.parametrize("dtype, beside", PAIRS, ids=map(pair_name, PAIRS))
mixed = pytest.mark.parametrize("dtype, beside", MIXED, ids=map(pair_name, MIXED))
task_counts = pytest.mark.parametrize("tasks", TASKS)


def large(body) -> list[tuple[int, int]]:
    return LARGE_REFERENCE if body.name == "reference" else LARGE


def acc(dtype: torch.dtype) -> torch.dtype:
    """The type that products of rows of this type accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def rows(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    scale: np.ndarray | float = 1.0,
) -> torch.Tensor:
    """Normal values, already rounded to the row type: what the op is given is the truth."""
    values = rng.standard_normal(shape) * scale
    return torch.from_numpy(np.asarray(values)).to(dtype).to(device)


LAYOUTS = ["packed", "wide", "misaligned", "odd_stride"]


def layout(jac: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values as a slice of a wider buffer that holds NaN elsewhere."""
    tasks, size = jac.shape
    if kind == "packed":
        return jac
    before, after = {"wide": (0, 64), "misaligned": (1, 7), "odd_stride": (3, 2)}[kind]
    buffer = torch.full(
        (tasks, before + size + after), float("nan"), dtype=jac.dtype, device=jac.device
    )
    view = buffer[:, before : before + size]
    view.copy_(jac)
    return view


def truth(tensor: torch.Tensor, work: float = 0.0) -> np.ndarray:
    """The values as numpy: long double for float64 rows, unless the work would take seconds."""
    values = tensor.detach().cpu().to(torch.float64).numpy()
    return values.astype(oracles.WIDE) if tensor.dtype == torch.float64 and work < 3e7 else values


def numpy64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def distance(out: np.ndarray, ref: np.ndarray) -> float:
    """||out - ref|| / ||ref||, NaN if anything is NaN."""
    difference = float(np.sqrt(((np.asarray(out) - ref) ** 2).sum()))
    size = float(np.sqrt((ref**2).sum()))
    return difference if size == 0 else difference / size


def check_close(
    out: torch.Tensor, ref: np.ndarray, plain: torch.Tensor, floor: float, what: object = ""
) -> None:
    """out at most twice as wrong as plain torch; NaN never passes."""
    assert tuple(out.shape) == ref.shape, f"{what}: shape {tuple(out.shape)}, not {ref.shape}"
    mine, theirs = distance(numpy64(out), ref), distance(numpy64(plain), ref)
    bound = max(2 * theirs, floor) if np.isfinite(theirs) else floor
    assert mine <= bound, f"{what}: error {mine:.3e}, plain torch {theirs:.3e}, floor {floor:.1e}"


def sum_floor(magnitude: np.ndarray, ref: np.ndarray, dtype: torch.dtype) -> float:
    """A few roundings of the terms (magnitude: their sum of absolute values) and of the store."""
    terms = float(np.sqrt((magnitude.astype(np.float64) ** 2).sum()))
    size = float(np.sqrt((ref.astype(np.float64) ** 2).sum()))
    # half a unit in the last place is eps / 2; uniform rounding errors have an rms well below it
    return (2 * eps(acc(dtype)) * terms + 0.5 * eps(dtype) * size) / size if size else 0.0


def contiguous_rows(jac: torch.Tensor) -> torch.Tensor:
    """For plain torch, whose matmul may not care but whose timings and errors then compare."""
    return jac.contiguous().to(acc(jac.dtype))
