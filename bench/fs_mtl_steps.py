"""The three FS-MTL steps that are compared, each on its own copy of a network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import flatmtl
from bench.fs_mtl_loops import LoopsFsMtl
from bench.fs_mtl_torch import ForeachFsMtl
from bench.networks import Network
from bench.race import OURS

FOREACH, LOOPS = "foreach", "loops"
RHO, LR = 0.05, 1e-4
Orders = tuple[Tensor, Tensor]  # PCGrad's, int64 [T, T], for the losses' and the flat gradients


class Entrant:
    """A copy of a network with SGD and a way to make the step.

    Args:
        name: "flatmtl", "foreach" or "loops".
        network: is copied.
        x: the batch.
        y: [T, batch], the classes.
        rho: the radius; None: plain PCGrad, without sharpness.
        orders: PCGrad's orders; None: drawn.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        x: Tensor,
        y: Tensor,
        *,
        rho: float | None = RHO,
        orders: Orders | None = None,
    ) -> None:
        self.network, self.x, self.y = copy.deepcopy(network), x, y
        self.base = torch.optim.SGD(self.network.parameters(), lr=LR)
        self._name, self._rho, self._orders = name, rho, orders

    @functools.cached_property
    def step(self) -> Callable[..., object]:
        """The step, which takes a closure; made (with what it allocates) at the first use."""
        if self._name == OURS:
            return self._flatmtl(self._rho, self._orders)
        rival = {FOREACH: ForeachFsMtl, LOOPS: LoopsFsMtl}[self._name]
        own = [list(head.parameters()) for head in self.network.heads]
        shared = list(self.network.trunk.parameters())
        orders = (None, None) if self._orders is None else [o.tolist() for o in self._orders]
        made = rival(shared, own, self.base, rho=self._rho, model=self.network, orders=orders)
        return made.step

    def _flatmtl(self, rho: float | None, orders: Orders | None) -> Callable[..., object]:
        order, flat_order = (None, None) if orders is None else orders
        optimizer = flatmtl.MultiTaskOptimizer(
            self.base,
            weighting=flatmtl.weighting.PCGrad(order=order),
            sharpness=None if rho is None else flatmtl.SAM(rho),
            model=self.network,
        )
        if rho is not None and flat_order is not None:
            optimizer.flat_weighting.order = flat_order.clone()
        return optimizer.step

    def losses(self, tasks: Sequence[int] | None = None) -> list[Tensor]:
        """The closure."""
        return self.network.losses(self.x, self.y, tasks)
