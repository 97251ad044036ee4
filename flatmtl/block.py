"""A set of parameters as one flat row: where each lies, and the buffers of rows over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

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


def _forget_derived() -> None:
    """Lets go of what torch has kept of the parameters as they were: casts, and parametrized tensors."""
    torch.clear_autocast_cache()
    if parametrize._cache:  # within parametrize.cached()
        parametrize._cache.clear()


class Block:
    """Parameters of one role, in their own storage, with flat buffers beside them, made on first use.

    Attributes:
        params: the parameters, those that are exempt from the adaptive scaling last.
        jac: [rows, P], gradients at the parameters as they are.
        sam: [rows, P], gradients at the perturbed parameters.
        both: [2 rows, P], ``jac`` and ``sam`` where they are to be one matrix.
        ends: [2, P], ``update`` and ``kept`` where they are.
        mean: [P], SAMO's mean gradient.
        update: [P], what the parameters' ``.grad`` view.
        kept: [P]: the parameters themselves while they are perturbed; between steps the flat part, where
            ``has_flat`` says so.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        label: Callable[[int], str],
        rows: int,
        *,
        row_dtype: torch.dtype | None = None,
        exempt: int = 0,
        both: bool = False,
        ends: bool = False,
        pieces: int = 1,
        local: Callable[[Tensor], Tensor] | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        """Lays the parameters out.

        Args:
            params: at least one.
            label: the name of the k-th, for errors: finding it may take long.
            rows: of ``jac`` and ``sam``.
            row_dtype: of ``jac`` and ``sam``; None: the parameters'.
            exempt: how many of the last parameters the adaptive scaling leaves out.
            both: ``jac`` and ``sam`` are the halves of one matrix, ``both``.
            ends: ``update`` and ``kept`` are the rows of one matrix, ``ends``.
            pieces: a row can be cut into so many of one length, each of whole cache lines.
            local: gives what this process holds of a parameter; None: all of it.
            moved: called when the parameters have been written.
        """
        tensors = [p if local is None else local(p) for p in params]
        first = tensors[0]
        if first.dtype not in ROW_TYPES:
            raise TypeError(
                f"params must be float32, float64, bfloat16 or float16, got {first.dtype}: {label(0)}"
            )
        for k, param in enumerate(params):
            if param.dtype != first.dtype or param.device != first.device:
                raise ValueError(
                    f"params must be of one dtype and device within a role: {label(0)} is "
                    f"{first.dtype} on {first.device}, {label(k)} is {param.dtype} on {param.device}"
                )
        self.params = list(params)
        self._tensors = tensors
        self._moved = moved
        self._dims = [_flat_dims(p) for p in tensors]
        self._strides = [p.stride() for p in tensors]
        for k, dims in enumerate(self._dims):
            if dims == []:
                raise ValueError(
                    f"params must be dense in memory, got {label(k)} with gaps or overlaps"
                )
        self.row_dtype = first.dtype if row_dtype is None else row_dtype
        step = ALIGNMENT // min(first.element_size(), self.row_dtype.itemsize)
        self.offsets: list[int] = []
        size = 0
        for tensor in tensors:
            self.offsets.append(size)
            size += -(-tensor.numel() // step) * step
        self.size = -(-size // (step * pieces)) * step * pieces
        #: of every parameter its id, where it begins in a row and its length
        self.layout = tuple(
            (id(p), start, t.numel())
            for p, t, start in zip(params, tensors, self.offsets, strict=True)
        )
        self._scaled = len(params) - exempt  # the first so many take part in the adaptive scaling
        self._cut = self.offsets[self._scaled] if exempt else self.size
        self._like = first.detach()
        self._rows, self._both, self._ends = rows, both, ends
        self.has_flat = False
        self._made: dict[str, Tensor] = {}
        self._lender: Callable[[str], Tensor] | None = None
        self._views: dict[tuple[int, int], list[Tensor]] = {}

    def lend(self, rows: Callable[[str], Tensor]) -> None:
        """``rows("jac")``, ("sam"), ("both") give the buffers of rows from now on, in place of own ones."""
        self._lender = rows

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        if name not in self._made:
            if self._lender is not None and name in ("jac", "sam", "both"):
                self._made[name] = self._lender(name)
            else:
                self._made[name] = self._like.new_empty(shape, dtype=dtype)
        return self._made[name]

    @property
    def device(self) -> torch.device:
        """Of the parameters and all buffers."""
        return self._like.device

    @property
    def both(self) -> Tensor:
        """[2 rows, P]."""
        return self._buffer("both", 2 * self._rows, self.size, dtype=self.row_dtype)

    @property
    def jac(self) -> Tensor:
        """[rows, P]."""
        if self._both:
            return self.both[: self._rows]
        return self._buffer("jac", self._rows, self.size, dtype=self.row_dtype)

    @property
    def sam(self) -> Tensor:
        """[rows, P]."""
        if self._both:
            return self.both[self._rows :]
        return self._buffer("sam", self._rows, self.size, dtype=self.row_dtype)

    @property
    def ends(self) -> Tensor:
        """[2, P]."""
        return self._buffer("ends", 2, self.size, dtype=self._like.dtype)

    @property
    def mean(self) -> Tensor:
        """[P]."""
        return self._buffer("mean", self.size, dtype=self._like.dtype)

    @property
    def update(self) -> Tensor:
        """[P]."""
        if self._ends:
            return self.ends[0]
        return self._buffer("update", self.size, dtype=self._like.dtype)

    @property
    def kept(self) -> Tensor:
        """[P]."""
        if self._ends:
            return self.ends[1]
        return self._buffer("kept", self.size, dtype=self._like.dtype)

    def _flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like the parameters, their elements in the order of the row."""
        return [
            t if dims is None else t.permute(dims)
            for t, dims in zip(tensors, self._dims, strict=True)
        ]

    def flat(self, grad: Tensor, k: int) -> Tensor:
        """The k-th parameter's stretch of a row, [numel], from a gradient."""
        dims = self._dims[k]
        return (grad if dims is None else grad.permute(dims)).contiguous().view(-1)

    def pack(
        self, row: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool = False
    ) -> Tensor:
        """Gradients (None: zero) -> ``row`` [P], or added to it; its squared norm, float64 0-dim."""
        present = [k for k, g in enumerate(grads) if g is not None]
        flat = []
        for k in present:
            grad = grads[k]
            assert grad is not None
            dims = self._dims[k]
            flat.append((grad if dims is None else grad.permute(dims)).contiguous())
        offsets = [self.offsets[k] for k in present]
        sq_norm: Tensor = _ops.pack_row_.default(row, flat, offsets, accumulate)
        return sq_norm

    def views(self, row: Tensor) -> list[Tensor]:
        """``row`` [P] as tensors shaped and laid out like the parameters; cached, no copy."""
        key = (row.data_ptr(), row.numel())
        if key not in self._views:
            views = []
            for param, dims, offset in zip(self._tensors, self._dims, self.offsets, strict=True):
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
        self.has_flat = False
        _ops.pack_row_.default(self.kept, self._flat(self._tensors), self.offsets)

    def adaptive_sq_norm(self, row: Tensor, eta: float, part: slice | None = None) -> Tensor:
        """Squared norm of T * ``row`` [P], T = |saved| + eta, or 1 where exempt; float64 0-dim.

        ``part``: of these columns alone.
        """
        start, stop, _ = (part or slice(None)).indices(self.size)
        cut = min(max(self._cut, start), stop)
        total: Tensor = _ops.adaptive_sq_norm.default(self.kept[start:cut], row[start:cut], eta)
        if cut < stop:
            total = total + _ops.row_norms.default(row[cut:stop].unsqueeze(0))[0].square()
        return total

    def perturb(
        self, row: Tensor, sq_norm: Tensor, rho: list[float], *, adaptive: bool, eta: float
    ) -> None:
        """Parameters <- saved + perturbation along ``row`` [P]; ``sq_norm`` is that of T * ``row``."""
        flat, scaled, cut = self._flat(self._tensors), self._scaled, self._cut
        if not adaptive or cut == self.size:
            _ops.perturb_.default(flat, self.kept, row, sq_norm, self.offsets, rho, adaptive, eta)
        else:
            for params, segment, offsets, radii, bent in (
                (flat[:scaled], slice(None, cut), self.offsets[:scaled], rho[:scaled], True),
                (flat[scaled:], slice(cut, None), self.offsets[scaled:], rho[scaled:], False),
            ):
                start = segment.start or 0
                _ops.perturb_.default(
                    params, self.kept[segment], row[segment], sq_norm,
                    [o - start for o in offsets], radii, bent, eta,
                )  # fmt: skip
        self._changed()

    def move(self, direction: Tensor, step: float) -> None:
        """Parameters <- saved + ``step`` * ``direction`` [P]."""
        with torch.no_grad():
            for param, origin, by in zip(
                self._tensors, self.views(self.kept), self.views(direction), strict=True
            ):
                torch.add(origin, by, alpha=step, out=param.detach())
        self._changed()

    def restore(self) -> None:
        """Parameters <- saved, bit for bit, in their own storage."""
        _ops.restore_.default(self._flat(self._tensors), self.kept, self.offsets)
        self._changed()

    def _changed(self) -> None:
        """Tells autograd of the write, and those who keep what they made of the old values."""
        torch.autograd.graph.increment_version(self._tensors)
        _forget_derived()
        if self._moved is not None:
            self._moved()

    # For looks ahead, all of which end where they began: autograd is not told, so that graphs from
    # before keep their use. ``.data`` has a version of its own.

    def empty(self) -> Tensor:
        """A new flat buffer [P] for the parameters; nothing is in it yet."""
        return self._like.new_empty(self.size)

    def copy_to(self, saved: Tensor) -> None:
        """``saved`` [P] <- the parameters."""
        _ops.pack_row_.default(saved, self._unseen(), self.offsets)

    def shift(self, saved: Tensor, row: Tensor, sq_norm: Tensor, step: float) -> None:
        """Parameters <- saved + ``step`` * ``row`` / sqrt(``sq_norm``); saved where it is 0 or not finite."""
        steps = [step] * len(self.params)
        _ops.perturb_.default(self._unseen(), saved, row, sq_norm, self.offsets, steps, False, 0.0)
        _forget_derived()

    def put_back(self, saved: Tensor) -> None:
        """Parameters <- ``saved`` [P], bit for bit."""
        _ops.restore_.default(self._unseen(), saved, self.offsets)
        _forget_derived()

    def _unseen(self) -> list[Tensor]:
        return self._flat([p.data for p in self._tensors])

    def stale(self) -> bool:
        """Whether the parameters lie otherwise than they did (``model.double()``, ``channels_last``)."""
        like = self._like
        return any(
            p.dtype != like.dtype or p.device != like.device or p.stride() != stride
            for p, stride in zip(self._tensors, self._strides, strict=True)
        )
