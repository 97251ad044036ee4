"""The random stream of a weighting: Philox on the device, its seed and step in a tensor there."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from flatmtl import cuda_graphs
from flatmtl.ops import _check
from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling, Weighting

S = TypeVar("S", bound="Seeded")

_TWIN = 0x5851F42D4C957F2D  # set apart from the first stream; any constant would do


class Seeded(Weighting):
    """A weighting with a random stream of its own; the global generators are left alone.

    Args:
        seed: of the stream; one draw a call.
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    def __init__(
        self, *, seed: int = 0, scaling: Scaling = "raw", max_norm: float | None = None
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        self.seed = _options.whole("seed", seed)
        self._rng: Tensor | None = None  # int64 [2]: seed, step; on the Gram matrix's device

    def _first(self, device: torch.device | None = None) -> Tensor:
        """The start of the seed's stream: int64 [2], (seed, step 0)."""
        signed = (self.seed + 2**63) % 2**64 - 2**63
        return torch.tensor([signed, 0], dtype=torch.int64, device=device)

    def _rng_on(self, device: torch.device) -> Tensor:
        if self._rng is None or self._rng.device != device:
            cuda_graphs.refuse(
                f"{type(self).__name__} must have been called before, on this device,"
            )
        if self._rng is None:
            self._rng = self._first(device)
        elif self._rng.device != device:
            self._rng = self._rng.to(device)
        return self._rng

    def reset(self) -> None:
        """Back to the first draw of the seed, and to the state before the first call."""
        super().reset()
        self._rng = None

    def _tensors(self, gram: Tensor) -> list[Tensor]:
        return [*super()._tensors(gram), self._rng_on(gram.device)]

    def twin(self: S) -> S:
        """A copy with another random stream, and a state of its own."""
        other = super().twin()
        other.seed = (self.seed + _TWIN) % 2**64
        return other

    def state_dict(self) -> dict[str, Any]:
        """The random stream and its position, and what else the method keeps."""
        rng = self._first() if self._rng is None else self._rng.detach().clone()
        return {**super().state_dict(), "rng": rng}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        rng = state["rng"]
        if not isinstance(rng, Tensor) or rng.dtype != torch.int64 or rng.shape != (2,):
            raise ValueError(f"state['rng'] must be int64 [2], (seed, step), got {rng!r}")

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        self._rng = state["rng"].detach().clone()


class Ordered(Seeded):
    """A weighting that visits the tasks in an order: a fixed one, or a random one at every call.

    Args:
        order: int64 [T, T], row i lists the tasks in the order in which task i meets them (i itself is
            passed over); None: drawn.
        seed: of the random orders.
        scaling: as for every weighting.
        max_norm: as for every weighting.
    """

    def __init__(
        self,
        *,
        order: Tensor | None = None,
        seed: int = 0,
        scaling: Scaling = "raw",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(seed=seed, scaling=scaling, max_norm=max_norm)
        if order is not None:
            _check.tensor("order", order, (torch.int64,))
            tasks = order.shape[0] if order.dim() == 2 else -1
            row = torch.arange(tasks) if tasks > 0 else None
            if row is None or not torch.equal(order.cpu().sort(1).values, row.expand(tasks, tasks)):
                raise ValueError(f"order must be [T, T], a permutation a row, got {order}")
        self.order = None if order is None else order.clone()

    def _order_for(self, gram: Tensor) -> Tensor:
        """The fixed order for a checked Gram matrix, in its shape."""
        assert self.order is not None
        if self.order.shape[0] != gram.shape[-1]:
            raise ValueError(
                f"gram must have {self.order.shape[0]} tasks, as order, got {gram.shape[-1]}"
            )
        self.order = self.order.to(gram.device)
        return self.order.expand(gram.shape)
