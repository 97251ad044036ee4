"""Networks in which a probe could leave traces, and complete pictures of a training run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


class Mixed(nn.Module):
    """BatchNorm and dropout in the trunk, dropout in the heads, draws at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3),
                                   nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh())  # fmt: skip
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 2)) for _ in range(3)]
        )
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, y = batch
        self.calls.add_(1)
        h = self.trunk(x) + self.frozen + 0.01 * torch.randn_like(self.frozen)
        return [F.mse_loss(head(h), y[:, 2 * k : 2 * k + 2]) for k, head in enumerate(self.heads)]

    @staticmethod
    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(8, 5, generator=g), torch.randn(8, 6, generator=g)


class Checkpointed(Mixed):
    """The trunk runs again in every backward pass, with its dropout and its running statistics."""

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, y = batch
        h = checkpoint(self.trunk, x, use_reentrant=False)
        return [F.mse_loss(head(h), y[:, 2 * k : 2 * k + 2]) for k, head in enumerate(self.heads)]


class Spectral(Mixed):
    """A power iteration at every forward pass, in buffers of a parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.trunk[0])
        weight_norm(self.trunk[4])


class Conv(nn.Module):
    """Channels-last convolutions with BatchNorm and dropout of whole channels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                   nn.Dropout2d(0.2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 1)])
        self.to(memory_format=torch.channels_last)

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, y = batch
        h = self.trunk(x.to(memory_format=torch.channels_last)).mean(dim=(2, 3))
        outs = [head(h) for head in self.heads]
        return [
            F.cross_entropy(outs[0], y % 2),
            F.cross_entropy(outs[1], y),
            F.mse_loss(outs[2][:, 0], 1.0 * y),
        ]

    @staticmethod
    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(6, 3, 6, 6, generator=g), torch.randint(3, (6,), generator=g)


class Tied(nn.Module):
    """One weight as embedding and as output, attention dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)])

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        tokens, y = batch
        h = self.block(self.embed(tokens[:, :-1]))
        pooled = h.mean(dim=1)
        word = F.cross_entropy(self.out(h).flatten(0, 1), tokens[:, 1:].flatten())
        number = F.mse_loss(self.heads[1](pooled)[:, 0], 1.0 * y)
        return [word, F.cross_entropy(self.heads[0](pooled), y), number]

    @staticmethod
    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(9, (4, 6), generator=g), torch.randint(3, (4,), generator=g)


NETS = {
    "mixed": Mixed,
    "checkpointed": Checkpointed,
    "spectral": Spectral,
    "conv": Conv,
    "tied": Tied,
}


def frozen(value: Any) -> Any:
    """A copy in which tensors are their bytes, so that NaN equals itself and -0 is not 0."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous()
        return (
            str(value.dtype),
            tuple(value.shape),
            value.requires_grad,
            dense.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {str(k): frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(v) for v in value]
    return copy.deepcopy(value)


def picture(model: nn.Module, optimizer: torch.optim.Optimizer, **others: Any) -> dict[str, Any]:
    """Everything that training leaves behind: compare two of them by ==."""
    params = dict(model.named_parameters(remove_duplicate=False))
    base = getattr(optimizer, "base_optimizer", optimizer)
    flags = {k: v for k, v in vars(base).items() if isinstance(v, (bool, int, float, str))}
    return frozen({
        "params": params,
        "buffers": dict(model.named_buffers()),
        "grads": {name: p.grad for name, p in params.items()},
        "grad strides": {name: None if p.grad is None else p.grad.stride() for name, p in params.items()},
        "strides": {name: p.stride() for name, p in params.items()},
        "requires_grad": {name: p.requires_grad for name, p in params.items()},
        "training": {name: m.training for name, m in model.named_modules()},
        "optimizer": optimizer.state_dict(),
        "state keys": [list(base.state[p]) for p in params.values() if p in base.state],
        "flags": flags,
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        **others,
    })  # fmt: skip


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two pictures differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{at}/{k}")]
    return [] if a == b else [at]


def storages(model: nn.Module) -> list[tuple[int, int]]:
    """Objects and addresses of parameters and buffers."""
    return [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())]


def batches(net: str, seed: int, count: int) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    return [NETS[net].batch(g) for _ in range(count)]


def train_twice(train: Callable[[bool], list[Any]], seed: int) -> None:
    """Runs the training without a probe and with one; every picture must be the same."""
    traces = []
    for with_probe in (False, True):
        torch.manual_seed(seed)
        traces.append(train(with_probe))
    plain, probed = traces
    assert len(plain) == len(probed)
    for k, (a, b) in enumerate(zip(plain, probed)):
        assert not (found := differences(a, b)), f"step {k}: {found}"
    assert plain[0] != plain[-1]  # it did train
