"""The methods of csrc/solvers/ as the C libraries of the tests know them (solver_methods.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One method with its options.

    Attributes:
        state: shape of the state of one problem, from T; () for none.
        start: what the state starts from.
        sums: True if a member of the team adds what others have computed: then the order of
            additions differs from one thread's.
    """

    name: str
    number: int
    options: tuple[float, ...]
    state: Callable[[int], tuple[int, ...]] | None = None
    start: float | str = 0.0
    preference: bool = False
    sums: bool = True


RIDGE = 1e-10
CASES = [
    Case("mean", 0, (0.25,), sums=False),
    Case("constant", 0, (0.0,), preference=True, sums=False),
    Case("pcgrad", 1, (), lambda t: (t, t), sums=False),
    Case("gradvac", 2, (0.5, 1e-8), lambda t: (t, t), sums=False),
    Case("mgda", 3, (RIDGE,)),
    Case("upgrad", 4, (1, RIDGE)),
    Case("upgrad, preference", 4, (1, RIDGE), preference=True),
    Case("dualproj", 4, (0, RIDGE)),
    Case("cagrad", 5, (0.4, 0, RIDGE)),
    Case("cagrad, rescaled", 5, (0.9, 1, RIDGE)),
    Case("fairgrad 0.5", 6, (0.5, RIDGE)),
    Case("fairgrad 2", 6, (2.0, RIDGE)),
    Case("pivrg", 6, (2.0, RIDGE), preference=True),
    Case("nash", 7, (2, 1.0, RIDGE), lambda t: (t + 1,)),
    Case("imtl_g", 8, (RIDGE,)),
    Case("config", 9, (RIDGE,)),
    Case("config, preference", 9, (RIDGE,), preference=True),
    Case("aligned min", 10, (0, 2.0**-23)),
    Case("aligned median", 10, (1, 2.0**-23)),
    Case("aligned mean", 10, (2, 2.0**-23), preference=True),
    Case("pcd", 11, (0.02, 0.999, 1e-8, RIDGE), lambda t: (t + 1,)),
    Case("krum", 12, (1, 2), sums=False),
    Case("sdmgrad", 13, (10.0, 0.5, 20, 0.3), lambda t: (t,), start="uniform"),
    Case("modo", 14, (0.1, 0.1), lambda t: (t,), start="uniform"),
    Case("random", 16, (), lambda t: (t,), start="random"),
    Case("scale", 15, (2, 0.7), lambda t: (t,), start="random"),
]
NAMES = [case.name for case in CASES]


class Run:
    """The arrays of one call of `run_method`-like functions on gram [B, T, T]."""

    def __init__(self, case: Case, gram: np.ndarray, order: np.ndarray, seed: int) -> None:
        batch, tasks, _ = gram.shape
        rng = np.random.default_rng(seed)
        self.case, self.batch, self.tasks = case, batch, tasks
        self.gram = np.ascontiguousarray(gram)
        self.order = np.ascontiguousarray(order, dtype=np.int64)
        self.options = np.array([*case.options, 0.0])
        self.preference = rng.uniform(0.1, 2, tasks) if case.preference else None
        shape = case.state(tasks) if case.state else ()
        self.state = np.zeros((batch, *shape))
        if case.start == "uniform":
            self.state[:] = 1 / tasks
        elif case.start == "random":
            self.state[:] = rng.standard_normal(self.state.shape)
        self.weights = np.full((batch, tasks), np.nan)
        self.status = np.full(batch, -1, np.int64)
        self.residual = np.full(batch, np.nan)

    def arguments(self) -> list[object]:
        """(method, gram, batch, tasks, options, order, preference, state, weights, status, residual)"""

        def pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
            return None if array is None else ctypes.c_void_p(array.ctypes.data)

        return [
            ctypes.c_int(self.case.number), pointer(self.gram), ctypes.c_int64(self.batch),
            ctypes.c_int64(self.tasks), pointer(self.options), pointer(self.order),
            pointer(self.preference), pointer(self.state), pointer(self.weights),
            pointer(self.status), pointer(self.residual),
        ]  # fmt: skip

    def results(self) -> dict[str, np.ndarray]:
        return {
            "weights": self.weights,
            "status": self.status,
            "residual": self.residual,
            "state": self.state,
        }
