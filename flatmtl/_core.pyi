"""What is no tensor operator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def build_info() -> dict[str, str]: ...
def select_exact(
    tasks: int,
    *,
    matrix: npt.NDArray[np.float64] | None = None,
    tier_of_size: npt.NDArray[np.int32] | None = None,
    tier_of_group: npt.NDArray[np.int16] | None = None,
    groups: npt.NDArray[np.uint32] | None = None,
    tiers: npt.NDArray[np.int32] | None = None,
    scores: npt.NDArray[np.float64] | None = None,
    units: Sequence[int],
    budget: int,
    max_groups: int,
    disjoint: bool,
    near_ties: int,
    tolerance: float,
    progress: Callable[[float], Any] | None = None,
) -> tuple[list[float], list[tuple[int, int]], list[list[tuple[int, int]]]]: ...
def select_by_search(
    matrix: npt.NDArray[np.float64],
    *,
    units: Sequence[Sequence[int]],
    conflicts: npt.NDArray[np.bool_],
    max_groups: int,
    disjoint: bool,
    allow_single: bool,
    seed: int,
    starts: int,
    progress: Callable[[float], Any] | None = None,
) -> tuple[list[float], list[list[int]]]: ...
def order_exact(
    similarity: npt.NDArray[np.float64],
    *,
    start: int,
    progress: Callable[[float], Any] | None = None,
) -> list[int]: ...
def order_by_nearest(similarity: npt.NDArray[np.float64], *, start: int) -> list[int]: ...
def order_by_annealing(
    similarity: npt.NDArray[np.float64],
    path: Sequence[int],
    *,
    start: int,
    seed: int,
    progress: Callable[[float], Any] | None = None,
) -> list[int]: ...
