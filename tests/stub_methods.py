"""Small methods of every kind, written for tests of what the optimizer does with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatmtl.weighting._base import SolveStatus
from flatmtl.weighting._loss import LossWeighting, StatefulLoss, WithLosses
from flatmtl.weighting._rows import RowMethod, RowState


class Inverse(LossWeighting):
    """w = 1 / L."""

    positive = True

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        return 1 / losses


class Count(StatefulLoss):
    """w = how often the task was there, times its number."""

    _entry, _rows = "count", 1

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        held = self._state_for(losses)
        held[0].add_(1.0 if there is None else there.double())
        return held[0] * torch.arange(1.0, len(losses) + 1, dtype=torch.float64)


class Learned(LossWeighting):
    """total = sum e^s L - s."""

    def __init__(self, tasks: int, lr: float | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.s = nn.Parameter(torch.zeros(tasks, dtype=torch.float64))
        self._slopes: list[Tensor] = []

    def parameters(self) -> list[nn.Parameter]:
        return [self.s]

    def _gradients(self) -> list[Tensor]:
        return self._slopes

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        weights = self.s.detach().exp()
        slope = weights * losses - 1
        self._slopes = [slope if there is None else torch.where(there, slope, 0.0)]
        return weights

    def state_dict(self):
        return {"s": self.s.detach().clone()}

    def _take_entries(self, state) -> None:
        with torch.no_grad():
            self.s.copy_(state["s"])


class Back(LossWeighting):
    """w = 1 + (how much each loss has fallen so far)."""

    looks_back = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        self.now = losses
        return torch.ones_like(losses)

    def _after_step(self, losses: Tensor, there: Tensor | None) -> None:
        self.seen.append((self.now, losses))


class Relative(WithLosses):
    """w_i = L_i / n_i; the tasks' own parameters get twice theirs."""

    needs = "norms and losses"
    diagonal_only = True

    def _weigh(self, gram, losses, there):
        n = gram.diag().sqrt()
        weights = torch.where(n > 0, losses / n, 0.0)
        return weights, SolveStatus(torch.zeros((), dtype=torch.int64))

    def _own_weights(self, weights: Tensor) -> Tensor:
        return torch.full_like(weights, 2.0)


class Largest(RowMethod):
    """Element by element, the gradient that is largest in size."""

    def aggregate(self, jac, out, *, losses=None, sound=None, scale=None):
        rows = jac if sound is None else torch.where(sound.unsqueeze(1), jac, 0)
        out.copy_(rows.gather(0, rows.abs().argmax(0, keepdim=True))[0])
        return None


class Momentum(RowState):
    """y <- y / 2 + g; d = sum y."""

    _entry = "y"

    def aggregate(self, jac, out, *, losses=None, sound=None, scale=None):
        held, nxt = self._state_for(jac)
        rows = jac if sound is None else torch.where(sound.unsqueeze(1), jac, 0)
        factor = 1.0 if scale is None else scale.to(jac)
        torch.add(rows / factor, held, alpha=0.5, out=nxt)
        out.copy_((nxt * factor).sum(0))
        return torch.ones(len(jac), dtype=torch.float64)
