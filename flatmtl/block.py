"""A set of parameters as one flat row: where each lies, and the buffers of rows over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatmtl.ops._check import ROW_TYPES

# The operators themselves, not their wrappers: what a block hands them fits by construction, and the
# wrappers' checks of every tensor, at every pass, would cost more than the kernels of a small model.
_ops = torch.ops.flatmtl

ALIGNMENT = 64  # bytes: every parameter's segment, and with it every row, begins on a cache line


def _flat_dims(param: Tensor) -> list[int] | None:
    """The order of dimensions in which ``param`` lies consecutively in memory; None if the usual one."""
    if param.is_contiguous():
        return None
    strides = param.stride()
    dims = sorted(range(param.dim()), key=lambda d: (-strides[d], d))
    return dims if param.permute(dims).is_contiguous() else []


class Block:
    """Parameters of one role, in their own storage, with flat buffers beside them.

    Attributes:
        params: the parameters.
        jac: [rows, P], gradients at the parameters as they are.
        sam: [rows, P], gradients at the perturbed parameters; made on first use.
        update: [P], what the parameters' ``.grad`` view; made on first use.
    """

    def __init__(self, params: Sequence[Tensor], labels: Sequence[str], rows: int) -> None:
        first = params[0]
        if first.dtype not in ROW_TYPES:
            raise TypeError(
                f"params must be float32, float64, bfloat16 or float16, got {first.dtype}: {labels[0]}"
            )
        for param, label in zip(params, labels, strict=True):
            if param.dtype != first.dtype or param.device != first.device:
                raise ValueError(
                    f"params must be of one dtype and device within a role: {labels[0]} is "
                    f"{first.dtype} on {first.device}, {label} is {param.dtype} on {param.device}"
                )
        self.params = list(params)
        self._dims = [_flat_dims(p) for p in params]
        for dims, label in zip(self._dims, labels, strict=True):
            if dims == []:
                raise ValueError(
                    f"params must be dense in memory, got {label} with gaps or overlaps"
                )
        step = ALIGNMENT // first.element_size()
        self.offsets: list[int] = []
        size = 0
        for param in params:
            self.offsets.append(size)
            size += -(-param.numel() // step) * step
        self.size = size
        self.jac = first.new_empty(rows, size, requires_grad=False)
        self._made: dict[str, Tensor] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}

    def _buffer(self, name: str, *shape: int) -> Tensor:
        if name not in self._made:
            self._made[name] = self.jac.new_empty(shape)
        return self._made[name]

    @property
    def sam(self) -> Tensor:
        """[rows, P]."""
        return self._buffer("sam", *self.jac.shape)

    @property
    def update(self) -> Tensor:
        """[P]."""
        return self._buffer("update", self.size)

    @property
    def _saved(self) -> Tensor:
        return self._buffer("saved", self.size)

    def _flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like the parameters, their elements in the order of the row."""
        return [
            t if dims is None else t.permute(dims)
            for t, dims in zip(tensors, self._dims, strict=True)
        ]

    def pack(self, row: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients (None: zero) -> ``row`` [P]; returns the squared norm, float64 0-dim."""
        present = [k for k, g in enumerate(grads) if g is not None]
        flat = []
        for k in present:
            grad, dims = grads[k], self._dims[k]
            assert grad is not None
            flat.append((grad if dims is None else grad.permute(dims)).contiguous())
        sq_norm: Tensor = _ops.pack_row_.default(row, flat, [self.offsets[k] for k in present])
        return sq_norm

    def views(self, row: Tensor) -> list[Tensor]:
        """``row`` [P] as tensors shaped and laid out like the parameters; cached, no copy."""
        key = (row.data_ptr(), row.numel())
        if key not in self._views:
            views = []
            for param, dims, offset in zip(self.params, self._dims, self.offsets, strict=True):
                segment = row[offset : offset + param.numel()]
                if dims is None:
                    views.append(segment.view(param.shape))
                else:
                    inverse = [dims.index(d) for d in range(param.dim())]
                    views.append(segment.view([param.shape[d] for d in dims]).permute(inverse))
            self._views[key] = views
        return self._views[key]

    def save(self) -> None:
        """Keeps the parameters as they are now."""
        _ops.pack_row_.default(self._saved, self._flat(self.params), self.offsets)

    def perturb(
        self, row: Tensor, sq_norm: Tensor, rho: list[float], *, adaptive: bool, eta: float
    ) -> None:
        """Parameters <- saved + perturbation along ``row`` [P], a gradient of squared norm ``sq_norm``."""
        if adaptive:
            sq_norm = _ops.adaptive_sq_norm.default(self._saved, row, eta)
        flat = self._flat(self.params)
        _ops.perturb_.default(flat, self._saved, row, sq_norm, self.offsets, rho, adaptive, eta)
        torch.autograd.graph.increment_version(self.params)

    def restore(self) -> None:
        """Parameters <- saved, bit for bit, in their own storage."""
        _ops.restore_.default(self._flat(self.params), self._saved, self.offsets)
        torch.autograd.graph.increment_version(self.params)
