"""The networks whose steps are timed: a trunk that the tasks share and a linear head a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Data = tuple["Network", Tensor, Tensor]  # the network, x, y [T, batch]


class Network(nn.Module):
    """A trunk and a linear head a task."""

    def __init__(self, trunk: nn.Module, features: int, tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, 10) for _ in range(tasks))

    def losses(self, x: Tensor, y: Tensor, tasks: Sequence[int] | None = None) -> list[Tensor]:
        """Cross-entropy of the tasks asked for (all), from one pass through the trunk."""
        features = self.trunk(x)
        return [
            nn.functional.cross_entropy(self.heads[i](features), y[i])
            for i in (range(len(y)) if tasks is None else tasks)
        ]


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class BasicBlock(nn.Module):
    """ResNet's basic block (He et al., arXiv 1512.03385), with a projection where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def mlp() -> Data:
    """A trunk of 1.05 M parameters, 8 tasks, batch 64."""
    trunk = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
    return Network(trunk, 512, 8), torch.randn(64, 512), torch.randint(10, (8, 64))


def resnet() -> Data:
    """A trunk of 0.16 M parameters with BatchNorm, 3 tasks, batch 32 of 3 x 32 x 32."""
    trunk = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), Residual(32),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
    )  # fmt: skip
    return Network(trunk, 64, 3), torch.randn(32, 3, 32, 32), torch.randint(10, (3, 32))


def resnet18(batch: int = 16, tasks: int = 3) -> Data:
    """ResNet-18 in its CIFAR form (3x3 stem, no pooling after it), 11.2 M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(before, channels, stride), BasicBlock(channels, channels, 1)]
        before = channels
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    y = torch.randint(10, (tasks, batch))
    return Network(trunk, 512, tasks), torch.randn(batch, 3, 32, 32), y


def many_heads(batch: int = 256, tasks: int = 40, width: int = 512) -> Data:
    """The trunk of ``mlp`` (at this width) below 40 heads."""
    layers = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
    y = torch.randint(10, (tasks, batch))
    return Network(nn.Sequential(*layers), width, tasks), torch.randn(batch, width), y


NETWORKS: dict[str, Callable[[], Data]] = {"mlp": mlp, "resnet": resnet, "resnet18": resnet18}
