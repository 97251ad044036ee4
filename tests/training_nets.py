"""Small networks of the usual kinds, with task losses and batches, for tests of whole training runs.

Smooth throughout (tanh, GELU, SiLU): at a kink a rounding error decides which slope counts, and two
correct float32 runs differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


class MLP(nn.Module):
    """Three tasks: two regressions and a classification on one trunk."""

    tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(12, 1), nn.Linear(12, 2), nn.Linear(12, 4)])

    def losses(self, batch: Batch) -> list[Tensor]:
        x, y, z, c = batch
        h = self.trunk(x)
        return [
            F.mse_loss(self.heads[0](h), y),
            F.mse_loss(self.heads[1](h), z),
            F.cross_entropy(self.heads[2](h), c),
        ]

    @staticmethod
    def batch(g: torch.Generator) -> Batch:
        x = torch.randn(16, 6, generator=g, dtype=torch.float64)
        c = torch.randint(4, (16,), generator=g)
        return x, x.sum(1, keepdim=True).sin(), -x[:, :2] * x[:, 2:4], c


class CNN(nn.Module):
    """Two tasks on a convolutional trunk with BatchNorm."""

    tasks = 2

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.2), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)])

    def losses(self, batch: Batch) -> list[Tensor]:
        x, c, y = batch
        h = self.trunk(x).mean(dim=(2, 3))
        return [F.cross_entropy(self.heads[0](h), c), F.mse_loss(self.heads[1](h), y)]

    @staticmethod
    def batch(g: torch.Generator) -> Batch:
        x = torch.randn(12, 2, 8, 8, generator=g, dtype=torch.float64)
        c = torch.randint(3, (12,), generator=g)
        x = x + 0.5 * c.view(-1, 1, 1, 1)
        return x, c, -c.view(-1, 1) + 0.1 * x.square().mean(dim=(1, 2, 3)).view(-1, 1)


class GRU(nn.Module):
    """Two tasks on a recurrent trunk: the next value, and the kind of the sequence."""

    tasks = 2

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 10, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(10, 3), nn.Linear(10, 3)])

    def losses(self, batch: Batch) -> list[Tensor]:
        x, c = batch
        h, last = self.rnn(x)
        return [
            F.mse_loss(self.heads[0](h[:, :-1]), x[:, 1:]),
            F.cross_entropy(self.heads[1](last[0]), c),
        ]

    @staticmethod
    def batch(g: torch.Generator) -> Batch:
        c = torch.randint(3, (8,), generator=g)
        t = torch.arange(7, dtype=torch.float64)
        phase = torch.rand(8, 1, 3, generator=g, dtype=torch.float64)
        return (t.view(1, -1, 1) * (1 + c.view(-1, 1, 1)) / 2 + 6 * phase).sin(), c


class Transformer(nn.Module):
    """Three tasks on an encoder block: the next token by the embedding's own weights (tied), the
    sequence's kind, a regression."""

    tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", batch_first=True
        )
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)])

    def losses(self, batch: Batch) -> list[Tensor]:
        tokens, c, y = batch
        h = self.block(self.embed(tokens[:, :-1]))
        pooled = h.mean(dim=1)
        return [
            F.cross_entropy(self.out(h).reshape(-1, 11), tokens[:, 1:].reshape(-1)),
            F.cross_entropy(self.heads[0](pooled), c),
            F.mse_loss(self.heads[1](pooled), y),
        ]

    @staticmethod
    def batch(g: torch.Generator) -> Batch:
        c = torch.randint(3, (6,), generator=g)
        start = torch.randint(11, (6, 1), generator=g)
        tokens = (start + torch.arange(7) * (c.view(-1, 1) + 1)) % 11
        return tokens, c, -c.view(-1, 1).double() + start / 11


class Net(NamedTuple):
    make: Callable[[], nn.Module]
    lr: float


NETS = {
    "mlp": Net(MLP, 0.05),
    "cnn": Net(CNN, 0.05),
    "gru": Net(GRU, 0.05),
    "transformer": Net(Transformer, 0.05),
}


def make(name: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """The same initial values in every dtype: drawn in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETS[name].make().to(dtype)


def batches(name: str, seed: int, count: int) -> list[Batch]:
    """float64 batches whose values float32 can hold."""
    g = torch.Generator().manual_seed(seed)
    found = [NETS[name].make.batch(g) for _ in range(count)]
    return [cast(cast(b, torch.float32), torch.float64) for b in found]
