"""What the row methods do with T x P matrices beyond the operators: block by block, in few passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.ops import _check
from flatmtl.ops._status import INACTIVE_TASK, NO_ACTIVE_TASK
from flatmtl.weighting._base import SolveStatus
from flatmtl.weighting._loss import _sound
from flatmtl.weighting._rows import RowState

BLOCK = 1 << 21  # elements of a block of columns: bounds what is held beside the rows


def columns(rows: Tensor) -> Iterator[slice]:
    """Blocks of the columns of ``rows`` [T, P], by its shape alone."""
    tasks, size = rows.shape
    width = max(1024, BLOCK // tasks)
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def accumulate_in(rows: Tensor) -> torch.dtype:
    """The type that sums over rows are formed in."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def checked(
    jac: Tensor, out: Tensor, sound: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The mask as it is, and the scale; what ``RowMethod.aggregate`` was given, checked.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    _check.beside("out", _check.flat("out", out), "jac", _check.rows("jac", jac))
    _check.shape("out", out, jac.shape[1])
    _check.no_overlap("out", out, "jac", jac)
    if sound is None:
        sound = torch.ones(jac.shape[0], dtype=torch.bool, device=jac.device)
    else:
        _check.like("sound", _check.tensor("sound", sound, (torch.bool,)), "jac", jac, dtype=False)
        _check.shape("sound", sound, jac.shape[0])
    if scale is not None:
        _check.tensor("scale", scale, _check.SMALL_TYPES)
        _check.shape("scale", scale)
        scale = scale.to(jac.device, torch.float64)
    return sound, scale


def losses_for(
    jac: Tensor, losses: Tensor | None, sound: Tensor | None, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [T] above 0 (1 where a task does not count), the tasks that count, status bits.

    Raises:
        ValueError, TypeError: there are none, they have another shape, or (on the CPU) one that counts
            is not finite and above 0.
    """
    if losses is None:
        raise ValueError(f"losses must be given for {method}, got None")
    _check.like("losses", _check.tensor("losses", losses), "jac", jac, dtype=False)
    _check.shape("losses", losses, jac.shape[0])
    given, counted, bits = _sound(losses, sound, method, positive=True)
    if counted is None:
        counted = torch.ones_like(given, dtype=torch.bool)
    return given, counted, bits


def status(sound: Tensor, bits: Tensor | None = None) -> SolveStatus:
    """That of an aggregation: which tasks counted, and other ``bits``."""
    inactive = ~sound
    found = inactive.any() * INACTIVE_TASK + inactive.all() * (NO_ACTIVE_TASK - INACTIVE_TASK)
    return SolveStatus(found if bits is None else found | bits)


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out`` [P], of any type, <- sum_i weights_i rows_i."""
    wide = torch.float32 if rows.dtype in _check.HALF_TYPES else rows.dtype
    if out.dtype in (rows.dtype, wide):
        ops.combine(rows, weights, out)
    else:
        out.copy_(ops.combine(rows, weights, rows.new_empty(out.shape, dtype=wide)))


class RowAverages(RowState):
    """A method of running averages of the rows [T, P] and of a few numbers.

    Neither is written before ``_made``: a call that is repeated gives the same.
    """

    _few: str

    def __init__(self, *, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(state_dtype=state_dtype)
        self._numbers: Tensor | None = None  # float64, on the rows' device
        self._next_numbers: Tensor | None = None

    def _first_numbers(self, tasks: int) -> Tensor:
        """float64, the numbers before the first step."""
        raise NotImplementedError

    def _numbers_for(self, jac: Tensor) -> Tensor:
        if self._numbers is None:
            self._numbers = self._first_numbers(jac.shape[0]).to(jac.device)
        elif self._numbers.device != jac.device:
            self._numbers = self._numbers.to(jac.device)
        return self._numbers

    def _average(self, jac: Tensor, sound: Tensor, keep: Tensor, add: Tensor) -> Tensor:
        """keep_i * what is kept + add_i * jac_i, in what takes its place; what is kept, if not sound.

        keep: float64 0-dim, add: float64 [T].
        """
        held, new = self._state_for(jac)
        wide = torch.promote_types(accumulate_in(jac), accumulate_in(held))
        old = torch.where(sound, keep, 1.0).to(wide).unsqueeze(1)
        factor = torch.where(sound, add, 0.0).to(wide).unsqueeze(1)
        for block in columns(jac):
            # NaN in a row that does not count must not be multiplied
            rows = jac[:, block].to(wide).masked_fill(~sound.unsqueeze(1), 0.0)
            new[:, block] = rows.mul_(factor).addcmul_(held[:, block].to(wide), old)
        return new

    def _made(self, ok: Tensor | None) -> None:
        pending = self._pending
        super()._made(ok)
        if pending:
            assert self._numbers is not None
            assert self._next_numbers is not None
            new = self._next_numbers
            if ok is not None:
                new = torch.where(ok.to(new.device), new, self._numbers)
            self._numbers.copy_(new)

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        return [*super()._tensors(gram), self._numbers_for(gram)]

    def reset(self) -> None:
        """Back to the state before the first step."""
        super().reset()
        self._numbers = self._next_numbers = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_next_numbers": None}

    def state_dict(self) -> dict[str, Any]:
        """What is kept of the rows [T, P] and the numbers, float64; None before the first step."""
        numbers = self._numbers
        return {**super().state_dict(), self._few: None if numbers is None else numbers.clone()}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        numbers, held = state[self._few], state[self._entry]
        if numbers is None and held is None:
            return
        if not (isinstance(numbers, Tensor) and numbers.dtype == torch.float64) or (
            held is not None and numbers.shape != self._first_numbers(held.shape[0]).shape
        ):
            raise ValueError(
                f"state[{self._few!r}] must be float64 and fit state[{self._entry!r}], got {numbers!r}"
            )

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        numbers = state[self._few]
        self._numbers = None if numbers is None else numbers.detach().clone().contiguous()
        self._next_numbers = None
