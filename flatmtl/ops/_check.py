"""Argument checks shared by the operators' wrappers: each names the argument, what it must be, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
SMALL_TYPES = (torch.float32, torch.float64)


def tensor(name: str, value: object, types: tuple[torch.dtype, ...] = ROW_TYPES) -> Tensor:
    """``value`` as a tensor of one of ``types``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in types:
        names = ", ".join(str(t).removeprefix("torch.") for t in types)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {value.dtype}")
    return value


def like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """``value`` on the device (and of the dtype) of ``other``."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name} ({other.dtype}), got {value.dtype}"
        )


def beside(name: str, value: Tensor, row_name: str, row: Tensor) -> None:
    """``value`` on the device of ``row``, and of its dtype, or float32 beside half precision."""
    like(name, value, row_name, row, dtype=False)
    if value.dtype != row.dtype and not (value.dtype == torch.float32 and row.dtype in HALF_TYPES):
        raise TypeError(
            f"{name} must have the dtype of {row_name} ({row.dtype}), or float32 where that is "
            f"bfloat16 or float16, got {value.dtype}"
        )


def shape(name: str, value: Tensor, *sizes: int) -> None:
    """``value`` of exactly this shape."""
    if value.shape != sizes:
        raise ValueError(f"{name} must have shape {list(sizes)}, got {list(value.shape)}")


def rows(name: str, value: object) -> Tensor:
    """``value`` as a matrix of rows: [T, P], T >= 1, elements of a row side by side."""
    jac = tensor(name, value)
    if jac.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [T, P], got shape {list(jac.shape)}")
    if jac.shape[0] < 1:
        raise ValueError(f"{name} must have at least one row, got shape {list(jac.shape)}")
    if jac.shape[1] > 1 and jac.stride(1) != 1:
        raise ValueError(f"{name} must have stride 1 along its rows, got {list(jac.stride())}")
    if jac.shape[0] > 1 and jac.stride(0) < jac.shape[1]:
        raise ValueError(
            f"{name} must have rows that do not overlap, got strides {list(jac.stride())}"
        )
    return jac


def flat(name: str, value: object) -> Tensor:
    """``value`` as one flat row: [P], contiguous."""
    row = tensor(name, value)
    if row.dim() != 1 or not row.is_contiguous():
        raise ValueError(
            f"{name} must be 1-D and contiguous, got shape {list(row.shape)}, stride {list(row.stride())}"
        )
    return row


def weights(name: str, value: object, jac: Tensor) -> Tensor:
    """``value`` as one float64 weight a row of ``jac``, on its device."""
    result = tensor(name, value, SMALL_TYPES)
    like(name, result, "jac", jac, dtype=False)
    shape(name, result, jac.shape[0])
    return double(result)


def double(value: Tensor) -> Tensor:
    """``value`` as contiguous float64; itself if it is."""
    if value.dtype == torch.float64 and value.is_contiguous():
        return value
    return value.to(torch.float64).contiguous()


def gram(name: str, value: object) -> Tensor:
    """``value`` as one Gram matrix or a batch: [T, T] or [B, T, T]."""
    result = tensor(name, value, SMALL_TYPES)
    if result.dim() not in (2, 3) or result.shape[-1] != result.shape[-2] or result.shape[-1] < 1:
        raise ValueError(f"{name} must have shape [T, T] or [B, T, T], got {list(result.shape)}")
    # weights are not differentiable: the graph behind a Gram matrix ends here
    return result.detach() if result.requires_grad else result


def segments(
    name: str,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    row: Tensor,
    other_name: str = "",
    other: Tensor | None = None,
) -> None:
    """``tensors`` laid at ascending ``offsets`` inside ``row`` [P], without overlap.

    All of one dtype: that of ``other``; without it, that of the first, which fits beside ``row``.
    """
    if len(tensors) != len(offsets):
        raise ValueError(
            f"offsets must have one entry for each of {name} ({len(tensors)}), got {len(offsets)}"
        )
    end = 0
    for k, (item, offset) in enumerate(zip(tensors, offsets, strict=True)):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{k}] must be a Tensor, got {type(item).__name__}")
        if other is None:
            beside(f"{name}[{k}]", item, "row", row)
            other_name, other = f"{name}[{k}]", item
        like(f"{name}[{k}]", item, other_name, other)
        if offset < end:
            raise ValueError(
                f"offsets[{k}] must be at least {end}, where the segment before ends, got {offset}"
            )
        end = offset + item.numel()
    if end > row.numel():
        raise ValueError(
            f"{name} must end within the row ({row.numel()} elements), got an end at {end}"
        )


def _extent(rows: Tensor) -> int:
    """Bytes from the first element of a row [P] or matrix [T, P] to the end of the last."""
    last = rows.shape[-1] - 1
    if rows.dim() == 2:
        last += (rows.shape[0] - 1) * rows.stride(0)
    return (last + 1) * rows.element_size()


def no_overlap(name: str, out: Tensor, other_name: str, other: Tensor) -> None:
    """``out`` shares no memory with ``other`` (by address range: rows are dense)."""
    if torch.compiler.is_compiling() or out.numel() == 0 or other.numel() == 0:
        return  # a tracer has no addresses

    first, other_first = out.data_ptr(), other.data_ptr()
    if first < other_first + _extent(other) and other_first < first + _extent(out):
        raise ValueError(f"{name} must not share memory with {other_name}")


def preference(name: str, value: object, gram: Tensor, gram_name: str = "gram") -> Tensor | None:
    """``value`` as one float64 number a task of ``gram``, on its device; None stays None."""
    if value is None:
        return None
    result = tensor(name, value, SMALL_TYPES)
    like(name, result, gram_name, gram, dtype=False)
    shape(name, result, gram.shape[-1])
    return double(result)


def state(
    name: str, value: object, gram: Tensor, sizes: Sequence[int], gram_name: str = "gram"
) -> None:
    """``value`` as a float64 tensor of this shape on the device of ``gram``, written in place."""
    result = tensor(name, value, (torch.float64,))
    like(name, result, gram_name, gram, dtype=False)
    shape(name, result, *sizes)
    if not result.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {list(result.stride())}")
