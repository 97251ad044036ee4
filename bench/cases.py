"""Inputs of the benchmarks: task gradients with controlled conflict, cold where they are large."""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor

TASKS = (2, 4, 8, 16, 40)
COLUMNS = (100_000, 1_000_000, 10_000_000)
QUICK_TASKS = (2, 8)
QUICK_COLUMNS = (100_000, 1_000_000)

COLD_BYTES = 256 << 20  # inputs cycle through at least this much where P is large
LARGE = 1_000_000  # from this P on
BLOCK = 100_000  # columns of fresh random numbers; wider rows repeat them
LAYERS = 20  # of the network whose parameters a row stands for


def gram_with_conflict(tasks: int, generator: torch.Generator) -> Tensor:
    """A Gram matrix, float64 [T, T]: a third to 60 % of the pairs conflict, norms in [1/3, 3].

    For T = 2 the one pair conflicts.
    """
    pairs = tasks * (tasks - 1) // 2
    low, high = (1, 1) if tasks == 2 else (pairs / 3, 0.6 * pairs)
    while True:
        factors = torch.randn(tasks, 2 * tasks, generator=generator, dtype=torch.float64)
        factors /= factors.norm(dim=1, keepdim=True)
        cosines = factors @ factors.T
        conflicts = int((cosines.triu(1) < 0).sum())
        if low <= conflicts <= high:
            norms = 3 ** (2 * torch.rand(tasks, generator=generator, dtype=torch.float64) - 1)
            return norms[:, None] * cosines * norms


def segments(columns: int) -> list[tuple[int, int]]:
    """(offset, elements) of the tensors that fill a row: weights that grow layer by layer, biases."""
    bias = 64
    shares = [1.2**k for k in range(LAYERS)]
    left = columns - LAYERS * bias
    sizes = []
    for share in shares[:-1]:
        sizes += [int(left * share / sum(shares)) // 16 * 16, bias]
    sizes += [columns - sum(sizes) - bias, bias]
    return list(zip([0, *itertools.accumulate(sizes[:-1])], sizes, strict=True))


class Inputs:
    """Everything that the ops take at one T, P and dtype; each call of a method gives the next set.

    Attributes:
        tasks: T.
        columns: P.
        dtype: of the rows.
        device: where all of it lies.
    """

    def __init__(
        self, tasks: int, columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.tasks, self.columns, self.dtype, self.device = tasks, columns, dtype, device
        self._generator = torch.Generator().manual_seed(tasks)
        self.jac_bytes = tasks * columns * dtype.itemsize
        copies = 3
        if columns >= LARGE:
            copies = max(1, -(-COLD_BYTES // self.jac_bytes)) if device == "cpu" else 1
        self._jacs = [self._matrix() for _ in range(copies)]
        self._next = itertools.cycle(range(copies))
        self._next_row = itertools.cycle(range(copies * tasks))
        self.weights = (
            torch.rand(tasks, generator=self._generator, dtype=torch.float64).to(device) + 0.5
        )
        self.flat_weights = self.weights.flip(0).contiguous()
        self.coefficients = torch.randn(tasks, tasks, generator=self._generator).double().to(device)

    def _matrix(self) -> Tensor:
        """J [T, P] with a Gram matrix like ``gram_with_conflict``'s."""
        wide = min(self.columns, BLOCK)
        half = torch.linalg.cholesky(gram_with_conflict(self.tasks, self._generator))
        noise = torch.randn(self.tasks, wide, generator=self._generator)
        block = (half.float() @ noise / self.columns**0.5).to(self.device, self.dtype)
        jac = torch.empty(self.tasks, self.columns, dtype=self.dtype, device=self.device)
        for begin in range(0, self.columns, wide):
            part = jac[:, begin : begin + wide]
            part.copy_(block[:, : part.shape[1]])
        return jac

    @cached_property
    def _sams(self) -> list[Tensor]:
        # the perturbed gradients: near the plain ones, as they are for a small radius
        return [jac.flip(0).mul_(0.05).add_(jac) for jac in self._jacs]

    def jac(self) -> Tensor:
        """J [T, P]."""
        return self._jacs[next(self._next)]

    def pair(self) -> tuple[Tensor, Tensor]:
        """J and S, [T, P] each."""
        k = next(self._next)
        return self._jacs[k], self._sams[k]

    @cached_property
    def out(self) -> Tensor:
        """[P], to write into."""
        return torch.zeros(self.columns, dtype=self.dtype, device=self.device)

    @cached_property
    def wide_out(self) -> Tensor:
        """[T, P], to write into."""
        return torch.zeros(self.tasks, self.columns, dtype=self.dtype, device=self.device)

    @cached_property
    def copy_target(self) -> Tensor:
        """At most 400 MB, flat: where the copy yardstick writes."""
        size = min(self.tasks * self.columns, 400_000_000 // self.dtype.itemsize)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    # ------------------------------------------------------------ single rows and their segments

    @cached_property
    def offsets(self) -> list[int]:
        """Where each tensor of a row begins."""
        return [offset for offset, _ in segments(self.columns)]

    @cached_property
    def _row_sets(self) -> list[tuple[Tensor, Tensor, Tensor, list[list[Tensor]]]]:
        def views(row: Tensor) -> list[Tensor]:
            return [row[offset : offset + size] for offset, size in segments(self.columns)]

        sets = []
        for jac, sam in zip(self._jacs, self._sams, strict=True):
            for task in range(self.tasks):
                rows = jac[task], sam[task], self.wide_out[task]
                sets.append((*rows, [views(row) for row in rows]))
        return sets

    def rows(self) -> tuple[Tensor, Tensor, Tensor, list[list[Tensor]]]:
        """Rows a, b (data) and c (to write into), [P] each, and the three as lists of tensors."""
        return self._row_sets[next(self._next_row)]

    def task_gradients(self) -> list[list[Tensor]]:
        """The gradients of each task as lists of tensors, T lists: rows of J cut in pieces."""
        first = next(self._next) * self.tasks
        return [lists[0] for _, _, _, lists in self._row_sets[first : first + self.tasks]]
